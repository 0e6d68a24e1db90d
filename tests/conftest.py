"""Settings of all tests: one thread, the same examples every time, one process for all that use one run."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

torch.set_num_threads(1)  # the tensors are small, and the machine is shared
settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("reproducible")


# finished runs, servers and a Ray session: made once in a process, in many seconds
SHARED = r"run|vit_run|ray_session|s3|s3_port|mlflow_server"


@lru_cache
def _uses_shared(file: str) -> bool:
    """Whether tests of a file take a fixture that is shared by files."""
    text = Path(file).read_text(encoding="utf-8")
    return re.search(rf"def \w+\([^)]*\b({SHARED})[:,)]|usefixtures\(.({SHARED})\b", text) is not None


class OneProcessForShared(LoadFileScheduling):
    """Tests are shared out by files, but those of files that share fixtures go to one process."""

    def _split_scope(self, nodeid: str) -> str:
        """The name of what stays together."""
        file: str = super()._split_scope(nodeid)
        return "shared" if _uses_shared(file) else file


def pytest_xdist_make_scheduler(config: Any, log: Any) -> OneProcessForShared:
    """Where several processes share the tests."""
    return OneProcessForShared(config, log)
