"""The choice of the executor, and what the embedded one holds."""

from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pytest

from pipelines.config.ray_section import RaySection
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.execution.choice import on_ray, open_executor, preload_processes
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.execution.resources import sample_memory
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipelines.execution.choice._in_session", lambda: False)


def section(**values: object) -> RaySection:
    return checked(RaySection, values)


@pytest.mark.parametrize(
    ("values", "ray"),
    [
        ({}, False),
        ({"workers": 1}, False),
        ({"workers": 2}, True),
        ({"workers": [1, 4]}, True),
        ({"address": "auto"}, True),
        ({"executor": "ray"}, True),
        ({"executor": "embedded"}, False),
        ({"executor": "embedded", "workers": 1}, False),
    ],
)
def test_one_worker_without_an_address_needs_no_ray(values: dict[str, object], ray: bool) -> None:
    assert on_ray(section(**values)) is ray


def test_an_address_in_the_environment_is_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert on_ray(section())
    assert not on_ray(section(executor="embedded"))


def test_a_running_session_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.execution.choice._in_session", lambda: True)
    assert on_ray(section())


@pytest.mark.parametrize("values", [{"workers": 2}, {"address": "auto"}])
def test_embedded_with_what_needs_ray_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="needs Ray") as found:
        on_ray(section(executor="embedded", **values))
    assert found.value.wrong_use


@pytest.mark.parametrize("wrong", [0, -1, "many", [2, 1], [1, 2, 3], True])
def test_a_wrong_number_of_workers_is_refused(wrong: object) -> None:
    with pytest.raises(UserError, match=r"ray.workers|workers"):
        section(workers=wrong)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_held_table_is_read_back(processes: int) -> None:
    table = pa.table({"id": ["a", None, "c"], "x": [1.5, 2.5, None]})
    with EmbeddedExecutor(section(), processes) as executor:
        assert executor.hold(table).get().equals(table)


def test_work_in_the_process_of_the_command_yields_values_and_errors_in_order() -> None:
    def invert(number: int) -> float:
        return 1 / number

    with open_executor(section()) as executor:
        found = list(executor.run(invert, [1, 0, 4]))
    assert [done.value for done in found] == [1.0, None, 0.25]
    assert isinstance(found[1].error, ZeroDivisionError)


def test_the_memory_for_samples_is_configured_or_a_share_of_the_machine() -> None:
    assert sample_memory(section(object_store_mib=100)) == 100 * 2**20
    assert 2**20 < sample_memory(section()) < 2**50


@pytest.mark.parametrize(
    ("values", "started"), [({}, True), ({"executor": "ray"}, False), ({"workers": 2}, False)]
)
def test_processes_are_preloaded_if_they_will_be_used(
    values: dict[str, object], started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []
    monkeypatch.setattr("pipelines.execution.choice.preload", found.append)
    preload_processes(section(**values), ["json"])
    assert found == [["json"]] * started


def test_preloading_imports_neither_torch_nor_ray() -> None:
    code = "import sys, pipelines.execution.choice; print(sorted({'torch', 'ray'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
