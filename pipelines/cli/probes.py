"""Probes of `dmtg doctor`: checks as functions, run in this process or in processes with a timeout."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pipelines.errors import UserError

OK, WARN, FAIL = "ok", "warn", "fail"
EXIT_S = 5.0  # time that a process has to exit after its answer


@dataclass(frozen=True)
class Finding:
    """A row of the table: the subject of a check, its state, a verdict and a remedy."""

    what: str
    found: str
    verdict: str = OK
    remedy: str = ""


Probe = tuple[str, Callable[..., list[Finding]], tuple[Any, ...]]  # subject, function and its arguments


def run_in_processes(probes: Sequence[Probe], wait_s: float) -> Iterator[Finding]:
    """Run probes at the same time, each in a process of its own.

    Args:
        probes: What to run.
        wait_s: Timeout in seconds. A probe without an answer in this time is terminated and fails.
    """
    context = multiprocessing.get_context("spawn")
    until = time.monotonic() + wait_s
    running = []
    for what, function, arguments in probes:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send_findings, args=(theirs, what, function, arguments))
        process.start()
        theirs.close()
        running.append((what, process, ours))
    return _collect(running, until, wait_s)


def _collect(running: Sequence[tuple[str, Any, Connection]], until: float, wait_s: float) -> Iterator[Finding]:
    for what, process, ours in running:
        timed_out = not ours.poll(max(until - time.monotonic(), 0))
        try:
            yield from [_no_answer(what, wait_s)] if timed_out else ours.recv()
        except EOFError:
            process.join(EXIT_S)
            yield Finding(
                what, f"its process ended with exit code {process.exitcode}", FAIL, "run dmtg doctor again"
            )
        finally:
            process.join(0 if timed_out else EXIT_S)
            if process.is_alive():
                process.terminate()
                process.join(EXIT_S)
            if process.is_alive():
                process.kill()


def _no_answer(what: str, wait_s: float) -> Finding:
    return Finding(
        what, f"no answer in {wait_s:g} s", FAIL,
        "check the address, the server and the firewall; --timeout sets a longer timeout",
    )  # fmt: skip


def run_probe(probe: Probe) -> list[Finding]:
    """The findings of a probe, or its error as a finding."""
    what, function, arguments = probe
    try:
        return function(*arguments)
    except UserError as error:
        return [Finding(what, f"{error.what} ({error.where})" if error.where else error.what, FAIL, error.remedy)]
    except Exception as error:  # noqa: BLE001 - any error is a finding
        first = str(error).strip().partition("\n")[0]
        return [Finding(what, f"{type(error).__name__}: {first}", FAIL, "correct the cause of this error")]


def _send_findings(
    pipe: Connection, what: str, function: Callable[..., list[Finding]], arguments: tuple[Any, ...]
) -> None:
    """Run a probe in its process; the output of libraries is discarded."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(devnull, stream)
    found = run_probe((what, function, arguments))
    with suppress(BrokenPipeError):
        pipe.send(found)
