"""Figures of the pages as inline SVG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# the palette of Okabe and Ito, which is safe for all common forms of colour vision
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#666666")
NEUTRAL = "#808080"  # no group; visible on light and dark backgrounds
WIDTH = 5.2  # inches; text is still readable at the width of a phone
THICK = 9.0  # width of a line with probability 1, in points
FAINT = 0.02  # smaller probabilities are not drawn
MOST_PIXELS = 2**24
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text remains text: it is searchable, accessible and has the colour of the page
    "svg.hashsalt": "dmtg",  # equal runs give equal files
    "font.family": "sans-serif",
    "text.parse_math": False,  # "$" in the name of a task is a dollar sign
}
Probabilities = Sequence[Sequence[float]]  # (N, K)


def colour(k: int) -> str:
    """Colour of group number k."""
    return COLOURS[k % len(COLOURS)]


def number_of(group: str) -> int:
    """Number of a group, from its name."""
    return int(group.removeprefix("group_"))


def svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element; `label` is its text for screen readers."""
    buffer = io.StringIO()
    with _any_script():
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None},
            dpi=dots(figure, 100),
        )  # fmt: skip
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # black becomes the text colour of the page, for its light and dark modes
    drawn = drawn.replace("stroke: #000000", "stroke: currentColor").replace(
        "<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1
    )
    return drawn.replace("<text ", '<text fill="currentColor" ')


@contextmanager
def _any_script() -> Iterator[None]:
    """Names can have letters that the font of Matplotlib lacks; a page shows them in a font of the browser."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        yield


def with_titles(drawn: str, titles: Mapping[str, str]) -> str:
    """A figure whose elements show a text when the pointer is over them.

    Args:
        drawn: SVG of `svg`.
        titles: Id of an element, as set with `Artist.set_gid`, → its text.
    """
    for element, text in titles.items():
        opening = f'<g id="{element}">'
        drawn = drawn.replace(opening, f"{opening}<title>{escape(text)}</title>", 1)
    return drawn


def dots(figure: Figure, wanted: float) -> float:
    """Dots per inch, reduced for figures of very many tasks, whose pixels would take gigabytes."""
    width, height = figure.get_size_inches()
    return float(min(wanted, math.sqrt(MOST_PIXELS / (width * height))))


def branches(probabilities: Probabilities) -> list[str]:
    """The group of each branch; empty for a branch that is not the most probable one of any task.

    Groups are numbered by their first task, as in `Grouping`.
    """
    likeliest = [max(range(len(row)), key=row.__getitem__) for row in probabilities]
    names = {k: f"group_{g}" for g, k in enumerate(dict.fromkeys(likeliest))}
    return [names.get(k, "") for k in range(len(probabilities[0]))]


def ordered(probabilities: Probabilities) -> tuple[list[int], list[int]]:
    """Tasks and branches in drawing order: the lines of a group are adjacent."""
    names = branches(probabilities)
    likeliest = [max(range(len(row)), key=row.__getitem__) for row in probabilities]
    order = sorted(range(len(names)), key=lambda k: (not names[k], number_of(names[k]) if names[k] else k))
    return sorted(range(len(likeliest)), key=lambda n: order.index(likeliest[n])), order


def curve(start: float, end: float, points: int = 24) -> tuple[list[float], list[float]]:
    """A smooth curve from the left edge to the right edge, horizontal at both ends."""
    x = np.linspace(0, 1, points)
    return x.tolist(), (start + (end - start) * x * x * (3 - 2 * x)).tolist()


def heights(places: int, of: int) -> list[float]:
    """Heights of `places` branches beside a column of `of` tasks."""
    return [(i + 0.5) * of / places - 0.5 for i in range(places)]


def certain(groups: Mapping[str, Sequence[str]]) -> Probabilities:
    """Probabilities of a grouping without a gate: 1 for the group of each task."""
    return [
        [float(k == own) for k in range(len(groups))] for own, held in enumerate(groups.values()) for _ in held
    ]


def grouping(groups: Mapping[str, Sequence[str]]) -> str:
    """Plot a grouping without probabilities."""
    tasks = [task for held in groups.values() for task in held]
    return gate_picture(tasks, certain(groups), "Grouping")


def gate_picture(tasks: Sequence[str], probabilities: Probabilities, label: str) -> str:
    """Plot tasks joined to branches; the width of a line is its probability."""
    names = branches(probabilities)
    text = "; ".join(
        f"{task}: {names[k]} {row[k]:.0%}"
        for task, row in zip(tasks, probabilities, strict=True)
        for k in [max(range(len(row)), key=row.__getitem__)]
    )
    with mpl.rc_context(STYLE):
        return svg(_gate_picture(tasks, probabilities), f"{label}. {text}")


def grouping_png(groups: Mapping[str, Sequence[str]]) -> bytes:
    """Plot a grouping as PNG, for documents that do not support SVG.

    Letters that the font of Matplotlib lacks are drawn in other installed fonts. A letter that no font has is
    drawn as its number in Unicode. The pages are SVG, which the fonts of the browser draw.
    """
    buffer = io.BytesIO()
    tasks = [task for held in groups.values() for task in held]
    families, lacking = fonts_for(tasks)
    numbers = str.maketrans({letter: f"\\u{ord(letter):04x}" for letter in lacking})
    tasks = [task.translate(numbers) for task in tasks]
    with mpl.rc_context({**STYLE, "font.family": families}), _any_script():
        figure = _gate_picture(tasks, certain(groups))
        figure.savefig(buffer, format="png", dpi=dots(figure, 130), bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def fonts_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Installed font families that have the letters of some texts, the usual one first; letters that none has."""
    families = ["sans-serif"]
    lacking = {letter for text in texts for letter in text if not letter.isspace()} - _letters("sans-serif")
    for name in sorted({entry.name for entry in font_manager.fontManager.ttflist}):
        if lacking and not name.startswith("Last Resort"):  # it has a box for every letter
            more = lacking & _letters(name)
            families += [name] if more else []
            lacking -= more
    return families, lacking


