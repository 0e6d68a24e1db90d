"""Settings of all tests: one thread, the same examples every time, one process for all that use one run."""

from __future__ import annotations

import atexit
import gc
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from tests.dmtg_core.parallel import Group

gc.disable()  # until all tests are collected: what is imported lives as long as the process
torch.set_num_threads(1)  # the tensors are small, and the machine is shared
settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("reproducible")


# what takes many seconds to start, and is started once in a process → fixtures or marks of the files that use it
SHARED = {
    "ray": r"ray_session|vit_run|mark\.ray", "servers": "s3|s3_port|mlflow_server", "processes": "two_processes",
}  # fmt: skip
# what takes long goes first, so that no process waits for the other one at the end; the longest first
LONG = (
    "servers", "ray", "processes", "pipelines/compare/test_driver.py", "dmtg_core/search/test_guided_search.py",
    "pipelines/config/test_recipes.py", "pipelines/nightly/test_driver.py",
    "pipelines/serving/test_registered_model.py", "pipelines/registry/test_aliases.py",
    "pipelines/report/test_browser.py", "pipelines/data/test_many_values.py",
    "dmtg_core/evaluation/test_planted.py", "cluster/test_kubeflow.py", "docs/test_site.py",
    "pipelines/data/test_shard_folder.py", "pipelines/nightly/test_kills.py", "bench/test_operators.py",
    "pipelines/training/test_other_data.py", "dmtg_core/sklearn/test_estimator.py",
    "dmtg_core/training/test_step.py", "pipelines/execution/test_cluster.py",
    "pipelines/registry/test_lost_runs.py", "pipelines/training/test_full_disk.py", "bench/test_gpu.py",
    "bench/test_runner.py", "dmtg_core/search/test_search.py", "dmtg_core/evaluation/test_bootstrap.py",
)  # fmt: skip


@lru_cache
def _shared(file: str) -> str:
    """What a file shares with other files, else the file."""
    text = Path(file).read_text(encoding="utf-8")
    for name, words in SHARED.items():
        if re.search(rf"def \w+\([^)]*\b({words})[:,)]|usefixtures\(.({words})\b|pytest\.({words})\b", text):
            return name
    return file


def _name(item: pytest.Item) -> str:
    """What the file of a test shares with other files, else the file."""
    return _shared(item.nodeid.partition("::")[0])


def _place(item: pytest.Item) -> int:
    """The place of a test among those that take long; all others come after them."""
    name = _name(item).removeprefix("tests/")
    return LONG.index(name) if name in LONG else len(LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # else triton reports its types as leaked


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End Ray after the last test that uses it: commands of later tests would find its session and run on it."""
    ray = sys.modules.get("ray")
    if ray is not None and nextitem is not None and _name(nextitem) != "ray" and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Two processes for data-parallel training; starting them takes longer than most of their work."""
    from pipelines.execution.pool import preload
    from tests.dmtg_core.parallel import Group

    preload(["dmtg_core"])
    group = Group(2, tmp_path_factory.mktemp("group"))
    yield group
    group.end()


class OneProcessForShared(LoadFileScheduling):
    """Tests are shared out by files, but those of files that use one Ray session or server go to one process."""

    def _split_scope(self, nodeid: str) -> str:
        """The name of what stays together."""
        return _shared(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcessForShared:
    """Where several processes share the tests. Their order is kept; by default files with many tests go first."""
    config.option.loadscopereorder = False
    return OneProcessForShared(config, log)
