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
from pipelines.compare.budgets import budget_sentence, front, rows_within
from pipelines.compare.cells import Result
from pipelines.compare.methods import (
    DISTILLED_WIDE,
    FEATURE_OVERLAP,
    GUIDED,
    LONGER_NAIVE,
    NAIVE,
    RANDOM,
    SELECTED,
    WIDE,
    Comparison,
    rows_of,
)
from pipelines.compare.significance import (
    SIGNIFICANT,
    Mean,
    agreement,
    holm,
    mean_of,
    mutual_agreement,
    one_group_share,
    p_value,
    several,
    together_share,
)
from pipelines.runs.outcome import was_searched
from pipelines.runs.results import finite_or_none, gain_of, numbers

Results = Mapping[str, Mapping[int, Sequence[Result]]]
SELECTORS = (*SELECTED, "hoa")
STABLE, UNSTABLE = 0.8, 0.3  # mean adjusted Rand index over seeds
# the methods that a sentence can compare with the search: the number of tests that p-values are adjusted for
TESTED = (RANDOM, WIDE, *SELECTORS, FEATURE_OVERLAP, LONGER_NAIVE, DISTILLED_WIDE, *TREES)


def summary(
    comparison: Comparison, tasks: Sequence[Task], methods: Sequence[str], results: Results, notes: Sequence[str]
) -> dict[str, Any]:
    """The content of `compare.json`.

    Args:
        comparison: Configuration and tasks.
        tasks: The tasks.
        methods: The methods in order, naive MTL first.
        results: Row → seed → results of its method, see `rows_of`.
        notes: Notes about the data.
    """
    seeds, names = list(comparison.config.compare.seeds), rows_of(comparison, methods)
    split = "test" if "test" in results[NAIVE][seeds[0]][0]["metrics"] else "val"
    gains = {m: {s: _gains(tasks, results, m, s, split) for s in seeds} for m in names}
    largest = max(comparison.budgets)  # methods with a training of their own length are compared at it
    references = {budget: _reference(names, budget) for budget in comparison.budgets}
    reference, rows = references[largest], []
    for m, (base, budget) in names.items():
        row = _row(m, tasks, seeds, results[m], gains, references[budget or largest], split, comparison)
        rows.append(row | {"base": base, "budget": budget or None})
    blocks = {budget: [row for row in rows if (row["budget"] or largest) == budget] for budget in references}
    for budget, block in blocks.items():
        _add_p_values(block, references[budget])
    by_seed = {
        m: [[Grouping.from_dict(r["grouping"], comparison.tasks) for r in results[m][s]] for s in seeds]
        for m in names
    }
    groupings = {m: [one for of_seed in by_seed[m] for one in of_seed] for m in names}
    values = {m: [gains[m][s]["error"] for s in seeds] for m in names}
    fronts = {
        budget: front({row["base"]: values[row["method"]] for row in rows_within(rows, budget)})
        for budget in references
    }
    of_search = [r for of_seed in results[reference].values() for r in of_seed] if reference != NAIVE else []
    searched = any(map(was_searched, of_search))
    sentences = verdicts(blocks[largest], reference, groupings, searched=searched)
    if len(references) > 1 and reference != NAIVE:
        said = [budget_sentence(blocks[budget], ref, fronts[budget]) for budget, ref in references.items()]
        trees = len(tree_sentences(blocks[largest]))
        sentences = [*sentences[:trees], *said, f"With {largest:g} runs in detail:", *sentences[trees:]]
    return {
        "split": split,
        "seeds": seeds,
        "tasks": [task.name for task in tasks],
        "headline": {task.name: task.metric for task in tasks},
        "groups": comparison.groups,
        "budgets": list(comparison.budgets),
        "fronts": [{"budget": budget, "methods": at_front} for budget, at_front in fronts.items()],
        "reference": reference,
        "rows": rows,
        "agreement": agreements(by_seed),
        "together": together_share(several(groupings[reference]) or groupings[reference]),
        "verdicts": sentences,
        "confidence": confidence(comparison, results[reference] if reference != NAIVE else {}),
        "notes": list(notes),
        "per_seed": {m: {str(s): _seed_row(results[m][s], gains[m][s]) for s in seeds} for m in names},
    }


