"""What the pages show is read by the real command line and configuration, and what they show in Python is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dmtg_core import ENCODERS
from dmtg_core.tasks import LOSSES, METRICS
from docs.tables import each_command
from pipelines.config.loading import load_config, recipes
from pipelines.config.validation import checked
from pipelines.data.sources import SOURCES
from pipelines.data.sources.table import TableOptions
from tests.docs.pages import (
    BLOCKS,
    PAGES,
    SHELL,
    blocks,
    called,
    code_in,
    commands,
    fragments,
    in_text,
    name_of,
    write_configurations,
)
from tests.paths import ROOT

COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
DOCS = ROOT / "docs"


def shown(value: object) -> str:
    return (
        " ".join(value) if isinstance(value, tuple) else name_of(value) if isinstance(value, Path) else str(value)
    )


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader works in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=shown)
def test_a_command_line_is_one_that_the_command_and_the_configuration_take(page, words, reader) -> None:
    write_configurations(reader, page)
    _, given = called(words)
    if "config" not in given:
        return
    if "://" in given["config"]:
        pytest.skip("the file is in a bucket")
    load_config(given["config"] or "rooms", given.get("overrides") or [], given.get("ray_config") or "").settings()


@pytest.mark.parametrize("line", ["dmtg trian -c rooms", "dmtg train", "dmtg predict m -c rooms --ou x"])
def test_a_wrong_command_line_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"No such|Missing"):
        called(line.split()[1:])


def test_every_command_is_shown_on_some_page() -> None:
    known = {name.removeprefix("dmtg ") for name, command, _ in each_command() if not hasattr(command, "commands")}
    used = {called(words)[0] for _, words in COMMANDS}
    assert used <= known
    assert known - used <= {"demo"}, "make demo runs that one"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_exist_with_their_options(page: Path) -> None:
    known = {name.removeprefix("dmtg "): (command, context) for name, command, context in each_command()}
    for text in in_text(page):
        words = text.split()
        if words[0] in ("COMMAND", "--help", "…"):
            continue
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), "")
        assert name, f"dmtg {text}"
        command, context = known[name]
        options = {one for parameter in command.get_params(context) for one in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, f"dmtg {text}"


@pytest.mark.parametrize("block", code_in("python"), ids=str)
def test_python_runs(block, reader, capsys) -> None:
    held = dict(ENCODERS)
    try:
        exec(compile(block.text, str(block), "exec"), {"__name__": "page"})  # noqa: S102 - our own page
    finally:
        ENCODERS.clear()
        ENCODERS.update(held)
    if block.page.name == "README.md":
        assert set(capsys.readouterr().out.strip().replace(" | ", ", ").split(", ")) == {"a", "b", "c"}


@pytest.mark.parametrize("block", [block for block in code_in("yaml") if block.title], ids=str)
def test_configurations_are_whole_and_right(block, reader) -> None:
    write_configurations(reader, block.page)
    load_config("rooms" if block.title == "ray_config.yaml" else block.title)


def test_fragments_are_options_of_a_table() -> None:
    assert fragments()
    for found in fragments():
        checked(TableOptions, found)


def test_every_block_has_a_language_that_is_looked_at() -> None:
    assert {block.language for block in BLOCKS} <= {*SHELL, "python", "yaml", "text", "math"}


def rows_of(page: Path, first: str) -> list[list[str]]:
    """The names in code in each cell of a table's rows, for the table whose first heading cell is `first`."""
    text = page.read_text(encoding="utf-8")
    table = re.search(rf"^\| {re.escape(first)} \|.*?\n\|[-|]+\|\n(.*?)^$", text, re.MULTILINE | re.DOTALL)
    assert table
    return [
        [re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|")] for row in table[1].splitlines()
    ]


def test_sources_and_recipes_are_those_there_are() -> None:
    rows = rows_of(DOCS / "howto" / "own-data.md", "`source.kind`")
    assert [row[0][0] for row in rows] == [*dict.fromkeys(row[0][0] for row in rows)]
    assert {row[0][0] for row in rows} == set(SOURCES)
    assert {name for row in rows for name in row[3]} <= set(recipes())


def test_kinds_losses_and_metrics_are_those_there_are() -> None:
    for kind, _, losses, metrics in rows_of(DOCS / "howto" / "own-task.md", "kind"):
        assert tuple(losses) == LOSSES[kind[0]]
        assert tuple(metrics) == METRICS[kind[0]]


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([a-z]\w*)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "docs"} <= named
    for target in named:
        assert f"\n{target}:" in makefile, target


def test_files_that_are_named_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:pipelines|dmtg_core|cluster|docs|examples)/[\w/.-]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{name_of(page)}: {path}"


def test_every_page_has_blocks_that_close() -> None:
    for page in PAGES:
        assert len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page)), page
