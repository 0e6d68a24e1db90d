"""What the README shows is run."""

import re
from pathlib import Path

from typer.main import get_command

from pipelines.cli import app
from pipelines.config import recipes
from pipelines.sources import SOURCES

README = Path(__file__).resolve().parents[2] / "README.md"


def test_library_example_runs_as_it_stands(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own example
    assert set(capsys.readouterr().out.strip().replace(" | ", ", ").split(", ")) == {"a", "b", "c"}
    assert {task.name for model in names["models"].values() for task in model.tasks} == {"a", "b", "c"}


def test_every_command_and_recipe_it_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"^dmtg (\w+)", text, re.MULTILINE))
    assert named
    assert named <= known
    assert set(re.findall(r"dmtg \w+ .*?-c ([\w/]+)(?![\w/.…-])", text)) <= set(recipes())
    table = re.search(r"^## Data$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert table
    named = re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", table[1], re.MULTILINE)
    assert {kind for kind, _ in named} == set(SOURCES)
    assert {recipe for _, cell in named for recipe in re.findall(r"`([\w/]+)`", cell)} <= set(recipes())
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)):
        assert f"\n{target}:" in makefile


def test_its_pictures_and_files_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text) + re.findall(
        r"`(pipelines/[\w/.]+|ray_config\.yaml)`", text
    ):
        assert (README.parent / path).exists(), path