def _reference(names: Mapping[str, tuple[str, float]], budget: float) -> str:
    """The row of the guided search with a budget; naive MTL without a search."""
    return next((name for name, row in names.items() if row == (GUIDED, budget)), NAIVE)


def _add_p_values(rows: Sequence[dict[str, Any]], reference: str) -> None:
    """Add the p-values of the paired differences to the reference, and those that are adjusted."""
    adjusted = adjusted_p_values(rows)
    for row in rows:
        p = math.nan if row["method"] == reference else p_value(Mean(**row["behind"]))
        row |= {"p_value": finite_or_none(p), "p_adjusted": adjusted.get(row["method"])}


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
        **stability([Grouping.from_dict(results[seed][0]["grouping"], comparison.tasks) for seed in seeds]),
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


def agreements(by_seed: Mapping[str, Sequence[Sequence[Grouping]]]) -> dict[str, dict[str, float | None]]:
    """Method → method → `mutual_agreement`, on the diagonal of different seeds; None where it is not defined.

    Args:
        by_seed: Method → seed → groupings.
    """
    return {
        a: {b: finite_or_none(mutual_agreement(some, others)) for b, others in by_seed.items()}
        for a, some in by_seed.items()
    }


def stability(groupings: Sequence[Grouping]) -> dict[str, float | None]:
    """The agreement over seeds of a method with its interval, and the share of its results that have one group."""
    found = agreement(groupings)
    return {
        "stability": finite_or_none(found.value),
        "stability_low": finite_or_none(found.low),
        "stability_high": finite_or_none(found.high),
        "one_group": one_group_share(groupings),
    }


def adjusted_p_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Method → p-value of its paired difference to the reference, adjusted with Holm's procedure.

    The methods are those of `TESTED`. The gain over naive MTL is the first question and not one of these tests.

    Args:
        rows: As in `compare.json`.
    """
    differences = {row["method"]: Mean(**row["behind"]) for row in rows if row["base"] in TESTED}
    adjusted = holm([p_value(difference) for difference in differences.values()])
    return {name: p for name, p in zip(differences, adjusted, strict=True) if math.isfinite(p)}


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


NOT_SEARCHED = (
    "No grouping was searched: the budget has room for one encoder for all tasks alone. Raise compare.budgets or "
    "train.epochs."
)


def verdicts(
    rows: Sequence[Mapping[str, Any]],
    reference: str,
    groupings: Mapping[str, Sequence[Grouping]],
    *,
    searched: bool = True,
) -> list[str]:
    """Sentences about the guided search and its grouping.

    They call a method better or worse if its adjusted p-value is below `SIGNIFICANT`.

    Args:
        rows: As in `compare.json`.
        reference: Row of the guided search, or NAIVE if it is not among the methods. There are no sentences then.
        groupings: Row → its groupings over seeds.
        searched: Whether a candidate of the search could have several groups.
    """
    if reference == NAIVE:
        return []
    by_name = {row["base"]: row for row in rows}
    adjusted = adjusted_p_values(rows)
    baselines = [RANDOM, WIDE, FEATURE_OVERLAP, DISTILLED_WIDE, LONGER_NAIVE]
    affinities = [by_name[name] for name in SELECTORS if name in by_name]
    if affinities:
        baselines.insert(2, max(affinities, key=lambda row: row["gain"]["value"])["base"])
    baselines += TREES
    sentences = [*tree_sentences(rows), _gain_sentence(by_name[GUIDED]["gain"])]
    sentences += [_difference_sentence(by_name[name], adjusted) for name in baselines if name in by_name]
    return [*sentences, _grouping_sentence(groupings[reference]) if searched else NOT_SEARCHED]


def tree_sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about trees that are better than the search. They are the first thing to know about a table."""
    adjusted = adjusted_p_values(rows)
    better = [
        row for row in rows
        if row["base"] in TREES and row["behind"]["value"] < 0 and adjusted.get(row["method"], 1.0) < SIGNIFICANT
    ]  # fmt: skip
    return [f"Decision trees are better here: {NAMES[row['base']]}, by {_points(row)}." for row in better]


