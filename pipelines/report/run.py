"""`report.html`: one page without a network, made from a run folder alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dmtg_core.names import listed
from dmtg_core.search.options import DISTILLED, WIDE
from dmtg_core.training.metrics import error_of
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.report import figures, pictures
from pipelines.report.formatting import cost, percent
from pipelines.report.gate_animation import moving_gate
from pipelines.report.render import render
from pipelines.runs.files import DETAILS, GATE, METRICS, RESULT, read_jsonl
from pipelines.runs.identity import earlier_verdict
from pipelines.runs.results import ALL, NAIVE
from pipelines.storage import Location

# of runs that were finished before these were written
OLDER: Mapping[str, Any] = {
    "candidates": [], "inference": None, "distilled": {}, "affinity": [], "chosen": "", "notes": [],
    "training_cost": None,
}  # fmt: skip
UNDECIDED = 0.5  # a likeliest branch below it


def write_report(run: Location) -> Location:
    """Make the page of a finished run, and a picture of its grouping, beside its results; where the page is.

    Raises:
        UserError: When the run is not finished.
    """
    if not (run / RESULT).exists():
        raise UserError(
            "no finished run here", where=str(run), remedy="run dmtg train to its end, or name another run folder"
        )
    target = run / "report.html"
    (run / "grouping.png").write_bytes(figures.grouping_png((run / RESULT).read_json()["grouping"]))
    target.write_text(page(run))
    return target


def page(run: Location) -> str:
    """The page of a finished run as HTML; what an older run has not written is left out."""
    result = dict(OLDER) | (run / RESULT).read_json()
    details = (run / DETAILS).read_json() if (run / DETAILS).exists() else {}
    config = yaml.safe_load((run / "config.yaml").read_text())
    tasks = list(result["metrics"])
    gate = gate_records(read_jsonl(run / GATE), result)
    shown = probabilities(result, gate)
    rows = task_rows(result, details.get("intervals"))
    own = shown is not None and result["chosen"] != WIDE
    picture = figures.gate_picture(tasks, shown, "Tasks and their branches") if own and shown else ""
    drawn = {
        "grouping": picture or figures.grouping(result["grouping"]),
        "candidate": figures.gate_picture(tasks, shown, "Tasks and branches") if shown and not own else "",
        "gate": figures.gate(gate, tasks) if gate else "",
        "metrics": figures.metrics(rows) if result["baseline"] else "",
        "affinity": affinity(result, tasks),
        "learning": figures.learning(read_jsonl(run / METRICS), stages_of(result)),
    }
    return render(
        "page.html",
        filters={"cost": cost, "percent": percent},
        styles=("page", "run", "sheet"),
        run=str(run),
        command=shlex.join(again(run)),
        result=result,
        details=details,
        verdict=verdict(result),
        facts=facts(result, details, shown if own else None),
        shares=[max(row) for row in shown] if own and shown else [],
        gate=gate[0]["stage"] if gate else "",
        moving=moving_gate(gate, tasks) if gate else None,
        own=own,
        signal=earlier_verdict(checked(Config, config)),
        rows=rows,
        ramp=pictures.ramp(),
        stripes=pictures.stripes(),
        config=yaml.safe_dump(config, sort_keys=False),
        figures=drawn,
    )


def again(run: Location) -> list[str]:
    """The command that trains the same once more, into a run folder of its own."""
    return ["dmtg", "train", "-c", f"{run}/config.yaml", f"run.name={run.name}-again"]


def stages_of(result: Mapping[str, Any]) -> list[str]:
    """The stages that the result went through."""
    return [result["chosen"]] + ([DISTILLED] if result["distilled"].get("kept") else [])


def gate_records(records: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The epochs of the gate that is drawn, none where no candidate has one."""
    stage = shown_gate(result)
    gated = [record for record in records if len(record["probabilities"][0]) > 1]
    if not result["candidates"]:
        searched = {record["stage"] for record in gated if record["phase"] == "search"}
        stage = searched.pop() if len(searched) == 1 else ""  # of several starts it is not known which one it was
    return [record for record in gated if record["stage"] == stage]


def shown_gate(result: Mapping[str, Any]) -> str:
    """The candidate whose gate is drawn: that of the result, or the best one where the result has none."""
    by_name = {c["stage"]: c for c in result["candidates"] if len(c["probabilities"][0]) > 1}
    if result["chosen"] in by_name:
        return str(by_name[result["chosen"]].get("gate", result["chosen"]))
    gated = [c for c in by_name.values() if "gate" not in c]
    if not gated:
        return ""
    return str(min(gated, key=lambda c: c["score"])["stage"])


def probabilities(
    result: Mapping[str, Any], gate: Sequence[Mapping[str, Any]]
) -> Sequence[Sequence[float]] | None:
    """What the gate said when its search ended, and the groups were fixed."""
    stage = shown_gate(result)
    found = [c["probabilities"] for c in result["candidates"] if c["stage"] == stage]
    found += [record["probabilities"] for record in gate if record["phase"] == "search"][-1:]
    return found[0] if found else None


