"""How every page is made from its template: one frame, styles and figures put inside, all else escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.report.figures import colour, number_of

TEMPLATES = Path(__file__).parent / "templates"


def tint(group: str) -> str:
    """Colour of a group by its name."""
    return colour(number_of(group))


def render(
    template: str,
    *,
    filters: Mapping[str, Callable[..., str]] | None = None,
    styles: Sequence[str] = ("page",),
    figures: Mapping[str, str] | None = None,
    **values: Any,
) -> str:
    """A page as HTML.

    Args:
        template: Name of its file, an extension of `base.html`.
        filters: What the template formats values with, beside `tint`.
        styles: Names of the style sheets among the templates.
        figures: SVG drawn by `figures.svg`, whose labels are escaped; an empty one is left out.
        values: Everything else that the template names; escaped where it is shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"tint": tint, **(filters or {})}
    environment.policies["json.dumps_kwargs"] = {}  # in its own order: Bokeh refers back to what came before
    style = "".join((TEMPLATES / f"{name}.css").read_text() for name in styles)
    trusted = {name: Markup(drawn) for name, drawn in (figures or {}).items()}  # noqa: S704 - drawn here
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704 - files of this package
        figures=trusted,
        **values,
    )
