"""Code that another user of this machine runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
# other users may not read the interpreter of root: the process changes its user after its imports
CHANGE_USER = f"import fcntl, os, sys\nos.setgroups([])\nos.setgid({NOBODY})\nos.setuid({NOBODY})\n"


def run_as_other(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as another user; skips the test if this user may not."""
    return subprocess.run(_command(code, arguments), capture_output=True, text=True, check=False, cwd="/")


@contextmanager
def running_as_other(code: str, *arguments: str) -> Iterator[None]:
    """Python code that another user runs for the time of the block, which begins with the first line it prints."""
    command = _command(code, arguments)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            yield
        finally:
            process.kill()


def _command(code: str, arguments: tuple[str, ...]) -> list[str]:
    if os.geteuid():
        pytest.skip("only root can run code as another user")
    return [sys.executable, "-I", "-c", CHANGE_USER + code, *arguments]


def shared_folder(folder: Path) -> Path:
    """A folder in which all users may create files, and nobody may remove those of others, as /tmp."""
    folder.mkdir()
    folder.chmod(0o1777)
    for above in folder.parents:
        if above.stat().st_uid == os.geteuid() and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o001)  # pytest's folders are private
    return folder