def _gain_sentence(gain: Mapping[str, Any]) -> str:
    gained = f"The guided search gains {gain['value']:+.1f} % over naive MTL"
    if gain["count"] < 2:
        return f"{gained} with one seed. One seed gives no confidence interval."
    interval = f"95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}, {gain['count']} seeds"
    significant = gain["low"] * gain["high"] > 0
    return f"{gained} ({interval})." + ("" if significant else " The interval contains 0.")


NAMES = {
    RANDOM: "random groups of the same size",
    WIDE: "one wide encoder of the same inference cost",
    FEATURE_OVERLAP: "groups by feature overlap, trained from scratch",
    LONGER_NAIVE: "naive MTL, trained with the same budget",
    DISTILLED_WIDE: "the best of three wide encoders distilled from their ensemble, without any grouping",
    EXTRA_TREES: "extra trees, one forest for each task",
    GRADIENT_BOOSTING: "gradient boosting, one model for each task",
}


def _points(row: Mapping[str, Any]) -> str:
    """The gain of a method over the search, with its interval."""
    behind = row["behind"]
    return f"{-behind['value']:.1f} points of gain ({-behind['high']:.1f} to {-behind['low']:.1f})"


def _difference_sentence(row: Mapping[str, Any], adjusted: Mapping[str, float]) -> str:
    behind, name = row["behind"], NAMES.get(row["base"], f"the best affinity baseline ({row['base']})")
    if row["method"] not in adjusted:
        return f"One seed gives no comparison with {name}."
    interval = f"{behind['value']:+.1f} points of gain, {behind['low']:+.1f} to {behind['high']:+.1f}"
    p = adjusted[row["method"]]
    if p < SIGNIFICANT:
        return f"It is {'better' if behind['value'] > 0 else 'worse'} than {name}: {interval}."
    excludes = behind["low"] * behind["high"] > 0  # an interval is that of one test
    note = f" (p = {p:.3f}, adjusted for {len(adjusted)} methods)" if excludes else ""
    return f"It is not significantly different from {name}: {interval}{note}."


def _grouping_sentence(groupings: Sequence[Grouping]) -> str:
    """How far the groupings agree over seeds. The words say only what the interval supports."""
    whole = len(groupings) - len(several(groupings))
    if whole == len(groupings):
        return "No grouping was kept: one encoder for all tasks has the best validation score with every seed."
    share = f" One encoder for all tasks has the best validation score with {whole} of {len(groupings)} seeds."
    mixed = share if whole else ""
    found = agreement(groupings)
    if found.count == 1:
        return f"One grouping does not show how stable the grouping is.{mixed}"
    index = f"mean adjusted Rand index {found.value:.2f}"
    if not math.isfinite(found.half):
        return f"Two groupings do not show how stable the grouping is ({index}).{mixed}"
    interval = f"{index}, 95 % interval {found.low:.2f} to {found.high:.2f}, {found.count} groupings"
    words = _stability_words(found)
    if not words:
        return f"{found.count} groupings do not show how stable the grouping is ({interval}).{mixed}"
    return f"The grouping is {words[0]} over seeds ({interval}){words[1]}.{mixed}"


def _stability_words(found: Mean) -> tuple[str, str] | None:
    """A word for an agreement and the end of its sentence; None if its interval supports no word."""
    little = ", so it says little about which tasks belong together"
    if found.low > STABLE:
        return "stable", ""
    if found.high < UNSTABLE:
        return "not stable", little
    if found.low > UNSTABLE:
        return ("partly stable" if found.high < STABLE else "at least partly stable"), ""
    return ("at most partly stable", little) if found.high < STABLE else None
