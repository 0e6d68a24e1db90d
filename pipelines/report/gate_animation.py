"""The animation of the gate over training. Bokeh draws it in the page, which holds all scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipelines.report.figures import (
    FAINT,
    NEUTRAL,
    THICK,
    branches,
    colour,
    curve,
    heights,
    number_of,
    ordered,
    shortened,
)  # fmt: skip

SCRIPT = Path(__file__).parent / "templates" / "gate_animation.js"
LINES, LEFT, RIGHT = "lines", "tasks", "branches"  # names of the parts of the figure that the script changes


def moving_gate(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """Create the animation for the page: the library, the script, the figure and a frame for each epoch.

    Args:
        records: The epochs of one candidate's gate.
        tasks: The N tasks in the order of the gate.
    """
    from bokeh.embed import json_item
    from bokeh.resources import Resources

    last = records[-1]["probabilities"]
    rows, columns = ordered(last)
    pairs = [(n, k) for k in columns for n in rows]
    frames = [
        {
            "text": frame_text(record, i, records),
            "probabilities": [round(record["probabilities"][n][k], 4) for n, k in pairs],
        }
        for i, record in enumerate(records)
    ]
    library = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw
    return {
        "library": [Markup(script) for script in library],  # noqa: S704 - files of Bokeh
        "script": Markup(SCRIPT.read_text()),  # noqa: S704 - a file of this package
        "figure": json_item(_figure(last, tasks, rows, columns)),
        "frames": frames,
        "thick": THICK,
        "faint": FAINT,
    }


def frame_text(record: Mapping[str, Any], index: int, records: Sequence[Mapping[str, Any]]) -> str:
    """The caption of a frame."""
    highest = [max(row) for row in record["probabilities"]]
    phase = "search" if record["phase"] == "search" else "groups are fixed"
    return (
        f"Epoch {index + 1} of {len(records)}, {phase}: the probability of a task's most probable branch is "
        f"{sum(highest) / len(highest):.0%} on average and at least {min(highest):.0%}."
    )


def _figure(last: Any, tasks: Sequence[str], rows: Sequence[int], columns: Sequence[int]) -> Any:
    from bokeh.models import ColumnDataSource, HoverTool, LinearAxis, Range1d
    from bokeh.plotting import figure

    names, places = branches(last), heights(len(columns), len(rows))
    pairs = [
        (place, n, height, k) for height, k in zip(places, columns, strict=True) for place, n in enumerate(rows)
    ]
    curves = [curve(place, height) for place, _, height, _ in pairs]
    source = ColumnDataSource(
        {
            "xs": [x for x, _ in curves],
            "ys": [y for _, y in curves],
            "probability": [last[n][k] for _, n, _, k in pairs],
            "width": [THICK * last[n][k] for _, n, _, k in pairs],
            "alpha": [float(last[n][k] >= FAINT) for _, n, _, k in pairs],
            "task": [tasks[n] for _, n, _, _ in pairs],
            "branch": [names[k] or "no task" for _, _, _, k in pairs],
            "colour": [colour(number_of(names[k])) if names[k] else NEUTRAL for _, _, _, k in pairs],
        },
        name=LINES,
    )
    plot = figure(
        height=max(36 * len(rows), 110) + 24, sizing_mode="stretch_width", x_range=Range1d(start=-0.02, end=1.02),
        y_range=Range1d(start=len(rows) - 0.5, end=-0.5), toolbar_location=None, tools="", background_fill_alpha=0,
        border_fill_alpha=0, outline_line_color=None,
    )  # fmt: skip
    lines = plot.multi_line("xs", "ys", line_width="width", line_color="colour", line_alpha="alpha",
                            source=source)  # fmt: skip
    plot.add_tools(HoverTool(renderers=[lines], line_policy="interp",
                             tooltips=[("", "@task → @branch: @probability{0 %}")]))  # fmt: skip
    plot.xaxis.visible = False
    plot.grid.visible = False
    plot.add_layout(LinearAxis(), "right")
    _write(plot.yaxis[0], LEFT, {place: shortened(tasks[n], 18) for place, n in enumerate(rows)})
    _write(plot.yaxis[1], RIGHT, {at: names[k] or "no task" for at, k in zip(places, columns, strict=True)})
    return plot


def _write(axis: Any, name: str, marks: Mapping[float, str]) -> None:
    """Write texts at an axis, without its line and ticks."""
    from bokeh.models import FixedTicker, PlainText

    # plain text: dollar signs in the name of a task are not TeX
    labels = {place: PlainText(text=mark) for place, mark in marks.items()}
    axis.update(
        name=name, ticker=FixedTicker(ticks=list(marks)), major_label_overrides=labels, axis_line_color=None,
        major_tick_line_color=None, minor_tick_line_color=None, major_label_text_font_size="13px",
        major_label_text_font="system-ui, sans-serif",
    )  # fmt: skip
