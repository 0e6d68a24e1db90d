"""The finished run of these tests, with the configuration of two workers on Ray.

Its result comes from the embedded executor: a test that disturbs a run on Ray also compares the two executors.
"""

from __future__ import annotations

import pytest

from pipelines.config.ray_section import RaySection
from pipelines.config.validation import checked
from tests.pipelines.conftest import ON_RAY
from tests.pipelines.driver import Undisturbed


@pytest.fixture(scope="session")
def run(vit_run: Undisturbed, ray_session: None) -> Undisturbed:
    config, done, logged = vit_run
    section = checked(RaySection, {**ON_RAY, "object_store_mib": 128})
    return config.model_copy(update={"ray": section}), done, logged
