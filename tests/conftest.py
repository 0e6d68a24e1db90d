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


# what takes many seconds to start, and is started once in a process → fixtures or marks of the files that use it
SHARED = {"ray": r"ray_session|vit_run|mark\.ray", "servers": "s3|s3_port|mlflow_server"}


@lru_cache
def _shared(file: str) -> str:
    """What a file shares with other files; empty for a file with fixtures of its own or a finished run."""
    text = Path(file).read_text(encoding="utf-8")
    for name, words in SHARED.items():
        if re.search(rf"def \w+\([^)]*\b({words})[:,)]|usefixtures\(.({words})\b|pytest\.({words})\b", text):
            return name
    return ""


class OneProcessForShared(LoadFileScheduling):
    """Tests are shared out by files, but those of files that use one Ray session or server go to one process."""

    def _split_scope(self, nodeid: str) -> str:
        """The name of what stays together."""
        file: str = super()._split_scope(nodeid)
        return _shared(file) or file


def pytest_xdist_make_scheduler(config: Any, log: Any) -> OneProcessForShared:
    """Where several processes share the tests."""
    return OneProcessForShared(config, log)
