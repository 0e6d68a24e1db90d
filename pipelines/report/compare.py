"""`compare.html`: what a comparison found, as one page without a network, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure

from pipelines.config import Config
from pipelines.report.figures import COLOURS, STYLE, svg
from pipelines.report.render import render
from pipelines.report.sweep import cost
from pipelines.storage import Location
from pipelines.tracking import shown


def write_page(target: Location, found: Mapping[str, Any], config: Config) -> None:
    """Make the page of a comparison.

    Args:
        target: The file.
        found: The content of `compare.json`.
        config: The configuration.
    """
    drawn = {"gains": gains(found["rows"]), "together": together(found["tasks"], found["together"])}
    target.write_text(
        render(
            "compare.html",
            filters={"cost": cost, "interval": interval, "two": two},
            found=found,
            config=yaml.safe_dump(shown(config), sort_keys=False),
            figures=drawn,
        )
    )


def interval(mean: Mapping[str, Any], unit: str = "") -> str:
    """A mean with half of its interval."""
    if not math.isfinite(mean["value"]):
        return "–"
    if not math.isfinite(mean["low"]):
        return f"{mean['value']:+.1f}{unit}"
    return f"{mean['value']:+.1f} ± {(mean['high'] - mean['low']) / 2:.1f}{unit}"


def two(value: float | None) -> str:
    """Two digits, or a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def gains(rows: Sequence[Mapping[str, Any]]) -> str:
    """Gain over naive MTL of every method with its interval, the best on top."""
    ordered = sorted(
        (row for row in rows if math.isfinite(row["gain"]["value"])), key=lambda r: r["gain"]["value"]
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.3 * len(ordered) + 0.8), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(ordered):
            gain = row["gain"]
            half = (gain["high"] - gain["low"]) / 2 if math.isfinite(gain["low"]) else 0
            own = COLOURS[0] if row["method"].startswith("guided") else COLOURS[7]
            axes.errorbar(gain["value"], place, xerr=half, fmt="o", color=own, capsize=3)
        axes.set_yticks(range(len(ordered)), [row["method"] for row in ordered])
        axes.axvline(0, linewidth=0.8, color="#888888")
        axes.set_xlabel("gain over naive MTL, % of error")
        return svg(figure, "Gain over naive MTL of every method, with intervals over seeds")


def together(tasks: Sequence[str], share: Sequence[Sequence[float]]) -> str:
    """Share of the seeds in which two tasks are in one group, in an order that brings groups together."""
    order = sorted(range(len(tasks)), key=lambda n: [-value for value in share[n]])
    with mpl.rc_context(STYLE):
        side = min(2.2 + 0.22 * len(tasks), 9)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow([[share[a][b] for b in order] for a in order], vmin=0, vmax=1, cmap="Blues")
        if len(tasks) <= 40:
            names = [tasks[n] for n in order]
            axes.set_xticks(range(len(tasks)), names, rotation=90)
            axes.set_yticks(range(len(tasks)), names)
        figure.colorbar(image, ax=axes, shrink=0.7)
        return svg(figure, "How often two tasks are in one group, over seeds")
