"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.commands import in_line, parsed
from tests.paths import ROOT

# the texts in docs/results/ are parts of the page results.md
OF_THE_SITE = sorted(
    page for page in (ROOT / "docs").rglob("*.md") if ROOT / "docs" / "results" not in page.parents
)
# cluster/README.md has tests of its own, which also know the files that pods see
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *OF_THE_SITE]
SHELL = ("", "bash", "sh")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, language, title, and text."""

    page: Path
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}: {self.title or self.text.strip().partition(chr(10))[0]}"


def name_of(page: Path) -> str:
    """A page as messages name it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; one in a list is indented, and comes out without that."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'^( *)```(\w*)(?: title="([^"]*)")?\n(.*?)^\1```$', text, re.DOTALL | re.MULTILINE)
    return [
        Block(page, language, title, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE))
        for indent, language, title, code in found
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def code_in(language: str) -> list[Block]:
    """All blocks of a language."""
    return [block for block in BLOCKS if block.language == language]


def commands(page: Path) -> Iterator[tuple[str, ...]]:
    """Words after `dmtg` of every command line in the shell blocks of a page."""
    for block in blocks(page):
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from in_line(re.sub(r"\s#\s.*$", "", line))


def in_text(page: Path) -> Iterator[str]:
    """Every `dmtg …` that stands in a sentence or a table."""
    outside = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`dmtg ([^`]+)`", outside)


def write_configurations(folder: Path, page: Path) -> None:
    """The YAML files that pages show, as their reader has them; `ray_config.yaml` only where the page has one."""
    for block in code_in("yaml"):
        if block.title and (block.title != "ray_config.yaml" or block.page == page):
            (folder / block.title).write_text(block.text, encoding="utf-8")


def called(words: Sequence[str]) -> tuple[str, dict]:
    """See `parsed`; a configuration whose name has a dot dot dot is one that a command before it has made."""
    name, given = parsed(words)
    if "…" in str(given.get("config")):
        given["config"] = "planted"
    return name, given


def fragments() -> list[dict]:
    """YAML that shows a part of `source.options` and has no file."""
    return [yaml.safe_load(block.text) for block in code_in("yaml") if not block.title]
