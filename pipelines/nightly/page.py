"""`regroup.html`: one page on a night, made from the night's folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from pipelines.report import figures
from pipelines.report.figures import svg
from pipelines.report.render import render
from pipelines.storage import Location

VERDICT, PAGE = "verdict.json", "regroup.html"
BETTER, WORSE, OPEN = figures.COLOURS[2], figures.COLOURS[5], figures.NEUTRAL


def write_night(folder: Location) -> Location:
    """Make the page of a night that is decided, beside its verdict; where the page is."""
    (folder / PAGE).write_text(page((folder / VERDICT).read_json()))
    return folder / PAGE


def page(verdict: Mapping[str, Any]) -> str:
    """The page of a verdict as HTML."""
    compared = verdict["comparison"]
    rows = task_rows(verdict)
    drift = verdict.get("grouping_drift")
    drawn = {"after": figures.grouping(verdict["grouping"])}
    if compared is not None:
        drawn["gains"] = gains(rows, compared["gain"])
    if drift is not None:
        drawn["before"] = figures.grouping(drift["before"])
    return render(
        "nightly.html",
        verdict=verdict,
        headline=headline(verdict),
        compared=compared,
        rows=rows,
        drift=drift,
        figures=drawn,
    )


def headline(verdict: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    if verdict["champion"] is None:
        return f"{verdict['challenger']} is the first champion."
    if verdict["verdict"] == "promoted":
        return f"{verdict['challenger']} replaced {verdict['champion']}: {verdict['reason']}."
    return f"{verdict['champion']} was kept: {verdict['reason']}."


def task_rows(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a task: its groups, headline metric, both values, and the fall of its error with the interval."""
    after = {task: name for name, tasks in verdict["grouping"].items() for task in tasks}
    compared = verdict["comparison"]
    if compared is None:
        return []
    before = {task: name for name, tasks in verdict["grouping_drift"]["before"].items() for task in tasks}
    return [
        {
            "task": task,
            "metric": metric,
            "before": before[task],
            "after": after[task],
            "champion": compared["champion"][task][metric],
            "challenger": compared["challenger"][task][metric],
            **compared["by_task"][task],
        }
        for task, metric in compared["headline"].items()
    ]


def gains(rows: Sequence[Mapping[str, Any]], mean: Mapping[str, Any]) -> str:
    """By how many per cent each task's error fell, with the bootstrap interval; the mean of all below."""
    shown = [*rows, {"task": "mean of all tasks", **mean}]
    known = [row for row in shown if None not in (row["value"], row["low"], row["high"])]
    words = "; ".join(f"{row['task']} {row['value']:+.1f} %" for row in known)
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH - 1.6, 0.34 * len(shown) + 0.6))
        axes = figure.add_subplot()
        for row in known:
            place = shown.index(row)
            sure = row["low"] > 0 or row["high"] < 0
            tint = OPEN if not sure else BETTER if row["value"] > 0 else WORSE
            axes.plot([row["low"], row["high"]], [place, place], color=tint, linewidth=2)
            axes.plot(row["value"], place, marker="o" if row["task"] != "mean of all tasks" else "D", color=tint)
        axes.axvline(0, color="black", linewidth=0.8)
        figures.label_rows(axes, [row["task"] for row in shown])
        axes.set_xlabel("error against the champion's: % less (right) or more (left)")
        return svg(figure, f"By how much each task's error fell against the champion's, with intervals. {words}")
