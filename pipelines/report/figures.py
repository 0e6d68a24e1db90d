"""The figures of the report, as SVG text that stands in the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by every common form of colour vision
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#666666")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and takes the page's colour
    "svg.hashsalt": "dmtg",  # the same run draws the same bytes
    "font.family": "sans-serif",
}


def colour(k: int) -> str:
    """Colour of group number k."""
    return COLOURS[k % len(COLOURS)]


def svg(figure: Figure, label: str) -> str:
    """A figure as an element of a page; `label`, already escaped, is what a screen reader says."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # black becomes the page's text colour, so that one drawing serves light and dark
    drawn = drawn.replace("stroke: #000000", "stroke: currentColor").replace(
        "<svg ", f'<svg role="img" aria-label="{label}" ', 1
    )
    return drawn.replace('style="font', 'fill="currentColor" style="font').replace(
        "<text ", '<text fill="currentColor" '
    )


def grouping(groups: Mapping[str, Sequence[str]]) -> str:
    """The final grouping: one column of tasks joined to their branches."""
    words = "; ".join(f"{name}: {', '.join(members)}" for name, members in groups.items())
    with mpl.rc_context(STYLE):
        return svg(_grouping(groups), f"Final grouping. {words}")


def grouping_png(groups: Mapping[str, Sequence[str]]) -> bytes:
    """The same as a picture for documents that take no SVG."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        _grouping(groups).savefig(buffer, format="png", dpi=130, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _grouping(groups: Mapping[str, Sequence[str]]) -> Figure:
    tasks = [(task, k) for k, members in enumerate(groups.values()) for task in members]
    height = max(1.2, 0.34 * len(tasks))
    figure = Figure(figsize=(6.4, height))
    axes = figure.add_subplot()
    for k, (name, members) in enumerate(groups.items()):
        places = [i for i, (_, owner) in enumerate(tasks) if owner == k]
        middle = sum(places) / len(places)
        for place in places:
            axes.plot([0.36, 0.62], [place, middle], color=colour(k), linewidth=3, solid_capstyle="round")
        axes.scatter([0.64], [middle], s=160, color=colour(k), zorder=3)
        axes.text(0.68, middle, f"{name} ({len(members)})", va="center")
    for place, (task, k) in enumerate(tasks):
        axes.scatter([0.35], [place], s=36, color=colour(k), zorder=3)
        axes.text(0.33, place, task, va="center", ha="right")
    axes.set(xlim=(0, 1), ylim=(len(tasks) - 0.4, -0.6))
    axes.axis("off")
    return figure


def gate(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Probability of every branch over the epochs, one small panel a task; starts are set apart by a gap."""
    with mpl.rc_context(STYLE):
        columns = min(4, len(tasks))
        rows = -(-len(tasks) // columns)
        figure = Figure(figsize=(2.0 * columns + 0.6, 1.35 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = [axes for line in grid for axes in line]
        for n, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
            _gate_panel(axes, records, n)
            axes.set_title(task, fontsize=8)
            axes.set(ylim=(-0.03, 1.03), yticks=[0, 1])
        for axes in panels[len(tasks) :]:
            axes.axis("off")
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel("probability of each branch", fontsize=9)
        return svg(figure, "Probability of each branch over the epochs, one panel a task")


def _gate_panel(axes: Axes, records: Sequence[Mapping[str, Any]], n: int) -> None:
    for k in range(len(records[0]["probabilities"][0])):
        for first, last in _stretches(records):
            part = records[first:last]
            axes.plot(
                range(first + 1, last + 1),
                [record["probabilities"][n][k] for record in part],
                color=colour(k),
                linewidth=1.4,
            )


def _stretches(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Runs of records of one stage: each begins a line of its own."""
    edges = [i for i, r in enumerate(records) if i == 0 or records[i - 1]["stage"] != r["stage"]]
    return list(zip(edges, [*edges[1:], len(records)], strict=True))


def metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    """Change of each task's error against naive MTL in per cent; right is better."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, max(1.4, 0.3 * len(rows) + 0.6)))
        axes = figure.add_subplot()
        known = [row for row in rows if row["gain"] is not None]
        groups = list(dict.fromkeys(row["group"] for row in rows))
        axes.barh(
            [row["task"] for row in known],
            [row["gain"] for row in known],
            color=[colour(int(row["group"].removeprefix("group_"))) for row in known],
        )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("error against naive MTL: per cent less (right) or more (left)")
        return svg(
            figure, f"Relative change of each task's error against naive MTL, coloured by {len(groups)} groups"
        )


def learning(records: Sequence[Mapping[str, Any]]) -> str:
    """Validation score of the hard network over the epochs of every stage; lower is better."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.4))
        axes = figure.add_subplot()
        for k, stage in enumerate(dict.fromkeys(record["stage"] for record in records)):
            part = [r for r in records if r["stage"] == stage and r["val_score"] is not None]
            axes.plot([r["epoch"] for r in part], [r["val_score"] for r in part], color=colour(k), label=stage)
        axes.set(xlabel="epoch", ylabel="mean log validation loss")
        axes.legend(frameon=False, fontsize=8)
        return svg(figure, "Validation score over the epochs of every stage")