def _letters(family: str) -> set[str]:
    file = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return set(map(chr, font_manager.get_font(file).get_charmap()))


def _gate_picture(tasks: Sequence[str], probabilities: Probabilities) -> Figure:
    names, (rows, columns) = branches(probabilities), ordered(probabilities)
    figure = Figure(figsize=(WIDTH - 2.2, max(1.2, 0.36 * len(tasks))))  # without the names
    axes = figure.add_subplot()
    places = dict(zip(columns, heights(len(columns), len(rows)), strict=True))
    for k, height in places.items():
        tint = colour(number_of(names[k])) if names[k] else NEUTRAL
        for place, n in enumerate(rows):
            share = probabilities[n][k]
            if share >= FAINT:
                axes.plot(*curve(place, height), color=tint, linewidth=THICK * share, solid_capstyle="butt")
        axes.plot(1, height, marker="o", markersize=THICK + 3, color=tint, clip_on=False)
        members = sum(max(range(len(row)), key=row.__getitem__) == k for row in probabilities)
        label = f"{names[k]} ({members})" if names[k] else "no task"
        axes.annotate(label, (1, height), (12, 0), textcoords="offset points", va="center")
    for place, n in enumerate(rows):
        axes.annotate(tasks[n], (0, place), (-6, 0), textcoords="offset points", va="center", ha="right")
    axes.set(xlim=(0, 1), ylim=(len(tasks) - 0.5, -0.5))
    axes.axis("off")
    return figure


