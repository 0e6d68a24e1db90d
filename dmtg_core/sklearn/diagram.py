"""The groups of a fitted estimator as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# sizes in em and colours of the page: a notebook can be dark
_BOX = "display:inline-block;border:1px solid;border-radius:.3em;margin:.2em;padding:.2em .5em;vertical-align:top"
_LABEL = "font-weight:bold"


def groups_html(groups: Sequence[Sequence[Any]], kinds: Mapping[Any, str]) -> str:
    """One box for each group, with its targets and their kinds.

    Args:
        groups: The names of the targets of each group.
        kinds: Name → kind.
    """
    boxes = []
    for number, names in enumerate(groups):
        targets = "".join(f"<div>{escape(str(name))} <small>{kinds[name]}</small></div>" for name in names)
        boxes.append(f'<div style="{_BOX}"><div style="{_LABEL}">group {number}</div>{targets}</div>')
    return f'<div class="dmtg-groups">{"".join(boxes)}</div>'
