"""`sweep.html`: the report of a sweep as one page that needs no network access, and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pipelines.config.loading import Config
from pipelines.registry.tracking import shown
from pipelines.report.figures import COLOURS, NEUTRAL, STYLE, WIDTH, svg, with_titles
from pipelines.report.formatting import cost, percent, scaled
from pipelines.report.render import render
from pipelines.storage import Location
from pipelines.sweep.results import KNEE
from pipelines.sweep.trials import GROUPS

Row = Mapping[str, Any]
MOST_KINDS = 8  # different numbers at equal distances on an axis
LOGARITHMIC = 20.0  # ratio of the largest number to the smallest, above which their axis is logarithmic
FRONT, OTHER, NAIVE = COLOURS[0], COLOURS[1], NEUTRAL
# from worse to better, between two colours that all forms of colour vision distinguish
GAIN = LinearSegmentedColormap.from_list("gain", [COLOURS[1], "#b5b5b5", COLOURS[0]])


def write_page(target: Location, found: Mapping[str, Any], config: Config) -> None:
    """Write the report of a sweep.

    Args:
        target: File of the report.
        found: Content of `sweep.json`.
        config: Configuration of the sweep.
    """
    known = with_gain(found["settings"])
    plots = {"pareto": pareto(known, found["pareto"], found["knee"]), "parallel": parallel(known)} if known else {}
    page = render(
        "sweep.html",
        found=found,
        verdict=verdict(found),
        marks={row["label"]: ", ".join(marks_of(row["label"], found)) for row in found["settings"]},
        columns=short_names(found["keys"]),
        values={row["label"]: values_of(row, found["keys"]) for row in found["settings"]},
        knee_rule=KNEE,
        config=yaml.safe_dump(shown(config), sort_keys=False),
        figures=plots,
    )
    target.write_text(page)


def marks_of(label: str, found: Mapping[str, Any]) -> list[str]:
    """Marks of a setting in the table: best, front, knee, and the seeds of its means if some are missing."""
    marks = ["best"] if found["best"] and label == found["best"]["label"] else []
    marks += ["front"] if not marks and label in [row["label"] for row in found["pareto"]] else []
    marks += ["knee"] if label == found["knee"] else []
    row = next(row for row in found["settings"] if row["label"] == label)
    some = 0 < row["finished"] < row["seeds"]
    return marks + [f"only {row['finished']} of {row['seeds']} seeds"] * some


def short_names(keys: Sequence[str]) -> list[str]:
    """Names of keys for a table: the last part, or the whole key if two have the same last part."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name.replace("_", " ") if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def values_of(row: Row, keys: Sequence[str]) -> list[str]:
    """The values of a setting for some keys; naive MTL has those of the configuration, which are left out."""
    return [groups_of(row) if key == GROUPS else _word(row["setting"].get(key, "–")) for key in keys]


def groups_of(row: Row) -> str:
    """The number of groups of a setting, and the numbers that were found if they are others."""
    asked = row["setting"][GROUPS]
    differs = row["groups"] and row["groups"] != [asked]
    return f"{asked} → {', '.join(map(str, row['groups']))}" if differs else str(asked)


def with_gain(settings: Sequence[Row]) -> list[Row]:
    """The settings with an inference cost and a gain, naive MTL included."""
    return [row for row in settings if row["flops"] is not None and row["gain_validation"] is not None]


def verdict(found: Mapping[str, Any]) -> str:
    """The best setting with its gain and cost, and the number of seeds."""
    best = found["best"]
    if best is None:
        return "No setting has a gain."
    asked = f" of {best['seeds']}" if best["finished"] < best["seeds"] else ""
    seeds = f"{best['finished']}{asked} seed{'s' * (best['seeds'] > 1)}"
    gained = best["gain_validation"]
    if gained is None:
        return f"Best setting: {best['label']} (mean of {seeds}). Its gain over naive MTL is not defined."
    return (
        f"Best setting: {best['label']}. Its gain over naive MTL on validation is {percent(gained)} "
        f"(mean of {seeds}), at {cost(best['flops'])} operations per sample."
    )


def pareto(settings: Sequence[Row], front: Sequence[Row], knee: str | None) -> str:
    """Plot validation gain against operations per sample, with a line through the Pareto front."""
    gains = "; ".join(f"{row['label']} {percent(row['gain_validation'])} at {cost(row['flops'])}" for row in front)
    best = {row["label"] for row in front}
    costs, unit = scaled([row["flops"] for row in settings])
    at = {row["label"]: flops for row, flops in zip(settings, costs, strict=True)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color=NAIVE, linewidth=0.8, linestyle=":")
        steps = [(at[row["label"]], row["gain_validation"]) for row in front]
        axes.plot(*zip(*steps, strict=True), color=FRONT, linewidth=1.4, drawstyle="steps-post", zorder=2)
        for i, row in enumerate(settings):
            colour, marker = (FRONT, "o") if row["label"] in best else (OTHER, "s")
            colour, marker = (NAIVE, "D") if row["naive"] else (colour, marker)
            point = (at[row["label"]], row["gain_validation"])
            axes.scatter(*point, color=colour, marker=marker, s=34, zorder=3).set_gid(f"point-{i}")
            if row["label"] == knee:
                axes.plot(*point, marker="o", markersize=15, color="black",
                          fillstyle="none", clip_on=False)  # fmt: skip
        _numbers(axes, steps)
        axes.set(xlabel=f"{unit} operations per sample".strip(), ylabel="gain over naive MTL on validation, %")
        axes.margins(x=0.12, y=0.15)
        drawn = svg(
            figure, f"Gain over naive MTL against operations per sample. The front, cheapest first: {gains}"
        )
        return with_titles(drawn, {f"point-{i}": described(row) for i, row in enumerate(settings)})


