"""Ends a process at a chosen one of its writes: to the registry, to MLflow, to storage, or to a webhook.

In a process of tests the end is an error after which nothing more is written. As a script it is SIGKILL:

    python -m tests.pipelines.kill_points LIST NUMBER -- <arguments of dmtg>

LIST is a file that receives a line for each write. The process is killed at the write with this number, before it
is carried out; a NUMBER that is not reached kills nothing.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CLIENT = (
    "create_run", "update_run", "set_terminated", "set_tag", "log_batch", "log_inputs", "log_outputs", "log_text",
    "log_artifact", "log_model_artifacts", "finalize_logged_model", "delete_logged_model",
    "create_registered_model", "create_model_version", "set_model_version_tag", "set_registered_model_tag",
    "delete_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias",
)  # fmt: skip
WRITES = (
    *(f"mlflow:MlflowClient.{name}" for name in CLIENT),
    "mlflow:initialize_logged_model",
    *(f"pipelines.storage:Location.{name}" for name in ("write_bytes", "write_file", "create", "delete")),
    "pipelines.nightly.publish:send",
)


class KilledError(BaseException):
    """The process ends."""


class KillPoints:
    """Lists writes, and ends the process at one of them.

    Args:
        end: Called at the chosen write.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self.end, self.at, self.calls, self.inside = end, None, [], False
        self.note: Callable[[str], object] = lambda _: None

    at: int | None
    calls: list[str]

    def wrap(self, name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted. Calls inside another one, and those of other threads, are not."""

        @functools.wraps(write)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.inside or threading.current_thread() is not threading.main_thread():
                return write(*args, **kwargs)
            if self.at is not None and len(self.calls) >= self.at:
                self.end()
            place = next((str(value) for value in args if type(value).__name__ == "Location"), "")
            self.calls.append(f"{name} {Path(place).name}".strip())
            self.note(self.calls[-1])
            self.inside = True
            try:
                return write(*args, **kwargs)
            finally:
                self.inside = False

        return counted

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Count all `WRITES`."""
        for spec in WRITES:
            module, _, qualified = spec.partition(":")
            *path, last = qualified.split(".")
            owner = functools.reduce(getattr, path, importlib.import_module(module))
            patch.setattr(owner, last, self.wrap(last, getattr(owner, last)))

    def ended(self, body: Callable[[], object], at: int | None) -> bool:
        """Call `body`, and end it at a write; whether it ended before it returned."""
        self.at, self.calls = at, []
        try:
            body()
        except KilledError:
            return True
        finally:
            self.at = None
        return False


@contextmanager
def kill_points() -> Iterator[KillPoints]:
    """Kill points in this process."""

    def end() -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        points = KillPoints(end)
        points.patch(patch)
        yield points


def main() -> None:
    """Run `dmtg` in this process, and kill it."""
    listing, number, _, *arguments = sys.argv[1:]
    points = KillPoints(lambda: os.kill(os.getpid(), signal.SIGKILL))
    points.at = int(number)
    with pytest.MonkeyPatch.context() as patch, Path(listing).open("w", encoding="utf-8", buffering=1) as file:
        points.note = lambda call: file.write(f"{call}\n")
        points.patch(patch)
        sys.argv = ["dmtg", *arguments]
        importlib.import_module("pipelines.cli.app").main()


if __name__ == "__main__":
    main()