def gate(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Plot the probability of every branch over the epochs, one panel for each task."""
    names = branches(records[-1]["probabilities"])
    epochs = range(1, len(records) + 1)
    with mpl.rc_context(STYLE):
        columns = min(3, len(tasks))
        rows = -(-len(tasks) // columns)
        figure = Figure(figsize=(WIDTH * columns / 3 + 0.4, 1.2 * rows + 0.4), layout="constrained")
        # separate axes: the time for shared axes grows with the square of their number
        grid = figure.subplots(rows, columns, squeeze=False)
        panels = [axes for line in grid for axes in line]
        for n, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
            for k, name in enumerate(names):
                tint = colour(number_of(name)) if name else NEUTRAL
                shares = [record["probabilities"][n][k] for record in records]
                axes.plot(epochs, shares, color=tint, linewidth=1.8, clip_on=False)
            axes.set_title(shortened(task, 20), fontsize=9)
            axes.set(ylim=(-0.03, 1.03), yticks=[0, 1], xticks=sorted({1, len(records)}))
            axes.label_outer()
        for axes in panels[len(tasks) :]:
            axes.axis("off")
        figure.supxlabel("epoch", fontsize=10)
        figure.supylabel("probability", fontsize=10)
        return svg(figure, "Probability of each branch over the epochs, one panel for each task")


def shortened(text: str, most: int) -> str:
    """A name with at most `most` characters; a long name is cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label a row for each name, the first one on top, with a margin of less than a row above and below."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plot the gain of each task over naive MTL in per cent, with its confidence interval if there is one."""
    known = [row for row in rows if row["gain"] is not None]
    text = "; ".join(f"{row['task']} {row['gain']:+.1f} %" for row in known)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH - 1.6, max(1.4, 0.32 * len(known) + 0.5)))
        axes = figure.add_subplot()
        for place, row in enumerate(known):
            axes.barh(place, row["gain"], color=colour(number_of(row["group"])), height=0.7)
            span = row.get("interval")
            if span is not None:
                axes.plot(span, [place, place], color="black", linewidth=1.2, marker="|", markersize=7)
        label_rows(axes, [row["task"] for row in known])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("gain over naive MTL, %")
        return svg(figure, f"Gain of each task over naive MTL. {text}")


def learning(records: Sequence[Mapping[str, Any]], chosen: Sequence[str] = ()) -> str:
    """Plot the validation score of the hard network over the epochs of every stage; lower is better.

    Args:
        records: The records of all epochs.
        chosen: The stages of the result, with thick lines. Stages differ by dashes; colours are for groups.
    """
    dashes = ["-", "--", ":", "-.", (0, (1, 3)), (0, (6, 1, 1, 1, 1, 1))]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6))
        axes = figure.add_subplot()
        stages = list(dict.fromkeys(record["stage"] for record in records))
        for place, stage in enumerate(sorted(stages, key=lambda s: s not in chosen)):
            part = [r for r in records if r["stage"] == stage and r["val_score"] is not None]
            own = stage in chosen
            axes.plot(
                [r["epoch"] for r in part], [r["val_score"] for r in part], color="black" if own else NEUTRAL,
                label=stage.replace("naive_mtl", "naive MTL"), linestyle=dashes[place % len(dashes)],
                linewidth=2.2 if own else 1.4, marker="o" if len(part) == 1 else "", markersize=4,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel="validation score")
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=3)
        return svg(figure, "Validation score over the epochs of every stage")


def heatmap(values: Sequence[Sequence[float]], names: Sequence[str], label: str, **limits: float) -> str:
    """Plot a matrix over pairs of tasks.

    Args:
        values: The matrix `(N, N)`.
        names: Names of the tasks, in the order of the matrix.
        label: Text for screen readers.
        limits: `vmin` and `vmax` of the colours; by default the range of the values off the diagonal.
    """
    grid = np.array(values, float)
    off = grid[~np.eye(len(grid), dtype=bool)] if len(grid) > 1 else grid.ravel()
    vmin, vmax = (limits.get(end, float(pick(off))) for end, pick in (("vmin", np.nanmin), ("vmax", np.nanmax)))
    with mpl.rc_context(STYLE):
        few = len(grid) <= 12
        side = max((0.42 if few else 0.22) * len(grid), 1.8)
        figure = Figure(figsize=(side + (0 if few else 1.2), side))
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(grid, vmin=vmin, vmax=max(vmax, vmin + 1e-9), cmap="viridis", rasterized=not few)
        if few:
            _numbers(axes, grid, mesh)
        else:
            figure.colorbar(mesh, ax=axes, shrink=0.5)
        places = np.arange(len(grid)) + 0.5
        axes.set_xticks(places, names, rotation=90, fontsize=10 if few else 9)
        axes.set_yticks(places, names, fontsize=10 if few else 9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        return svg(figure, label)


def _numbers(axes: Axes, grid: np.ndarray, mesh: Any) -> None:
    """Write the values into the cells, dark on light and light on dark."""
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            dark = mesh.norm(value) > 0.6
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}".removeprefix("0"), ha="center", va="center",
                      fontsize=8, color="#101010" if dark else "#f8f8f8")  # fmt: skip
