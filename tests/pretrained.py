"""Published weights for tests, from the folder that DMTG_PRETRAINED names."""

import os
from pathlib import Path

import pytest


def pretrained(name: str) -> Path:
    """A file or folder of published weights. Skip the test if it is missing."""
    folder = os.environ.get("DMTG_PRETRAINED", "")
    if not folder:
        pytest.skip("DMTG_PRETRAINED names no folder; `bash ../shared/tools/pretrained.sh DIR` fetches one")
    path = Path(folder, name)
    if not path.exists():
        pytest.skip(f"no {path}")
    return path
