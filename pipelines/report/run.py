"""`report.html`: the report of a run as one page that needs no network access, from the run folder alone."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dmtg_core.names import listed
from dmtg_core.search.guided import GROUPS
from dmtg_core.search.options import BASELINE, CHAMPION, DISTILLED, GUIDED, ONE, WIDE
from dmtg_core.training.metrics import error_of
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.report import figures, pictures
from pipelines.report.formatting import cost, percent
from pipelines.report.gate_animation import moving_gate
from pipelines.report.render import render
from pipelines.report.trees import better_trees, trees_text
from pipelines.runs.configuration import stored_values
from pipelines.runs.files import DETAILS, GATE, METRICS, RESULT, read_jsonl
from pipelines.runs.identity import data_of, earlier_verdict
from pipelines.runs.outcome import GROUPS as SEVERAL
from pipelines.runs.outcome import WIDE_ENCODER, network_of, outcome, spent_text, was_searched
from pipelines.runs.results import ALL, NAIVE
from pipelines.storage import Location

logger = logging.getLogger(__name__)

# values for older runs, whose results do not have these keys
MISSING: Mapping[str, Any] = {
    "candidates": [], "inference": None, "distilled": {}, "affinity": [], "chosen": "", "notes": [],
    "training_cost": None, "budget": None, "costs": {},
}  # fmt: skip
CONVERGED = 0.5  # smallest probability of a most probable branch if the gate has converged


def write_report(run: Location) -> Location:
    """Write the report of a finished run and a picture of its grouping into the run folder.

    Returns:
        The file of the report.

    Raises:
        UserError: If the run is not finished.
    """
    if not (run / RESULT).exists():
        raise UserError(
            "no finished run here", where=str(run), remedy="run dmtg train to its end, or name another run folder"
        )
    logger.info("writing the report")
    target = run / "report.html"
    (run / "grouping.png").write_bytes(figures.grouping_png((run / RESULT).read_json()["grouping"]))
    target.write_text(page(run))
    return target


def page(run: Location) -> str:
    """Render the report of a finished run as HTML. Results that an older run does not have are left out."""
    result = dict(MISSING) | (run / RESULT).read_json()
    details = (run / DETAILS).read_json() if (run / DETAILS).exists() else {}
    config = stored_values(run)
    tasks = list(result["metrics"])
    gate = gate_records(read_jsonl(run / GATE), result)
    final = final_probabilities(result, gate)
    rows = task_rows(result, details.get("intervals"))
    gated = final is not None and (network_of(result) == SEVERAL or plotted_gate(result) == result["chosen"])
    picture = figures.gate_picture(tasks, final, "Tasks and their branches") if gated and final else ""
    plots = {
        "grouping": picture or figures.grouping(result["grouping"]),
        "candidate": figures.gate_picture(tasks, final, "Tasks and branches") if final and not gated else "",
        "gate": figures.gate(gate, tasks) if gate else "",
        "metrics": figures.metrics(rows) if is_compared(result) else "",
        "affinity": overlap_plot(result, tasks),
        "learning": figures.learning(read_jsonl(run / METRICS), stages_of(result)),
    }
    return render(
        "page.html",
        filters={"candidate": candidate_text},
        styles=("page", "run", "sheet"),
        run=str(run),
        command=shlex.join(retrain_command(run)),
        result=result,
        details=details,
        verdict=verdict(result),
        facts=facts(result, details, final if gated else None),
        shares=[max(row) for row in final] if gated and final else [],
        gate=gate[0]["stage"] if gate else "",
        moving=moving_gate(gate, tasks) if gate else None,
        gated=gated,
        signal=signal_of(config, run),
        spent=spent_text(result) if result["training_cost"] is not None else "",
        kind=network_of(result),
        rows=rows,
        ramp=pictures.ramp(),
        stripes=pictures.stripes(),
        config=yaml.safe_dump(config, sort_keys=False),
        figures=plots,
    )


def signal_of(config: Mapping[str, Any], run: Location) -> str:
    """The verdict of an earlier `dmtg signal`; empty without one, or for a configuration of an earlier version."""
    try:
        return earlier_verdict(checked(Config, config), data_of(run))
    except UserError:
        return ""


def is_compared(result: Mapping[str, Any]) -> bool:
    """Whether a result is compared with naive MTL, and is not naive MTL itself."""
    return bool(result["baseline"]) and result["chosen"] != BASELINE


def retrain_command(run: Location) -> list[str]:
    """The command that trains the same configuration again in a new run folder."""
    return ["dmtg", "train", "-c", f"{run}/config.yaml", f"run.name={run.name}-again"]


def candidate_text(stage: str) -> str:
    """The description of a network that a search trains."""
    kind = stage.rstrip("0123456789").rstrip("_")
    return {
        WIDE: "one wide encoder with the inference cost of all groups",
        ONE: "one encoder for all tasks",
        GUIDED: "a gate that starts at groups of tasks with a high feature overlap",
        CHAMPION: "the models from which the search started",
        GROUPS: "the groups of the best candidate, with other initial weights",
    }.get(kind, "a gate that starts uniform")


def stages_of(result: Mapping[str, Any]) -> list[str]:
    """The stages of the result."""
    return [result["chosen"]] + ([DISTILLED] if result["distilled"].get("kept") else [])


def gate_records(records: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The epochs of the plotted gate; none if no candidate has a gate."""
    stage = plotted_gate(result)
    gated = [record for record in records if len(record["probabilities"][0]) > 1]
    if not result["candidates"]:
        searched = {record["stage"] for record in gated if record["phase"] == "search"}
        stage = (
            searched.pop() if len(searched) == 1 else ""
        )  # with several starts, the start of the result is unknown
    return [record for record in gated if record["stage"] == stage]


