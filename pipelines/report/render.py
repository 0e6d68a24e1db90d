"""Rendering of pages from templates. Styles and figures are inserted as they are; all other values are escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.report import formatting
from pipelines.report.figures import colour, number_of

# the filters of all templates: numbers are written in one way on all pages
NUMBERS = {name: getattr(formatting, name) for name in ("cost", "figure", "number", "percent", "share")}
TEMPLATES = Path(__file__).parent / "templates"


def tint(group: str) -> str:
    """Colour of a group."""
    return colour(number_of(group))


def render(
    template: str,
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    styles: Sequence[str] = ("page",),
    figures: Mapping[str, str] | None = None,
    **values: Any,
) -> str:
    """A page as HTML.

    Args:
        template: File name of the template, which extends `base.html`.
        filters: Filters of the template in addition to `tint` and to those of `NUMBERS`.
        styles: Names of the style sheets, which are in the folder of the templates.
        figures: SVG of `figures.svg`, whose labels are escaped; a page leaves an empty one out.
        values: All other values of the template, which are escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"tint": tint, **NUMBERS, **(filters or {})}
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of keys: Bokeh refers to earlier ones
    style = "".join((TEMPLATES / f"{name}.css").read_text() for name in styles)
    trusted = {name: Markup(drawn) for name, drawn in (figures or {}).items()}  # noqa: S704 - our own SVG
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704 - files of this package
        figures=trusted,
        **values,
    )