def described(row: Row) -> str:
    """A setting with its gain and its cost, for the pointer."""
    return f"{row['label']}: gain {percent(row['gain_validation'])}, {cost(row['flops'])} operations per sample"


def _numbers(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Write the number of each setting in the table of the front at its point."""
    for i, place in enumerate(points, 1):
        axes.annotate(str(i), place, (-8, 8), textcoords="offset points", ha="right", va="bottom", fontsize=9)


def parallel(settings: Sequence[Row]) -> str:
    """Plot each setting as a line through its values, its cost and its gain. The colour shows the gain."""
    rows = [row for row in settings if not row["naive"]] or list(settings)
    keys = list(rows[0]["setting"])
    axes_of = [
        (name, *_axis([row["setting"][key] for row in rows]))
        for key, name in zip(keys, short_names(keys), strict=True)
    ]
    axes_of += [
        ("operations", *_scale([row["flops"] for row in rows], cost)),
        ("gain, %", *_scale([row["gain_validation"] for row in rows], percent)),
    ]
    gains = axes_of[-1][1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(WIDTH, 1.3 * len(axes_of) + 0.4), 3.4), layout="constrained")
        axes = figure.add_subplot()
        for i in sorted(range(len(rows)), key=lambda i: gains[i]):
            shift = 0.12 * ((i + 0.5) / len(rows) - 0.5)  # lines with the same value are shifted apart
            heights = [at[i] + (shift if n < len(axes_of) - 2 else 0) for n, (_, at, _) in enumerate(axes_of)]
            axes.plot(range(len(axes_of)), heights, color=GAIN(gains[i]), linewidth=2.4, alpha=0.9,
                      gid=f"line-{i}")  # fmt: skip
        for n, (_, _, marks) in enumerate(axes_of):
            axes.axvline(n, color="black", linewidth=0.8)
            for height, text in marks.items():
                _mark(axes, n, height, text, beside=n >= len(axes_of) - 2)
        axes.set(ylim=(-0.08, 1.08), xlim=(-0.3, len(axes_of) - 0.5), yticks=[])
        axes.set_xticks(range(len(axes_of)), [name for name, _, _ in axes_of])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        listed = "; ".join(f"{row['label']} {percent(row['gain_validation'])}" for row in rows)
        drawn = svg(figure, f"Settings as lines through their values, coloured by validation gain: {listed}")
        return with_titles(drawn, {f"line-{i}": described(row) for i, row in enumerate(rows)})


def _mark(axes: Axes, n: int, height: float, text: str, *, beside: bool) -> None:
    """Write a value at an axis: beside the ends of the lines, or above the lines that pass through it."""
    shift, hold = ((5, 0), ("left", "center")) if beside else ((0, 13), ("center", "bottom"))
    axes.annotate(text, (n, height), shift, textcoords="offset points", ha=hold[0], va=hold[1], fontsize=9)


Heights = tuple[list[float], dict[float, str]]  # height of each row, and labels by height


def _axis(values: Sequence[Any]) -> Heights:
    """Place the values of a key: many numbers on a scale, other values at equal distances."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    ordered = sorted(values) if numbers else values
    kinds = list(dict.fromkeys(map(_word, ordered)))
    if numbers and len(kinds) > MOST_KINDS:
        low, high = ordered[0], ordered[-1]
        if low > 0 and high / low > LOGARITHMIC:
            heights, _ = _scale([math.log(value) for value in values], _word)
            return heights, {0.0: _word(low), 1.0: _word(high)}
        return _scale(values, _word)
    at = {text: (i + 0.5) / len(kinds) for i, text in enumerate(kinds)}
    return [at[_word(value)] for value in values], {height: text for text, height in at.items()}


def _word(value: Any) -> str:
    """A value as short text."""
    if isinstance(value, Mapping) and "family" in value:
        ends = f"{value['start']:g}" if value["family"] == "constant" else f"{value['start']:g}–{value['end']:g}"
        return f"{value['family']} {ends}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _scale(values: Sequence[float], text: Callable[[float], str]) -> Heights:
    """Place numbers between the smallest and the largest."""
    least, span = min(values), max(values) - min(values)
    if not span:
        return [0.5] * len(values), {0.5: text(least)}
    return [(value - least) / span for value in values], {0.0: text(least), 1.0: text(max(values))}