def task_rows(result: Mapping[str, Any], intervals: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row a task: group, headline metric, its value, naive MTL's, and by how many per cent the error fell.

    Args:
        result: `result.json`.
        intervals: Of `details.json`, for the interval of each gain.
    """
    group_of = {task: name for name, tasks in result["grouping"].items() for task in tasks}
    spans = (intervals or {}).get("by_task", {})
    rows = []
    for task, found in result["metrics"].items():
        metric = result["headline"][task]
        value, base = found[metric], result["baseline"].get(task, {}).get(metric)
        change = None
        if value is not None and base is not None and error_of(metric, base):
            change = 100 * (error_of(metric, base) - error_of(metric, value)) / error_of(metric, base)
        rows.append(
            {
                "task": task,
                "group": group_of[task],
                "metric": metric,
                "value": value,
                "baseline": base,
                "gain": change,
                "interval": span(spans.get(task)),
            }
        )
    return rows


def span(gain: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The two ends of a gain's interval, where it has both."""
    if gain is None or gain["low"] is None or gain["high"] is None:
        return None
    return gain["low"], gain["high"]


def affinity(result: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """Overlap of what tasks read, those of a group beside each other."""
    if not result["affinity"]:
        return ""
    order = [task for members in result["grouping"].values() for task in members]
    places = [tasks.index(task) for task in order]
    values = [[float(result["affinity"][a][b]) for b in places] for a in places]
    return figures.heatmap(values, order, "Overlap of what every two tasks read of their input")


def facts(
    result: Mapping[str, Any], details: Mapping[str, Any], shown: Sequence[Sequence[float]] | None
) -> list[tuple[str, str]]:
    """What a person who looks wants to know first: a question each, with its answer in a sentence or two."""
    found = [("Which go together", together(result)), ("How sure", certainty(result, shown))]
    if result["normalized_gain"] is not None:
        found.append(("What it gained", gained(result, details.get("intervals"))))
    return [(name, text) for name, text in [*found, ("What it costs", costs(result, details.get("cost")))] if text]


def together(result: Mapping[str, Any]) -> str:
    """The groups in words."""
    if result["chosen"] == WIDE:
        return "All tasks, in one wide encoder."
    parts = [
        f"{', '.join(members)} {'together' if len(members) > 1 else 'alone'}"
        for members in result["grouping"].values()
    ]
    return "; ".join(parts) + "."


def certainty(result: Mapping[str, Any], shown: Sequence[Sequence[float]] | None) -> str:
    """How decided the gate was when the search ended."""
    if shown is None:
        return (
            "" if result["chosen"] != WIDE else "One wide encoder has no gate: nothing was decided task by task."
        )
    highest = dict(zip(result["metrics"], (max(row) for row in shown), strict=True))
    low, high = min(highest.values()), max(highest.values())
    open_ones = [task for task, value in highest.items() if value < UNDECIDED]
    text = f"When the groups were fixed, the gate gave the tasks' branches {low:.0%} to {high:.0%}."
    return text + (f" It was undecided (under {UNDECIDED:.0%}) on {listed(open_ones)}." if open_ones else "")


def gained(result: Mapping[str, Any], intervals: Mapping[str, Any] | None) -> str:
    """The gain over naive MTL, with the interval where one could be measured."""
    gains = [row["gain"] for row in task_rows(result) if row["gain"] is not None]
    better = sum(gain > 0 for gain in gains)
    change = percent(-result["normalized_gain"])
    text = f"Mean error {change} against naive MTL, lower on {better} of {len(gains)} tasks."
    ends = span(intervals["gain"]) if intervals else None
    if intervals is None or ends is None:
        return f"{text} No interval: one run on its own does not say how this varies."
    return (
        f"{text} {intervals['confidence']:.0%} interval over the {intervals['samples']} samples: "
        f"{percent(-ends[1])} to {percent(-ends[0])}. How it varies with the seed is not in it."
    )


def costs(result: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    """Inference and training beside naive MTL."""
    rows = {row["name"]: row for row in measured["rows"]} if measured else {}
    parts = []
    if rows:
        ours, naive = rows[ALL], rows[NAIVE]
        times, slower = ours["flops"] / naive["flops"], ours["milliseconds"][0] / naive["milliseconds"][0]
        parts.append(
            f"An answer takes {times:.1f} times the operations of naive MTL, {slower:.1f} times its time."
        )
    elif result["inference"]:
        parts.append(f"An answer takes {cost(result['inference']['flops'])} operations.")
    if result["training_cost"] is not None:
        parts.append(f"Training took {result['training_cost']:.1f} runs of naive MTL.")
    return " ".join(parts)


def verdict(result: Mapping[str, Any]) -> str:
    """The result in one sentence, no stronger than one run allows."""
    count = len(result["grouping"])
    groups = f"{len(result['metrics'])} tasks in {count} {'group' if count == 1 else 'groups'}"
    if result["chosen"] == WIDE:
        groups = (
            f"No grouping of the {len(result['metrics'])} tasks was better than one wide encoder of the same cost"
        )
    gain = result["normalized_gain"]
    if gain is None:
        return f"{groups}."
    direction = "lower" if gain >= 0 else "higher"
    return (
        f"{groups}. Against one shared encoder (naive MTL) the mean error on {result['split']} is "
        f"{abs(gain):.1f} % {direction} in this one run, which says nothing yet about how it varies with the seed."
    )