def plotted_gate(result: Mapping[str, Any]) -> str:
    """The stage of the plotted gate: the gate of the result, or the best gate if the result has none.

    Further networks of an ensemble have the groups of the first candidate that was trained to the end.
    """
    gates = [c for c in result["candidates"] if len(c["probabilities"][0]) > 1]
    found = [c for c in gates if not c["stage"].startswith(GROUPS)]
    if result["chosen"] in [c["stage"] for c in found]:
        return str(result["chosen"])
    ended = [c for c in found if c["final"] is not None]
    if ended and result["chosen"].startswith(GROUPS):
        return str(ended[0]["stage"])
    return str(min(found, key=lambda c: c["score"])["stage"]) if found else ""


def final_probabilities(
    result: Mapping[str, Any], gate: Sequence[Mapping[str, Any]]
) -> Sequence[Sequence[float]] | None:
    """The probabilities of the plotted gate when the groups were fixed; None if there is no gate."""
    stage = plotted_gate(result)
    found = [c["probabilities"] for c in result["candidates"] if c["stage"] == stage]
    found += [record["probabilities"] for record in gate if record["phase"] == "search"][-1:]
    return found[0] if found else None


def task_rows(result: Mapping[str, Any], intervals: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row for each task: group, headline metric, its value, those of naive MTL and of extra trees, and the gain.

    Args:
        result: Content of `result.json`.
        intervals: The intervals in `details.json`, for the interval of each gain.

    Returns:
        The rows. A gain is the relative reduction of the task's error in per cent; positive is better.
    """
    group_of = {task: name for name, tasks in result["grouping"].items() for task in tasks}
    by_task = (intervals or {}).get("by_task", {})
    trees = (result.get("trees") or {}).get("metrics", {})
    rows = []
    for task, found in result["metrics"].items():
        metric = result["headline"][task]
        value, base = found[metric], result["baseline"].get(task, {}).get(metric)
        gain = None
        if value is not None and base is not None and error_of(metric, base):
            gain = 100 * (error_of(metric, base) - error_of(metric, value)) / error_of(metric, base)
        rows.append(
            {
                "task": task,
                "group": group_of[task],
                "metric": metric,
                "value": value,
                "baseline": base,
                "trees": (trees.get(task) or {}).get(metric),
                "gain": gain,
                "interval": interval_of(by_task.get(task)),
            }
        )
    return rows


def interval_of(gain: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The lower and upper end of a gain's interval; None if one is not defined."""
    if gain is None or gain["low"] is None or gain["high"] is None:
        return None
    return gain["low"], gain["high"]


def overlap_plot(result: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """Plot the feature overlap of all pairs of tasks. Tasks of a group are adjacent."""
    if not result["affinity"]:
        return ""
    order = [task for members in result["grouping"].values() for task in members]
    places = [tasks.index(task) for task in order]
    values = [[float(result["affinity"][a][b]) for b in places] for a in places]
    return figures.heatmap(values, order, "Feature overlap of every two tasks")


def facts(
    result: Mapping[str, Any], details: Mapping[str, Any], final: Sequence[Sequence[float]] | None
) -> dict[str, str]:
    """The texts of the sections on the groups, the gain and the cost, each with one or two sentences."""
    gained = result["normalized_gain"] is not None and is_compared(result)
    found = {
        "groups": groups_text(result),
        "gate": gate_text(result, final),
        "gain": gain_text(result, details.get("intervals")) if gained else "",
        "trees": trees_text(result),
        "capacity": capacity_text(result),
        "cost": cost_text(result, details.get("cost")),
    }
    return {name: text for name, text in found.items() if text}


def groups_text(result: Mapping[str, Any]) -> str:
    """The groups as a sentence."""
    if network_of(result) == WIDE_ENCODER:
        return "All tasks share one wide encoder."
    parts = [
        f"{', '.join(members)} {'together' if len(members) > 1 else 'alone'}"
        for members in result["grouping"].values()
    ]
    return "; ".join(parts) + "."


def gate_text(result: Mapping[str, Any], final: Sequence[Sequence[float]] | None) -> str:
    """The probabilities of the gate when the groups were fixed, and the tasks on which it had not converged."""
    if final is None:
        return "" if network_of(result) == SEVERAL or not was_searched(result) else "One encoder has no gate."
    highest = dict(zip(result["metrics"], (max(row) for row in final), strict=True))
    low, high = min(highest.values()), max(highest.values())
    text = f"When the groups were fixed, the probability of a task's branch was {low:.0%} to {high:.0%}."
    uncertain = [task for task, value in highest.items() if value < CONVERGED]
    return text + (f" It was below {CONVERGED:.0%} for {listed(uncertain)}." if uncertain else "")


def gain_text(result: Mapping[str, Any], intervals: Mapping[str, Any] | None) -> str:
    """The gain over naive MTL, with its confidence interval if there is one."""
    gains = [row["gain"] for row in task_rows(result) if row["gain"] is not None]
    better = sum(gain > 0 for gain in gains)
    text = (
        f"{percent(result['normalized_gain'])} over naive MTL, the mean over tasks. "
        f"{better} of {len(gains)} tasks are better."
    )
    ends = interval_of(intervals["gain"]) if intervals else None
    if intervals is None or ends is None:
        return f"{text} There is no confidence interval: one run does not show the variation between seeds."
    return (
        f"{text} {intervals['confidence']:.0%} confidence interval over the {intervals['samples']} samples: "
        f"{percent(ends[0])} to {percent(ends[1])}. It does not include the variation between seeds."
    )


def capacity_text(result: Mapping[str, Any]) -> str:
    """The validation score of the result relative to the wide encoder's, which has the same inference cost."""
    found = {c["stage"]: c for c in result["candidates"]}
    if WIDE not in found or network_of(result) != SEVERAL or result["chosen"] not in found:
        return ""
    ours, wide = found[result["chosen"]], found[WIDE]
    stopped = wide["final"] is None
    key = "score" if stopped or ours["final"] is None else "final"
    less = 100 * (1 - math.exp(ours[key] - wide[key]))
    before = " before distillation" if result["distilled"].get("kept") else ""
    when = ", which was dropped earlier" if stopped else ""
    return (
        f"On validation, the gain{before} is {percent(less)} over one wide encoder with the same inference "
        f"cost{when}. It is that of the validation score, the mean logarithm of losses and errors."
    )


def cost_text(result: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    """The inference and training cost relative to naive MTL."""
    rows = {row["name"]: row for row in measured["rows"]} if measured else {}
    parts = []
    if rows:
        ours, naive = rows[ALL], rows[NAIVE]
        times, slower = ours["flops"] / naive["flops"], ours["milliseconds"][0] / naive["milliseconds"][0]
        parts.append(
            f"Inference takes {times:.1f} times the operations and {slower:.1f} times the time of naive MTL."
        )
    elif result["inference"]:
        parts.append(f"Inference takes {cost(result['inference']['flops'])} operations a sample.")
    if result["training_cost"] is not None:
        parts.append(f"Training cost {spent_text(result)}.")
    return " ".join(parts)


def verdict(result: Mapping[str, Any]) -> str:
    """The result in one sentence, after one on extra trees if they are better."""
    better = better_trees(result)
    return f"{better}. {_verdict(result)}" if better else _verdict(result)


def _verdict(result: Mapping[str, Any]) -> str:
    count, gain = len(result["grouping"]), result["normalized_gain"]
    over = f"gain over one shared encoder (naive MTL) on {result['split']}, in one run."
    if network_of(result) == SEVERAL:
        groups = f"{len(result['metrics'])} tasks in {count} groups"
        return f"{groups}." if gain is None else f"{groups}: {percent(gain)} {over}"
    found = outcome(result)
    return found if gain is None or not is_compared(result) else f"{found} {percent(gain)} {over}"
