"""The results of a comparison: gains with intervals, costs, agreement of groupings, and sentences about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dmtg_core.evaluation.trees import EXTRA_TREES, GRADIENT_BOOSTING, TREES
from dmtg_core.grouping import Grouping
from dmtg_core.tasks import Task
from dmtg_core.training.metrics import error_of, total_error
from pipelines.compare.cells import DISTILLED_WIDE, NAIVE, WIDE, Result
from pipelines.compare.methods import AFFINITY, GUIDED, LONG, LONGER, SELECTED, Comparison
from pipelines.compare.significance import agreement, mean_of, together_share
from pipelines.runs.results import finite_or_none, gain_of, numbers

Results = Mapping[str, Mapping[int, Sequence[Result]]]
RANDOM = "random"
AFFINITIES = (*SELECTED, "hoa")


def summary(
    comparison: Comparison, tasks: Sequence[Task], methods: Sequence[str], results: Results, notes: Sequence[str]
) -> dict[str, Any]:
    """The content of `compare.json`.

    Args:
        comparison: Configuration and tasks.
        tasks: The tasks.
        methods: The methods in order, naive MTL first.
        results: Method → seed → results of the method.
        notes: Notes about the data.
    """
    seeds = list(comparison.config.compare.seeds)
    split = "test" if "test" in results[NAIVE][seeds[0]][0]["metrics"] else "val"
    gains = {m: {s: _gains(tasks, results, m, s, split) for s in seeds} for m in methods}
    reference = GUIDED if GUIDED in methods else NAIVE
    rows = [_row(m, tasks, seeds, results[m], gains, reference, split, comparison) for m in methods]
    groupings = {
        m: [Grouping.from_dict(r["grouping"], comparison.tasks) for s in seeds for r in results[m][s]]
        for m in methods
    }
    return {
        "split": split,
        "seeds": seeds,
        "tasks": [task.name for task in tasks],
        "headline": {task.name: task.metric for task in tasks},
        "groups": comparison.groups,
        "reference": reference,
        "rows": rows,
        "agreement": {a: {b: _agreement(groupings[a], groupings[b]) for b in methods} for a in methods},
        "together": together_share(groupings[reference]),
        "verdicts": verdicts(rows, reference, groupings),
        "confidence": confidence(comparison, results.get(GUIDED, {})),
        "notes": list(notes),
        "per_seed": {m: {str(s): _seed_row(results[m][s], gains[m][s]) for s in seeds} for m in methods},
    }


def _gains(tasks: Sequence[Task], results: Results, method: str, seed: int, split: str) -> dict[str, float]:
    """Mean gains over the results of a seed: of errors and losses on the split, of losses on validation."""
    naive = results[NAIVE][seed][0]
    found: dict[str, list[float]] = {"error": [], "loss": [], "val_loss": []}
    for result in results[method][seed]:
        for key, part, metric in (("error", split, ""), ("loss", split, "loss"), ("val_loss", "val", "loss")):
            value = gain_of(tasks, result["metrics"][part], naive["metrics"][part], metric=metric)
            found[key].append(math.nan if value is None else value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def _row(
    method: str,
    tasks: Sequence[Task],
    seeds: Sequence[int],
    results: Mapping[int, Sequence[Result]],
    gains: Mapping[str, Mapping[int, Mapping[str, float]]],
    reference: str,
    split: str,
    comparison: Comparison,
) -> dict[str, Any]:
    flat = [result for seed in seeds for result in results[seed]]

    def over_seeds(value: Any) -> list[float]:
        return [sum(value(r) for r in results[seed]) / len(results[seed]) for seed in seeds]

    def metric(task: Task) -> Any:
        return lambda r: error_of(task.metric, numbers(r["metrics"][split])[task.name][task.metric])

    own = gains[method]
    row: dict[str, Any] = {
        "method": method,
        "errors": {task.name: asdict(mean_of(over_seeds(metric(task)))) for task in tasks},
        "gain": asdict(mean_of([own[seed]["error"] for seed in seeds])),
        "gain_loss": asdict(mean_of([own[seed]["loss"] for seed in seeds])),
        "behind": asdict(mean_of([gains[reference][seed]["error"] - own[seed]["error"] for seed in seeds])),
        "behind_loss": asdict(mean_of([gains[reference][seed]["loss"] - own[seed]["loss"] for seed in seeds])),
        "total_error": None,
        "stability": finite_or_none(
            agreement([Grouping.from_dict(results[seed][0]["grouping"], comparison.tasks) for seed in seeds])
        ),
        **{key: sum(r[key] for r in flat) / len(flat) for key in ("cost", "flops", "parameters")},
    }
    if all("accuracy" in found for r in flat for found in r["metrics"][split].values()):
        row["total_error"] = asdict(
            mean_of(over_seeds(lambda r: total_error(tasks, numbers(r["metrics"][split]))))
        )
    return row


def _seed_row(results: Sequence[Result], gains: Mapping[str, float]) -> dict[str, Any]:
    return {
        "gain": gains["error"],
        "gain_loss": gains["loss"],
        "gain_loss_val": gains["val_loss"],
        "groupings": [list(r["grouping"].values()) for r in results],
        "scores": [r["score"] for r in results],
        "cost": [r["cost"] for r in results],
        **({"chosen": [r["chosen"] for r in results]} if "chosen" in results[0] else {}),
    }


def _agreement(some: Sequence[Grouping], others: Sequence[Grouping]) -> float:
    """Mean adjusted Rand index between the groupings of two methods."""
    found = [a.adjusted_rand_index(b) for a in some for b in others]
    return sum(found) / len(found)


def confidence(comparison: Comparison, guided: Mapping[int, Sequence[Result]]) -> dict[str, Any]:
    """Task → probability of its branch at the end of the search, and its lead over the next branch (`margin`)."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in comparison.tasks}
    for results in guided.values():
        for result in results:
            for name, row in zip(comparison.tasks, result["probabilities"], strict=True):
                first, *rest = sorted(row, reverse=True)
                found[name].append((first, first - rest[0] if rest else first))
    return {
        name: {
            "probability": sum(p for p, _ in pairs) / len(pairs),
            "margin": sum(margin for _, margin in pairs) / len(pairs),
        }
        for name, pairs in found.items()
        if pairs
    }


