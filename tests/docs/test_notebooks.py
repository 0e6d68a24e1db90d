"""Cells of notebooks are run in the build of the site, and their output is on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs.notebooks import as_markdown
from tests.paths import ROOT


def notebook(folder: Path, *cells: str) -> Path:
    """A notebook; a cell that begins with # is Markdown."""
    kinds = ["markdown" if text.startswith("#") else "code" for text in cells]
    held = [
        {"cell_type": kind, "source": text.splitlines(keepends=True)}
        for kind, text in zip(kinds, cells, strict=True)
    ]
    file = folder / "some.ipynb"
    file.write_text(json.dumps({"cells": held, "nbformat": 4}))
    return file


def test_output_is_below_its_cell(tmp_path: Path) -> None:
    cells = ("# One [page](a.md)", "x = 2\nprint('<x>', x)", "x + 1\nx * 10", "None", "y = _", "'[a](b)'")
    text = as_markdown(notebook(tmp_path, *cells), lambda text: text.replace("a.md", "b.md"))
    assert text.split("\n\n") == [
        "# One [page](b.md)",
        "```python\nx = 2\nprint('<x>', x)\n```",
        '<pre class="output">&lt;x&gt; 2\n</pre>',
        "```python\nx + 1\nx * 10\n```",
        '<pre class="output">20</pre>',
        "```python\nNone\n```",
        "```python\ny = _\n```",
        "```python\n'[a](b)'\n```",
        '<pre class="output">&#x27;[a](b)&#x27;</pre>\n',
    ]


def test_html_of_a_value_is_kept(tmp_path: Path) -> None:
    text = as_markdown(notebook(tmp_path, "import pandas as pd", "pd.DataFrame({'a': [1]})"))
    assert '<div class="output">\n<div>' in text
    assert 'class="dataframe"' in text


@pytest.mark.parametrize(("cell", "error"), [("1 / 0", ZeroDivisionError), ("1 +", SyntaxError)])
def test_an_error_ends_the_build_and_names_the_cell(tmp_path: Path, cell: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        as_markdown(notebook(tmp_path, "x = 1", cell))
    places = [str(entry.path) for entry in caught.traceback] + [str(getattr(caught.value, "filename", ""))]
    assert "some.ipynb, cell 2" in places


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda file: file.name)
def test_notebooks_have_no_output_and_links_that_lead_somewhere(file: Path) -> None:
    found: dict[str, Any] = json.loads(file.read_text())
    assert (found["nbformat"], len({cell["id"] for cell in found["cells"]})) == (4, len(found["cells"]))
    for cell in found["cells"]:
        text = "".join(cell["source"])
        assert not cell.get("outputs"), text
        for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", text if cell["cell_type"] == "markdown" else ""):
            assert (file.parent / target).exists(), target
