"""`compare.html`: the report of a comparison as one page that needs no network access, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.config.loading import Config
from pipelines.registry.tracking import shown
from pipelines.report.figures import COLOURS, NEUTRAL, STYLE, WIDTH, heatmap, label_rows, svg
from pipelines.report.render import render
from pipelines.storage import Location

NAIVE, SINGLE = "naive_mtl", "single_task"  # names of methods


def write_page(target: Location, found: Mapping[str, Any], config: Config) -> None:
    """Write the report of a comparison.

    Args:
        target: File of the report.
        found: Content of `compare.json`.
        config: Configuration of the comparison.
    """
    plots = {
        "gains": gains(found["rows"], found["reference"]),
        "tasks": by_task(found["rows"], found["tasks"], found["reference"]),
        "together": together(found["tasks"], found["together"]),
    }
    target.write_text(
        render(
            "compare.html",
            filters={"interval": interval, "ahead": ahead, "two": two, "agreement": agreement, "p_text": p_text},
            found=found,
            config=yaml.safe_dump(shown(config), sort_keys=False),
            figures=plots,
        )
    )


def interval(mean: Mapping[str, Any], unit: str = "") -> str:
    """A mean ± half of its interval."""
    if not math.isfinite(mean["value"]):
        return "–"
    if not math.isfinite(mean["low"]):
        return f"{mean['value']:+.1f}{unit}"
    return f"{mean['value']:+.1f} ± {(mean['high'] - mean['low']) / 2:.1f}{unit}"


def ahead(behind: Mapping[str, Any]) -> Mapping[str, Any]:
    """The gain of a method minus that of the reference: positive is better, as in every other column."""
    return {**behind, "value": 0.0 - behind["value"], "low": 0.0 - behind["high"], "high": 0.0 - behind["low"]}


def agreement(row: Mapping[str, Any], *, short: bool = False) -> str:
    """The agreement of a method's groupings over seeds, and the share of its results that have one group.

    Args:
        row: A row of `compare.json`.
        short: Leave the interval out.
    """
    share = row.get("one_group", 0.0)  # files of earlier versions count one group as a grouping
    if share == 1:
        return "one group"
    value, low, high = (two(row.get(key)) for key in ("stability", "stability_low", "stability_high"))
    text = value if short or low == "–" else f"{value} ({low} to {high})"
    return f"{text}, one group {share:.0%}" if share else text


def p_text(value: float | None) -> str:
    """A p-value; a dash if there is none."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def two(value: float | None) -> str:
    """A number with two decimals; a dash if it is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def gains(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Plot the gain of every method over naive MTL with its interval, the best one on top."""
    known = [row for row in rows if math.isfinite(row["gain"]["value"]) and row["method"] != NAIVE]
    ranked = sorted(known, key=lambda row: -row["gain"]["value"])
    figures = "; ".join(f"{row['method']} {interval(row['gain'], ' %')}" for row in ranked)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH - 1, 0.32 * len(ranked) + 0.6))
        axes = figure.subplots()
        for place, row in enumerate(ranked):
            own = row["method"] == reference
            axes.barh(place, row["gain"]["value"], color=COLOURS[0] if own else NEUTRAL, height=0.7)
            plot_interval(axes, row["gain"], place)
        label_rows(axes, [row["method"] for row in ranked])
        axes.axvline(0, linewidth=0.8, color="black")
        axes.set_xlabel("gain over naive MTL, %")
        return svg(figure, f"Gain over naive MTL of every method, with intervals over seeds. {figures}")


def by_task(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], reference: str) -> str:
    """Plot the gain of each task over naive MTL's mean error: the search, naive MTL and single-task networks.

    Returns:
        The figure; empty if naive MTL is not among the methods.
    """
    found = {row["method"]: row["errors"] for row in rows}
    tints = {reference: COLOURS[0], NAIVE: NEUTRAL, SINGLE: COLOURS[1]}
    shown = [name for name in tints if name in found]
    if NAIVE not in shown or len(shown) < 2:
        return ""
    thick = 1 / (len(shown) + 0.6)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH - 1, (0.22 * len(shown) + 0.12) * len(tasks) + 0.8))
        axes = figure.subplots()
        for n, task in enumerate(tasks):
            base = found[NAIVE][task]["value"] or math.nan
            for i, name in enumerate(shown):
                error = {end: 100 - 100 * found[name][task][end] / base for end in ("value", "low", "high")}
                place = n + (i - (len(shown) - 1) / 2) * thick
                label = "" if n else name
                axes.barh(place, error["value"], color=tints[name], height=0.9 * thick, label=label)
                plot_interval(axes, error, place)
        label_rows(axes, tasks)
        axes.axvline(0, linewidth=0.8, color="black")
        axes.set_xlabel("gain over naive MTL's mean error, %")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9, borderaxespad=0)
        return svg(figure, f"Gain of each task with intervals over seeds, of {', '.join(shown)}; see the table")


def plot_interval(axes: Axes, mean: Mapping[str, Any], place: float) -> None:
    """Plot an interval across its bar, if the interval is defined."""
    if math.isfinite(mean["low"]) and math.isfinite(mean["high"]):
        axes.plot([mean["low"], mean["high"]], [place] * 2, color="black", linewidth=1.2, marker="|", markersize=5)


def together(tasks: Sequence[str], share: Sequence[Sequence[float]]) -> str:
    """Plot the share of the groupings with two tasks in one group. Tasks of one group are adjacent."""
    order = sorted(range(len(tasks)), key=lambda n: [-value for value in share[n]])
    values = [[share[a][b] for b in order] for a in order]
    return heatmap(
        values, [tasks[n] for n in order], "Share of groupings with two tasks in one group", vmin=0, vmax=1
    )
