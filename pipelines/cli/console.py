"""Terminal output, JSON output and exit codes of the commands."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TextIO

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cli.stages import naming_imports
from pipelines.errors import UserError, printable, without_credentials
from pipelines.scratch import remove_abandoned

GAP = "  "  # between the columns of a table in a pipe
# a warning of Ray to its driver that users cannot act on: Ray starts some helper processes for each worker
NOISE = "worker processes have been started on node"
FAILED, WRONG_USE, KEPT, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


@dataclass(frozen=True)
class Next:
    """The recommended next command: its purpose and its arguments."""

    purpose: str
    arguments: Sequence[str]

    def __str__(self) -> str:
        return shlex.join(self.arguments)


_json: ContextVar[bool] = ContextVar("json", default=False)  # whether stdout is for the JSON object alone


def log(*lines: str) -> None:
    """Print lines of progress on stderr, in a form that is safe to show."""
    _print(lines, sys.stderr)


def show(*lines: str) -> None:
    """Print lines of a result on stdout, in a form that is safe to show; with `--json` on stderr."""
    _print(lines, _results())


def _print(lines: Sequence[str], stream: TextIO) -> None:
    for line in lines:
        print(printable(without_credentials(line)), file=stream, flush=True)


def _results() -> TextIO:
    """The stream of results."""
    return sys.stderr if _json.get() else sys.stdout


class Lines(logging.Handler):
    """A logging handler that prints with `log`; a handler of a stream would overwrite a live display."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        message = record.getMessage()
        if record.name == "py.warnings":
            message = message.partition("\n  ")[0]  # without the line of code that warns
        log(message.strip(), *(record.exc_text or "").splitlines())


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """A log record without credentials, for the handlers of all libraries."""
    made = logging.LogRecord(*args, **kwargs)
    made.msg, made.args = without_credentials(made.getMessage()), ()
    if made.exc_info:  # a formatter uses the text, if there is one
        made.exc_text = without_credentials(logging.Formatter().formatException(made.exc_info))
    return made


@contextmanager
def safe_output() -> Iterator[None]:
    """Credentials are removed from the log records and warnings of all libraries in the block."""
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_record)
    logging.captureWarnings(capture=True)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        logging.captureWarnings(capture=False)


def run(command: str, body: Callable[[], dict[str, Any]], *, as_json: bool, debug: bool, reads: str = "") -> None:
    """Run a command's body and exit with its exit code.

    The first line is printed before anything that takes time: packages are imported in the body.

    Args:
        command: Name of the command.
        body: The work of the command. It returns the fields of the JSON object. If "status" is "failed" the exit
            code is 1; "exit_code" sets another one. "next" is a `Next`, which is printed last.
            "answered" is called after everything has been printed.
        as_json: Print the JSON object as the last line of stdout.
        debug: Raise an error with its traceback.
        reads: What the command reads first; a part of the first line.

    Raises:
        typer.Exit: Always. The code is 0 done, 1 failed, 2 wrong use, 3 kept, 130 interrupted, 143 terminated.
    """
    started = time.monotonic()
    log(f"dmtg {command}: reading {reads}" if reads else f"dmtg {command}")
    terminated = _on_sigterm()
    remove_abandoned()
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", NOISE)  # Ray reads it when it is imported
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Lines()])
    for name in ("pipelines", "dmtg_core.network.batched.choice"):
        logging.getLogger(name).setLevel(logging.INFO)
    outcome: dict[str, Any] = {"command": command, "status": "failed"}
    token = _json.set(as_json)
    answered: Callable[[], None] | None = None
    try:
        with safe_output(), naming_imports(log):
            outcome |= {"status": "done"} | body()
        code = outcome.pop("exit_code", 0 if outcome["status"] == "done" else FAILED)
        answered = outcome.pop("answered", None)
        step = outcome.get("next")
        if step is not None:
            log("", f"next: {step.purpose}", f"  {step}")
            outcome["next"] = str(step)
    except (Exception, KeyboardInterrupt) as error:
        code, outcome["error"] = _explain(command, error, terminated.is_set())
        if debug:
            raise
    finally:
        _json.reset(token)
    outcome["seconds"] = round(time.monotonic() - started, 1)
    if as_json:
        from pipelines.storage import finite

        print(json.dumps(finite(outcome), allow_nan=False), flush=True)
    if answered is not None:
        answered()
    raise typer.Exit(code)


def _on_sigterm() -> threading.Event:
    """Make SIGTERM interrupt a command as Ctrl-C does. `ray job stop` and preempted machines send SIGTERM.

    Returns:
        An event that is set when SIGTERM arrives. It exists because Ray passes on no exception but
        KeyboardInterrupt, so the exception cannot tell the two signals apart.
    """
    received = threading.Event()

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - as Python calls it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the command is ending already
        received.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    return received


def _explain(command: str, error: BaseException, terminated: bool) -> tuple[int, dict[str, str]]:
    """Log an error; its exit code and JSON object."""
    code = FAILED
    if isinstance(error, KeyboardInterrupt):
        code, what = (TERMINATED, "terminated") if terminated else (INTERRUPTED, "interrupted")
        shown = UserError(what, where=str(error), remedy="run the same command again to resume")
    elif isinstance(error, UserError):
        code, shown = WRONG_USE if error.wrong_use else FAILED, error
    elif isinstance(error, ModuleNotFoundError) and _of_an_extra(error):
        shown = UserError(f"dmtg {command} needs the package {error.name}", where=f"Python at {sys.executable}",
                          remedy="pip install 'dmtg[pipelines]', or the extra of this part")  # fmt: skip
    else:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        shown = UserError(what, where=f"dmtg {command}", remedy="run it again with --debug to see where it failed")
    log("", f"dmtg {command} stopped", *str(shown).split("\n"))
    if not sys.stderr.isatty():  # schedulers show the last line of a log
        log(f"dmtg {command} {'stopped' if code in (INTERRUPTED, TERMINATED) else 'failed'}: {shown.what}")
    return code, shown.to_dict()


def _of_an_extra(error: ModuleNotFoundError) -> bool:
    """Whether a module that is missing is none of ours."""
    return (error.name or "").partition(".")[0] not in ("", "pipelines", "dmtg_core")


def print_table(title: str, rows: Sequence[Mapping[str, Any]], *, right: Sequence[str] = ()) -> None:
    """Print rows with equal keys as a table, which is a result.

    A terminal gets a table with lines, any other reader aligned text of any width.

    Args:
        title: Title of the table.
        rows: The rows.
        right: Columns that are right-aligned.
    """
    stream = _results()
    if not stream.isatty():
        show(title, *_aligned(rows, right), "")
        return
    table = Table(title=_cell(title), title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(_cell(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(file=stream).print(table)


def _aligned(rows: Sequence[Mapping[str, Any]], right: Sequence[str]) -> list[str]:
    """The names of the columns and the rows, as lines whose cells are aligned in a terminal."""
    names = list(rows[0]) if rows else []
    lines = [[_cell(value).plain for value in cells] for cells in (names, *(row.values() for row in rows))]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return [
        GAP.join(_padded(cell, width, right=name in right)
                 for cell, width, name in zip(cells, widths, names, strict=True)).rstrip()
        for cells in lines
    ]  # fmt: skip


def _padded(cell: str, width: int, *, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def _cell(value: object) -> Text:
    """A value as it is: a name in square brackets is no markup."""
    return Text(printable(without_credentials(str(value))))
