"""A registry in an SQLite file, which the tests of this folder share with different names."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config.sections import TrackSection
from pipelines.data.sources.base import Source
from tests.pipelines.untrained import small_table


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return small_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders, and an SQLite file that the tests share with different names: creating one is slow."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="package")
def embedded(root: Path) -> dict[str, str]:
    return {"uri": f"sqlite:///{root / 'mlflow.db'}"}


@pytest.fixture(scope="package")
def section(embedded: dict[str, str]) -> TrackSection:
    return TrackSection(**embedded)
