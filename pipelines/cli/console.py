"""What commands print, and how they end."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from pipelines.errors import UserError
from pipelines.storage import finite

LOG_WIDTH = 160
# what Ray says to its driver that is of no use to anyone: a run has some helper processes of Ray's for each worker
NOISE = "worker processes have been started on node"
FAILED, WRONG_USE, KEPT, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


@dataclass(frozen=True)
class Next:
    """The command that is sensible after this one: what it is for, and its words."""

    why: str
    words: Sequence[str]

    def __str__(self) -> str:
        return shlex.join(self.words)


def log(text: str) -> None:
    """A line for a person; stdout is kept for results."""
    print(text, file=sys.stderr, flush=True)


class Lines(logging.Handler):
    """Says what is logged; a handler of a stream would write across what a terminal shows in place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        log(self.format(record))


def run(command: str, body: Callable[[], dict[str, Any]], *, as_json: bool, debug: bool) -> None:
    """Run a command's body and leave with its exit code.

    Args:
        command: Name of the command.
        body: Does the work; gives the fields of the JSON object. A "status" of "failed" in it makes exit code 1,
            an "exit_code" another one. A "next", which is a `Next`, is the last thing that is said.
        as_json: Print the JSON object as the last line of stdout.
        debug: Let an error through with its traceback.

    Raises:
        typer.Exit: Always, with 0 done, 1 failed, 2 wrong use, 3 kept, 130 interrupted, 143 terminated.
    """
    started = time.monotonic()
    terminated = _on_sigterm()
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", NOISE)  # Ray reads it when it is imported
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Lines()])
    logging.getLogger("pipelines").setLevel(logging.INFO)
    outcome: dict[str, Any] = {"command": command, "status": "failed"}
    try:
        outcome |= {"status": "done"} | body()
        code = outcome.pop("exit_code", 0 if outcome["status"] == "done" else FAILED)
        step = outcome.get("next")
        if step is not None:
            log(f"\nnext, {step.why}:\n  {step}")
            outcome["next"] = str(step)
    except (Exception, KeyboardInterrupt) as error:
        code, outcome["error"] = _explain(command, error, terminated.is_set())
        if debug:
            raise
    outcome["seconds"] = round(time.monotonic() - started, 1)
    if as_json:
        print(json.dumps(finite(outcome), allow_nan=False), flush=True)
    raise typer.Exit(code)


def _on_sigterm() -> threading.Event:
    """Let SIGTERM end a command as Ctrl-C does: a machine that is taken away sends it, and `ray job stop`.

    Returns:
        Set when it came. Ray passes on no other exception than KeyboardInterrupt, so that none could say it.
    """
    came = threading.Event()

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - as Python calls it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked again, it is leaving already
        came.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    return came


def _explain(command: str, error: BaseException, terminated: bool) -> tuple[int, dict[str, str]]:
    """Exit code and error object, after telling the user."""
    code = FAILED
    if isinstance(error, KeyboardInterrupt):
        code, what = (TERMINATED, "terminated") if terminated else (INTERRUPTED, "interrupted")
        shown = UserError(what, where=str(error), remedy="the same command goes on from here")
    elif isinstance(error, UserError):
        code, shown = WRONG_USE if error.wrong_use else FAILED, error
    else:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        shown = UserError(what, where=f"dmtg {command}", remedy="run it again with --debug to see where it failed")
    log(f"\ndmtg {command} stopped\n{shown}")
    if not sys.stderr.isatty():  # a scheduler shows the last line of a log
        log(f"dmtg {command} {'stopped' if code in (INTERRUPTED, TERMINATED) else 'failed'}: {shown.what}")
    return code, shown.to_dict()


def print_table(title: str, rows: Sequence[Mapping[str, Any]], *, right: Sequence[str] = ()) -> None:
    """Rows of equal keys as a table on stderr; columns named in `right` hold numbers."""
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    # a log has no width of its own; a table cut to eighty columns would lose what it is for
    Console(stderr=True, width=None if sys.stderr.isatty() else LOG_WIDTH).print(table)


def number(value: float | None) -> str:
    """A figure with four digits, or a dash where it is not defined."""
    return "–" if value is None else f"{value:.4g}"
