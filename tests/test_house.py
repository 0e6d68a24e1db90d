"""The structure of the packages: import circles, floors, sizes, and who may import what."""

from __future__ import annotations

import ast
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx as nx
import pytest

from tests.paths import ROOT

PACKAGES = ("dmtg_core", "pipelines")
MOST_MODULES = 16  # in a folder
MOST_LINES = 400  # in a file
LENGTHS = {"dmtg_core": (7, 30), "pipelines": (8, 28)}  # median and 95th percentile of the lines of a function
RAY_TRAIN = ROOT / "pipelines" / "training" / "ray"
# what is done in one place only → this place
ONLY_IN = {
    "yaml.load": "config/yaml_text.py",
    "yaml.safe_load": "config/yaml_text.py",
    "tempfile.TemporaryDirectory": "scratch.py",
    "tempfile.mkdtemp": "scratch.py",
}


def files(package: str) -> list[Path]:
    """The modules of a package."""
    return sorted((ROOT / package).rglob("*.py"))


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything that runs when a module is imported: all but the bodies of functions."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def circle(edges: list[tuple[str, str]]) -> str:
    """The shortest circle of imports as one line; empty where there is none."""
    graph = nx.DiGraph(edges)
    shortest = min(nx.simple_cycles(graph), key=len, default=[])
    first = shortest.index(min(shortest)) if shortest else 0
    names = [*shortest[first:], *shortest[:first]]
    return " → ".join([*names, *names[:1]])


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph(*PACKAGES)  # imports inside functions are counted
    edges = [(name, other) for name in graph.modules for other in graph.find_modules_directly_imported_by(name)]
    assert len(edges) > 300
    assert not circle(edges), circle(edges)


def test_a_circle_is_printed() -> None:
    assert circle([("a", "b"), ("b", "c"), ("c", "b"), ("c", "a")]) == "b → c → b"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_new_package_needs_a_floor(package: str, tmp_path: Path) -> None:
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    kept = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert kept.returncode == 0, kept.stdout
    (tmp_path / package / "attic").mkdir()
    (tmp_path / package / "attic" / "__init__.py").touch()
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert f"{package}.attic" in refused.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_and_files_are_small(package: str) -> None:
    folders: dict[Path, int] = {}
    for file in files(package):
        folders[file.parent] = folders.get(file.parent, 0) + 1
    assert {str(place): count for place, count in folders.items() if count > MOST_MODULES} == {}
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files(package)}
    assert {name: count for name, count in lengths.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_short(package: str) -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files(package)]
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    median, percentile = LENGTHS[package]
    assert statistics.median(lengths) <= median
    assert lengths[int(0.95 * len(lengths))] <= percentile


def test_ray_train_is_imported_in_one_place() -> None:
    elsewhere = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for file in files(package)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(name == "ray.train" or name.startswith("ray.train.") for name in imported(node))
        and RAY_TRAIN not in file.parents
    ]
    assert elsewhere == []


def test_private_modules_of_ray_are_imported_in_one_file() -> None:
    found = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in files(package)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if any(name.startswith("ray.") and "._" in name for name in imported(node))
    }
    assert found == {"pipelines/training/ray/adapter.py"}


def changes_environment(node: ast.AST) -> bool:
    """Whether a statement or call sets or removes a variable of the environment."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
        targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
        return any(ast.unparse(target).startswith("os.environ") for target in targets)
    calls = {f"os.environ.{name}" for name in ("setdefault", "update", "pop", "clear", "popitem")}
    return isinstance(node, ast.Call) and ast.unparse(node.func) in calls | {"os.putenv", "os.unsetenv"}


def test_no_import_changes_the_environment() -> None:
    changes = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for file in files(package)
        for node in at_import(ast.parse(file.read_text(encoding="utf-8")))
        if changes_environment(node) and isinstance(node, ast.stmt | ast.expr)
    ]
    assert changes == []


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("os.environ['A'] = '1'", True),
        ("os.environ |= {'A': '1'}", True),
        ("os.environ.setdefault('A', '1')", True),
        ("del os.environ['A']", True),
        ("a = os.environ.get('A')", False),
        ("def f():\n    os.environ['A'] = '1'", False),
    ],
)
def test_a_change_of_the_environment_is_seen(code: str, changes: bool) -> None:
    assert any(changes_environment(node) for node in at_import(ast.parse(code))) == changes


def test_yaml_is_read_and_temporary_folders_are_created_in_one_place() -> None:
    elsewhere = [
        f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for file in files("pipelines")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and file != ROOT / "pipelines" / ONLY_IN.get(ast.unparse(node), file.relative_to(ROOT / "pipelines"))
    ]
    assert elsewhere == []
