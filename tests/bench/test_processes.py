"""Costs of commands are those of all their processes."""

import os
import sys
from pathlib import Path

import pytest

from bench.processes import CommandFailedError, first_line_seconds, peak_mib, seconds


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_seconds_are_those_of_the_whole_command(tmp_path: Path) -> None:
    assert seconds(python("import time; time.sleep(0.5)"), tmp_path) > 0.5


def test_the_first_line_is_not_the_last(tmp_path: Path) -> None:
    code = "import sys, time; print({}, file=sys.stderr, flush=True); time.sleep(60); print('done')"
    assert first_line_seconds(python(code.format("'first'")), tmp_path) < 60


@pytest.mark.parametrize("code", ["pass", "import sys; sys.stdout.write('half a line')"])
def test_a_command_without_a_line_is_an_error(code: str, tmp_path: Path) -> None:
    with pytest.raises(CommandFailedError, match="printed no line"):
        first_line_seconds(python(code), tmp_path)


def test_the_error_of_a_command_is_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(CommandFailedError, match=r"ended with 1: .*ValueError: no table"):
        seconds(python("raise ValueError('no table')"), tmp_path)


def test_memory_is_the_sum_over_all_processes(tmp_path: Path) -> None:
    """Two processes hold 100 MiB each at the same time; memory that a fork shares counts once."""
    hold = "import os, subprocess, sys, time; held = bytearray(b'x') * (100 << 20)"
    alone = f"{hold}; time.sleep(0.5)"
    both = f"{hold}; job = subprocess.Popen([sys.executable, '-c', {alone!r}]); time.sleep(0.5); job.wait()"
    forked = f"{hold}; os.fork(); time.sleep(0.5)"
    assert 100 < peak_mib(python(alone), tmp_path) < 150
    assert 200 < peak_mib(python(both), tmp_path) < 300
    # one process can be read before the fork and the other after it: one and a half times the memory, not twice
    assert 100 < peak_mib(python(forked), tmp_path) < 180


def test_clusters_and_servers_of_the_environment_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere")
    code = "from os import environ as e; assert e['MORE'] and not {'RAY_ADDRESS', 'MLFLOW_TRACKING_URI'} & set(e)"
    assert seconds(python(code), tmp_path, MORE="1") > 0
    assert os.environ["RAY_ADDRESS"]
