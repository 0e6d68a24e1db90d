"""`regroup.html`: the report of a nightly run, from the files in its folder."""

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


def write_page(folder: Location) -> Location:
    """Write the report of a finished nightly run into its folder, and return the file."""
    (folder / PAGE).write_text(page((folder / VERDICT).read_json()))
    return folder / PAGE


def page(verdict: Mapping[str, Any]) -> str:
    """The report of a verdict as HTML."""
    compared = verdict["comparison"]
    rows = task_rows(verdict)
    drift = verdict.get("grouping_drift")
    plots = {"after": figures.grouping(verdict["grouping"])}
    if compared is not None:
        plots["gains"] = gains(rows, compared["gain"])
    if drift is not None:
        plots["before"] = figures.grouping(drift["before"])
    return render(
        "nightly.html",
        verdict=verdict,
        headline=headline(verdict),
        compared=compared,
        rows=rows,
        drift=drift,
        figures=plots,
    )


def headline(verdict: Mapping[str, Any]) -> str:
    """The verdict as one sentence."""
    if verdict["champion"] is None:
        return f"{verdict['challenger']} is the first champion."
    if verdict["verdict"] == "promoted":
        return f"{verdict['challenger']} replaced {verdict['champion']}: {verdict['reason']}."
    return f"{verdict['champion']} was kept: {verdict['reason']}."


def task_rows(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each task: groups, headline metric, both values, and the gain with its interval."""
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
    """Plot the gain of each task over the champion with its bootstrap interval, and the mean below."""
    shown = [*rows, {"task": "mean of all tasks", **mean}]
    known = [row for row in shown if None not in (row["value"], row["low"], row["high"])]
    listed = "; ".join(f"{row['task']} {row['value']:+.1f} %" for row in known)
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH - 1.6, 0.34 * len(shown) + 0.6))
        axes = figure.add_subplot()
        for row in known:
            place = shown.index(row)
            significant = row["low"] > 0 or row["high"] < 0
            tint = OPEN if not significant else BETTER if row["value"] > 0 else WORSE
            axes.plot([row["low"], row["high"]], [place, place], color=tint, linewidth=2)
            axes.plot(row["value"], place, marker="o" if row["task"] != "mean of all tasks" else "D", color=tint)
        axes.axvline(0, color="black", linewidth=0.8)
        figures.label_rows(axes, [row["task"] for row in shown])
        axes.set_xlabel("gain over the champion, %")
        return svg(figure, f"Gain of each task over the champion, with bootstrap intervals. {listed}")
