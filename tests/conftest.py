"""Settings of all tests: one thread, the same examples every time, and one process for all that starts Ray."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

torch.set_num_threads(1)  # the tensors are small, and the machine is shared
settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("reproducible")


@lru_cache
def _starts_ray(file: str) -> bool:
    return "pytest.mark.ray" in Path(file).read_text(encoding="utf-8")


class OneRaySession(LoadFileScheduling):
    """Tests are shared out by files, but all that start Ray go to one process: they share a session and a run."""

    def _split_scope(self, nodeid: str) -> str:
        """The name of what stays together."""
        file: str = super()._split_scope(nodeid)
        return "ray" if _starts_ray(file) else file


def pytest_xdist_make_scheduler(config: Any, log: Any) -> OneRaySession:
    """Where several processes share the tests."""
    return OneRaySession(config, log)