def verdicts(
    rows: Sequence[Mapping[str, Any]], reference: str, groupings: Mapping[str, Sequence[Grouping]]
) -> list[str]:
    """Sentences about the guided search and its grouping. They claim no more than the intervals show.

    Args:
        rows: As in `compare.json`.
        reference: GUIDED, or NAIVE if the guided search is not among the methods. There are no sentences then.
        groupings: Method → its groupings over seeds.
    """
    if reference == NAIVE:
        return []
    by_name = {row["method"]: row for row in rows}
    baselines = [RANDOM, WIDE, *(f"{name}{LONG}" for name in LONGER), DISTILLED_WIDE]
    affinities = [by_name[name] for name in AFFINITIES if name in by_name]
    if affinities:
        baselines.insert(2, max(affinities, key=lambda row: row["gain"]["value"])["method"])
    baselines += TREES
    # trees that are better are the first thing to know about a table
    better = [by_name[name] for name in TREES if name in by_name and by_name[name]["behind"]["high"] < 0]
    sentences = [f"Decision trees are better here: {NAMES[row['method']]}, by {_points(row)}." for row in better]
    sentences.append(_gain_sentence(by_name[reference]["gain"]))
    sentences += [_difference_sentence(by_name[name]) for name in baselines if name in by_name]
    longer = [by_name[f"{name}{LONG}"] for name in (WIDE, RANDOM, AFFINITY) if f"{name}{LONG}" in by_name]
    if any(row["behind"]["high"] < 0 for row in longer):
        sentences.append(TOO_SHORT)
    return [*sentences, _grouping_sentence(groupings[reference])]


def _gain_sentence(gain: Mapping[str, Any]) -> str:
    gained = f"The guided search gains {gain['value']:+.1f} % over naive MTL"
    if gain["count"] < 2:
        return f"{gained} with one seed. One seed gives no confidence interval."
    interval = f"95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}, {gain['count']} seeds"
    significant = gain["low"] * gain["high"] > 0
    return f"{gained} ({interval})." + ("" if significant else " The interval contains 0.")


NAMES = {
    RANDOM: "random groups of the same size",
    WIDE: "one wide encoder of the same cost",
    f"{RANDOM}{LONG}": "random groups trained for as long as the search",
    f"{AFFINITY}{LONG}": "groups by the best affinity trained for as long as the search",
    f"{WIDE}{LONG}": "the wide encoder trained for as long as the search",
    f"retrained{LONG}": "its own groups trained from scratch for as long as the search",
    DISTILLED_WIDE: "the best of three wide encoders distilled from their ensemble, without any grouping",
    EXTRA_TREES: "extra trees, one forest for each task",
    GRADIENT_BOOSTING: "gradient boosting, one model for each task",
}


TOO_SHORT = (
    "Longer training gains more than the search: raise train.epochs until it no longer helps, and compare again."
)


def _points(row: Mapping[str, Any]) -> str:
    """The gain of a method over the search, with its interval."""
    behind = row["behind"]
    return f"{-behind['value']:.1f} points of gain ({-behind['high']:.1f} to {-behind['low']:.1f})"


def _difference_sentence(row: Mapping[str, Any]) -> str:
    behind, name = row["behind"], NAMES.get(row["method"], f"the best affinity baseline ({row['method']})")
    if not math.isfinite(behind["low"]):
        return f"One seed gives no comparison with {name}."
    interval = f"{behind['value']:+.1f} points of gain, {behind['low']:+.1f} to {behind['high']:+.1f}"
    if behind["low"] > 0:
        return f"It is better than {name}: {interval}."
    if behind["high"] < 0:
        return f"It is worse than {name}: {interval}."
    return f"It is not significantly different from {name}: {interval}."


def _grouping_sentence(groupings: Sequence[Grouping]) -> str:
    whole = sum(len(one.groups) == 1 for one in groupings)
    if whole == len(groupings):
        return "No grouping was kept: one wide encoder has the best validation score with every seed."
    stable = agreement(groupings)
    if not math.isfinite(stable):
        return "One seed does not show how stable the grouping is."
    index = f"over seeds (mean adjusted Rand index {stable:.2f})"
    mixed = (
        f" One wide encoder has the best validation score with {whole} of {len(groupings)} seeds." if whole else ""
    )
    if stable > 0.8:
        return f"The grouping is stable {index}.{mixed}"
    if stable > 0.3:
        return f"The grouping is partly stable {index}.{mixed}"
    return f"The grouping is not stable {index}, so it says little about which tasks belong together.{mixed}"
