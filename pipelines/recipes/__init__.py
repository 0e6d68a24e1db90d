"""Recipes: the configurations that ship with the package, one YAML file each."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parent


def recipes() -> list[str]:
    """Names of the recipes; a recipe in a folder is called `<folder>/<name>`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
