"""What the site has beyond the pages in this folder: the reference, formulas, and files that lie elsewhere."""

from __future__ import annotations

import ast
import importlib
import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a hook is loaded as a file, not as a module of a package

notebooks, tables = (importlib.import_module(f"docs.{name}") for name in ("notebooks", "tables"))

# file of the repository → its page
ELSEWHERE: Mapping[str, str] = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "cluster/README.md": "cluster.md",
    "examples/plugin/README.md": "examples/plugin.md",
    **{
        f"examples/{path.name}": f"examples/{path.stem}.md"
        for path in sorted(ROOT.glob("examples/*"))
        if path.suffix in (".py", ".ipynb")
    },
}
MARKERS = {"commands": tables.commands, "configuration": tables.configuration}


def on_config(config: Any) -> Any:
    """A ```math block is TeX, as GitHub reads it too; the page holds MathML, which needs no script."""
    fence = {"name": "math", "class": "math", "format": _math}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def _math(source: str, *_: Any, **__: Any) -> str:
    return "".join(f'<p class="math">{convert(line, display="block")}</p>' for line in source.split("\n\n"))


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of files that lie elsewhere."""
    for source, page in ELSEWHERE.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=text_of(source)))
    return files


def text_of(source: str) -> str:
    """A file of the repository as Markdown, with links that lead on from its page."""
    if source.endswith(".ipynb"):  # the output of cells can look like a link
        return notebooks.as_markdown(ROOT / source, lambda text: relinked(text, source, ELSEWHERE[source]))
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".py"):
        summary, _, rest = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
        code = text.split('"""\n', 1)[1].lstrip("\n")
        text = f'# {summary.rstrip(".")}\n{rest}\n\n```python title="{source}"\n{code}```\n'
    return relinked(text, source, ELSEWHERE[source])


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put in what is generated, and lead links out of this folder to their pages."""
    for name, make in MARKERS.items():
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    uri = page.file.src_uri
    return markdown if uri in ELSEWHERE.values() and uri != "index.md" else relinked(markdown, f"docs/{uri}", uri)


def relinked(markdown: str, source: str, page: str) -> str:
    """The text of `source` with relative links that lead from `page` to the same files."""

    def lead(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = ELSEWHERE.get(place, place.removeprefix("docs/"))
        return f"]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", lead, markdown)
