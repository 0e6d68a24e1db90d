"""Notebooks as Markdown: the cells are run in this process, and their output is put below them.

The notebooks have no output of their own. A kernel of Jupyter would add more than twenty packages.
"""

from __future__ import annotations

import ast
import html
import io
import json
import sys
from code import InteractiveInterpreter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def as_markdown(notebook: Path, relinked: Callable[[str], str] = str) -> str:
    """The cells of a notebook, with what they print and the value of their last expression, as Jupyter shows them.

    Args:
        notebook: A notebook in the format 4.
        relinked: Changes the links of a text.

    Raises:
        Exception: That of a cell; its traceback names notebook and cell.
    """
    cells, run, parts = json.loads(notebook.read_text(encoding="utf-8"))["cells"], _Cells(), list[str]()
    for number, cell in enumerate(cells, start=1):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts += [f"```python\n{text}\n```", *run.outputs(text, f"{notebook.name}, cell {number}")]
        else:
            parts.append(relinked(text))
    return "\n\n".join(parts) + "\n"


class _Cells(InteractiveInterpreter):
    """Cells that share their names. `_` is the value of the last expression, as in Jupyter."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        super().__init__(self.names)

    def outputs(self, text: str, where: str) -> list[str]:
        """Run a cell, and return its outputs as Markdown."""
        tree, printed = ast.parse(text, where), io.StringIO()
        self.names["_"] = None
        if tree.body and isinstance(last := tree.body[-1], ast.Expr):
            tree.body[-1] = ast.copy_location(ast.Assign([ast.Name("_", ast.Store())], last.value), last)
        with redirect_stdout(printed):
            self.runcode(compile(ast.fix_missing_locations(tree), where, "exec"))
        words, value = printed.getvalue(), self.names["_"]
        return ([_plain(words)] if words else []) + ([] if value is None else [_shown(value)])

    def showtraceback(self) -> None:
        """Raise the error of a cell, which ends the build."""
        error = sys.exc_info()[1]
        assert error is not None
        raise error


def _shown(value: Any) -> str:
    """The value as HTML if it has that, else as text."""
    as_html = getattr(value, "_repr_html_", None)
    return f'<div class="output">\n{as_html()}\n</div>' if as_html else _plain(repr(value))


def _plain(text: str) -> str:
    return f'<pre class="output">{html.escape(text)}</pre>'
