"""`compare.html`: the report of a comparison as one page that needs no network access, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from pipelines.compare.budgets import rows_within
from pipelines.config.loading import Config
from pipelines.registry.tracking import shown
from pipelines.report.figures import COLOURS, NEUTRAL, STYLE, WIDTH, heatmap, label_rows, svg
from pipelines.report.render import render
from pipelines.storage import Location

NAIVE, SINGLE = "naive_mtl", "single_task"  # names of methods; `compare.methods` would import torch
TINTS = (*COLOURS[1:6], COLOURS[7])  # of methods other than the search; yellow is faint as a line
DASHES: Any = ("-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "osv^D*P"


def write_page(target: Location, found: Mapping[str, Any], config: Config) -> None:
    """Write the report of a comparison.

    Args:
        target: File of the report.
        found: Content of `compare.json`.
        config: Configuration of the comparison.
    """
    rows, budgets = found["rows"], found["budgets"]
    several, own = len(budgets) > 1, method_of(rows, found["reference"])
    plots = {
        "gains": gain_against_cost(rows, own) if several else gains(rows, found["reference"]),
        "tasks": by_task(rows, found["tasks"], found["reference"]),
        "together": together(found["tasks"], found["together"]),
    }
    # methods with a training of their own length, and then those of each budget
    parts = [(budget, [row for row in rows if row["budget"] == budget]) for budget in (None, *budgets)]
    compared = rows_within(rows, max(budgets), at_most=False)
    target.write_text(
        render(
            "compare.html",
            filters={"interval": interval, "ahead": ahead, "two": two, "agreement": agreement, "p_text": p_text},
            found=found,
            several=several,
            own=own,
            parts=[part for part in parts if part[1]] if several else [(None, rows)],
            compared=compared,
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


def method_of(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The method of a row, without its budget."""
    return next((str(row["base"]) for row in rows if row["method"] == name), name)


def gain_against_cost(rows: Sequence[Mapping[str, Any]], own: str) -> str:
    """Plot gain against training cost with intervals: one line for each method that has several budgets.

    Methods with a training of their own length are points. Those whose operations are not counted (trees) are
    horizontal lines.

    Args:
        rows: As in `compare.json`.
        own: The method in colour and on top.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if math.isfinite(row["gain"]["value"]):
            by_method.setdefault(row["base"], []).append(row)
    order = sorted(by_method, key=lambda name: (name != own, -by_method[name][-1]["gain"]["value"]))
    text = "; ".join(
        f"{name} {', '.join(_point_text(row) for row in by_method[name])}" for name in order if name != NAIVE
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.add_subplot()
        for n, name in enumerate(order):
            _plot_method(axes, name, by_method[name], n, own=name == own)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({row["budget"] or 1.0 for row in rows})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.axhline(0, linewidth=0.8, color="black")
        axes.set(xlabel="training cost in runs of naive MTL", ylabel="gain over naive MTL, %")
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(-0.1, -0.2), ncols=3)
        return svg(figure, f"Gain over naive MTL against training cost, with intervals over seeds. {text}")


def _point_text(row: Mapping[str, Any]) -> str:
    return f"{interval(row['gain'], ' %')} at {row['cost']:.1f}"


def _plot_method(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], place: int, *, own: bool) -> None:
    """Plot the gains of a method; `place` is its place in the legend, from which its look follows."""
    tint = COLOURS[0] if own else "black" if name == NAIVE else TINTS[place % len(TINTS)]
    dashes, values = DASHES[place % len(DASHES)], [row["gain"]["value"] for row in rows]
    if not any(row["cost"] for row in rows):
        axes.axhline(values[0], color=tint, linestyle=dashes, linewidth=1.2, label=f"{name} (cost not counted)")
        return
    half = [(row["gain"]["high"] - row["gain"]["low"]) / 2 for row in rows]
    axes.errorbar(
        [row["cost"] for row in rows], values, half if all(map(math.isfinite, half)) else None, color=tint,
        label=name, linestyle=dashes, linewidth=2.4 if own else 1.2, marker=MARKERS[place % len(MARKERS)],
        markersize=6 if own else 4, elinewidth=2 if own else 0.8, capsize=2, zorder=3 if own else 2,
    )  # fmt: skip


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
