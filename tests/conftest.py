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


@lru_cache
def _shares_the_run(file: str) -> bool:
    """Whether tests of a file take the fixture of the finished run, which is made once in a process."""
    text = Path(file).read_text(encoding="utf-8")
    return "pytest.mark.ray" in text and re.search(r"def \w+\([^)]*\brun[:,)]", text) is not None


class OneFinishedRun(LoadFileScheduling):
    """Tests are shared out by files, but those that look at the finished run go to one process.

    Ray sessions are as many as processes; the run takes longer than most of what is asked of it.
    """

    def _split_scope(self, nodeid: str) -> str:
        """The name of what stays together."""
        file: str = super()._split_scope(nodeid)
        return "run" if _shares_the_run(file) else file


def pytest_xdist_make_scheduler(config: Any, log: Any) -> OneFinishedRun:
    """Where several processes share the tests."""
    return OneFinishedRun(config, log)
