"""Costs of a command: seconds, seconds to its first line, and peak memory with all its processes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

# a cluster or a server of the user's environment would run a part of the command
REMOTE = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
PAUSE_S = 0.05


class CommandFailedError(RuntimeError):
    """A measured command ended with an error."""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a measured command: this one without clusters and servers."""
    return {key: value for key, value in os.environ.items() if key not in REMOTE} | more


def own_peak_mib() -> float:
    """Return the peak memory of this process. `ru_maxrss` would begin with that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def seconds(command: Sequence[str], folder: Path, **more: str) -> float:
    """Measure the seconds of a command in a folder.

    Args:
        command: The command and its arguments.
        folder: Current folder of the command.
        more: Further variables of its environment.

    Raises:
        CommandFailedError: If it fails.
    """
    started = time.perf_counter()
    _watch(command, folder, lambda job: job.wait(), **more)
    return time.perf_counter() - started


def peak_mib(command: Sequence[str], folder: Path) -> float:
    """Measure the peak memory of a command with all its processes, in MiB. Shared memory counts once.

    The proportional set sizes (PSS) of the processes are summed twenty times a second.

    Raises:
        CommandFailedError: If the command fails.
    """
    peak = 0.0

    def watch(job: psutil.Popen) -> None:
        nonlocal peak
        while job.poll() is None:
            peak = max(peak, sum(map(_pss, [job, *job.children(recursive=True)])))
            time.sleep(PAUSE_S)

    _watch(command, folder, watch)
    return peak / 2**20


def first_line_seconds(command: Sequence[str], folder: Path) -> float:
    """Measure the seconds until a command has printed a line. The command is then terminated.

    Raises:
        CommandFailedError: If the command ends without a line.
    """
    started = time.perf_counter()
    with psutil.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as job:
        line = job.stdout.readline()
        found = time.perf_counter() - started
        job.terminate()
        job.communicate()
    if not line.endswith(b"\n"):
        raise CommandFailedError(f"{' '.join(command)} printed no line")
    return found


def _watch(command: Sequence[str], folder: Path, watch: Callable[[psutil.Popen], object], **more: str) -> None:
    with tempfile.TemporaryFile() as printed:
        job = psutil.Popen(command, cwd=folder, env=environment(**more), stdout=printed, stderr=subprocess.STDOUT)
        watch(job)
        if job.wait():
            printed.seek(0)
            last = printed.read().decode(errors="replace").strip().splitlines()[-3:]
            raise CommandFailedError(f"{' '.join(command)} ended with {job.returncode}: {' | '.join(last)}")


def _pss(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss)
    except psutil.Error:  # the process has ended
        return 0.0
