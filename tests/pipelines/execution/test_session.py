"""The Ray session: which environment variables it sets, and when. Nothing here starts Ray."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipelines.config.ray_section import RaySection
from pipelines.execution.session import ENVIRONMENT, session, set_environment


def test_importing_the_module_changes_no_environment_variable() -> None:
    code = f"import os, pipelines.execution.session; assert not set(os.environ) & {set(ENVIRONMENT)!r}, os.environ"
    clean = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    subprocess.run([sys.executable, "-c", code], env=clean, check=True)


def test_session_sets_what_ray_reads_also_in_a_process_that_ray_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # restores the variable after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8})
    with session(RaySection()):
        assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT


def test_values_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "of the user")
    set_environment()
    assert {os.environ[name] for name in ENVIRONMENT} == {"of the user"}
