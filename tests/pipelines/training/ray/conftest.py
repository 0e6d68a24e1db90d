"""The finished run of these tests: two workers on Ray."""

from __future__ import annotations

import pytest

from tests.pipelines.driver import Undisturbed


@pytest.fixture(scope="session")
def run(ray_run: Undisturbed) -> Undisturbed:
    return ray_run
