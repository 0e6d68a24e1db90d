"""The table of a comparison: gains with intervals, costs, agreement, and a verdict no stronger than they allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dmtg_core.grouping import Grouping
from dmtg_core.tasks import Task
from dmtg_core.training.metrics import error_of, total_error
from pipelines.compare.cells import DISTILLED_WIDE, NAIVE, WIDE, Result
from pipelines.compare.methods import AFFINITY, GUIDED, LONG, LONGER, SELECTED, Contest
from pipelines.compare.significance import agreement, mean_of, together_share
from pipelines.runs.results import finite_or_none, gain_of, numbers

Results = Mapping[str, Mapping[int, Sequence[Result]]]
RANDOM = "random"
AFFINITIES = (*SELECTED, "hoa")


def comparison(
    contest: Contest, tasks: Sequence[Task], methods: Sequence[str], results: Results, notes: Sequence[str]
) -> dict[str, Any]:
    """The content of `compare.json`.

    Args:
        contest: What was compared.
        tasks: The tasks.
        methods: In their order, naive MTL first.
        results: Method → seed → what it came to.
        notes: To keep beside it.
    """
    seeds = list(contest.config.compare.seeds)
    split = "test" if "test" in results[NAIVE][seeds[0]][0]["metrics"] else "val"
    gains = {m: {s: _gains(tasks, results, m, s, split) for s in seeds} for m in methods}
    reference = GUIDED if GUIDED in methods else NAIVE
    rows = [_row(m, tasks, seeds, results[m], gains, reference, split, contest) for m in methods]
    groupings = {
        m: [Grouping.from_dict(r["grouping"], contest.tasks) for s in seeds for r in results[m][s]]
        for m in methods
    }
    return {
        "split": split,
        "seeds": seeds,
        "tasks": [task.name for task in tasks],
        "headline": {task.name: task.metric for task in tasks},
        "groups": contest.groups,
        "reference": reference,
        "rows": rows,
        "agreement": {a: {b: _between(groupings[a], groupings[b]) for b in methods} for a in methods},
        "together": together_share(groupings[reference]),
        "verdicts": verdicts(rows, reference, groupings),
        "confidence": confidence(contest, results.get(GUIDED, {})),
        "notes": list(notes),
        "per_seed": {m: {str(s): _seed_row(results[m][s], gains[m][s]) for s in seeds} for m in methods},
    }


def _gains(tasks: Sequence[Task], results: Results, method: str, seed: int, split: str) -> dict[str, float]:
    """Means over the draws of a seed: of headline error and of loss on the split, of loss on validation."""
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
    contest: Contest,
) -> dict[str, Any]:
    everything = [result for seed in seeds for result in results[seed]]

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
            agreement([Grouping.from_dict(results[seed][0]["grouping"], contest.tasks) for seed in seeds])
        ),
        **{key: sum(r[key] for r in everything) / len(everything) for key in ("cost", "flops", "parameters")},
    }
    if all("accuracy" in found for r in everything for found in r["metrics"][split].values()):
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


def _between(ours: Sequence[Grouping], theirs: Sequence[Grouping]) -> float:
    """Mean adjusted Rand index of the groupings of two methods."""
    found = [a.adjusted_rand_index(b) for a in ours for b in theirs]
    return sum(found) / len(found)


def confidence(contest: Contest, guided: Mapping[int, Sequence[Result]]) -> dict[str, Any]:
    """For each task: the probability of its branch when the search ended, and by how much it led the next one."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contest.tasks}
    for results in guided.values():
        for result in results:
            for name, row in zip(contest.tasks, result["probabilities"], strict=True):
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
    """What the table says in words."""
    by_name = {row["method"]: row for row in rows}
    seeds = by_name[reference]["gain"]["count"]
    logged = [_of_gain(by_name[reference], seeds)] if reference != NAIVE else []
    rivals = [RANDOM, WIDE, *(f"{name}{LONG}" for name in LONGER), DISTILLED_WIDE]
    affinities = [by_name[name] for name in AFFINITIES if name in by_name]
    if affinities:
        rivals.insert(2, max(affinities, key=lambda row: row["gain"]["value"])["method"])
    if reference != NAIVE:
        logged += [_against(by_name[name]) for name in rivals if name in by_name]
        longer = [by_name[f"{name}{LONG}"] for name in (WIDE, RANDOM, AFFINITY) if f"{name}{LONG}" in by_name]
        if any(row["behind"]["high"] < 0 for row in longer):
            logged.append(TOO_SHORT)
        logged.append(_of_groups(groupings[reference]))
    return logged


def _of_gain(row: Mapping[str, Any], seeds: int) -> str:
    gain = row["gain"]
    if seeds < 2:
        return (
            f"The guided search gains {gain['value']:+.1f} % over naive MTL with one seed, which proves nothing."
        )
    sure = "" if gain["low"] * gain["high"] > 0 else ", which is within what seeds alone would give"
    return (
        f"The guided search gains {gain['value']:+.1f} % over naive MTL "
        f"(95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}, {seeds} seeds){sure}."
    )


NAMES = {
    RANDOM: "random groups of the same size",
    WIDE: "one wide encoder of the same cost",
    f"{RANDOM}{LONG}": "random groups trained for as long as the search",
    f"{AFFINITY}{LONG}": "groups by the best affinity trained for as long as the search",
    f"{WIDE}{LONG}": "the wide encoder trained for as long as the search",
    f"retrained{LONG}": "its own groups trained from scratch for as long as the search",
    DISTILLED_WIDE: "the best of three wide encoders that learned on from all three, without any grouping",
}


TOO_SHORT = (
    "Longer training gains more here than the search does: raise train.epochs until it no longer helps, and "
    "compare again."
)


def _against(row: Mapping[str, Any]) -> str:
    behind, name = row["behind"], NAMES.get(row["method"], f"the best affinity baseline ({row['method']})")
    if not math.isfinite(behind["low"]):
        return f"One seed says nothing about the search against {name}."
    interval = f"{behind['value']:+.1f} points of gain, {behind['low']:+.1f} to {behind['high']:+.1f}"
    if behind["low"] > 0:
        return f"It is better than {name}: {interval}."
    if behind["high"] < 0:
        return f"It is WORSE than {name}: {interval}."
    return f"It is not told apart from {name}: {interval}."


def _of_groups(groupings: Sequence[Grouping]) -> str:
    whole = sum(len(one.groups) == 1 for one in groupings)
    if whole == len(groupings):
        return "No grouping was kept: one wide encoder was best on validation data with every seed."
    stable = agreement(groupings)
    if not math.isfinite(stable):
        return "One seed says nothing about how stable the grouping is."
    mixed = (
        f" With {whole} of {len(groupings)} seeds one wide encoder was best on validation data." if whole else ""
    )
    if stable > 0.8:
        word = "stable"
    elif stable > 0.3:
        word = "partly stable"
    else:
        word = "not stable, so which tasks go together means little"
    return f"Over seeds the grouping is {word} (mean adjusted Rand index {stable:.2f}).{mixed}"
