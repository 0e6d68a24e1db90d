"""A pool of long-lived processes of this machine: each imports PyTorch once and then calls functions.

`concurrent.futures` gives up every task if one process is lost. This pool starts another process and repeats only
the task of the lost one.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from pipelines.execution.errors import LostProcessError
from pipelines.execution.executor import Outcome

ANSWER, DONE, FAILED = "answer", "done", "failed"
EXIT_S = 5.0
QUICK_EXIT = "pipelines.execution.quick_exit"  # a module that only the server of forks may import
_driver: Connection | None = None  # in a process of the pool: the connection to the driver


def ask(value: Any) -> Any:
    """Send a value to the driver from within a task, and return the driver's answer.

    Only for functions that run in a pool whose `run` has a callback for such values.
    """
    assert _driver is not None
    _driver.send((ANSWER, value))
    return _driver.recv()


@dataclass
class _Member:
    """A process of the pool, the connection to it, and the index of its task."""

    process: Any
    connection: Connection
    task: int | None = None


class _Tasks:
    """The items of a run, and the indices of those that have not started."""

    def __init__(self, items: list[Any], more: Callable[[], Any] | None) -> None:
        self.items, self.more, self.todo = items, more, deque(range(len(items)))

    def has_next(self) -> bool:
        """Whether there is an item to start; a further one is requested if there is none."""
        if not self.todo and self.more is not None and (item := self.more()) is not None:
            self.todo.append(len(self.items))
            self.items.append(item)
        return bool(self.todo)


def preload(imports: Sequence[str]) -> None:
    """Start to import PyTorch and the modules of tasks in the background, for the processes of a later `Pool`.

    They are forks of the process that imports. It serves all pools of this process, and its first imports count.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([QUICK_EXIT, "torch", *imports])
    forkserver.ensure_running()


class Pool:
    """Processes that call functions.

    Args:
        size: Largest number of processes.
        retries: How many times a task is repeated whose process was lost.
        imports: Modules of the tasks. The processes are forks of one that has imported them.
    """

    def __init__(self, size: int, retries: int = 0, imports: Sequence[str] = ()) -> None:
        self.size, self.retries = size, retries
        self.context = multiprocessing.get_context("forkserver")
        preload(imports)
        self.members: list[_Member] = []
        self.starting = threading.Thread(target=self._start_first, daemon=True)

    def start(self) -> None:
        """Start the first process in the background, which imports the modules meanwhile."""
        self.starting.start()

    def _start_first(self) -> None:
        self.members.append(self._new())

    def run(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        answer: Callable[[int, Any], Any] | None = None,
        more: Callable[[], Any] | None = None,
    ) -> Iterator[Outcome]:
        """Call a function with each item; yields the outcomes as they come.

        Args:
            function: Called in a process of the pool. It and the items can be pickled.
            items: The items.
            answer: Answers a value that a task sends by `ask`, given the index of its item.
            more: Returns a further item when a process is free, or None if there is none at present.
        """
        self._wait_for_first()
        tasks = _Tasks(list(items), more)
        losses: Counter[int] = Counter()
        while True:
            self._assign(function, tasks)
            busy = {member.connection: member for member in self.members if member.task is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                member = busy[cast("Connection", connection)]
                outcome = self._receive(member, answer)
                if outcome is not None and isinstance(outcome.error, LostProcessError):
                    losses[outcome.index] += 1
                    if losses[outcome.index] <= self.retries:
                        tasks.todo.appendleft(outcome.index)
                        continue
                if outcome is not None:
                    yield outcome

    def _receive(self, member: _Member, answer: Callable[[int, Any], Any] | None) -> Outcome | None:
        """The outcome of a process's task; None if it has asked something, which is answered."""
        index = member.task
        assert index is not None
        try:
            kind, value = member.connection.recv()
        except (EOFError, OSError):
            self._remove(member)
            return Outcome(index, error=LostProcessError(_lost(member.process)))
        if kind == ANSWER:
            assert answer is not None
            answered = answer(index, value)
            with suppress(OSError):  # a process that has been lost meanwhile is found by the next `recv`
                member.connection.send(answered)
            return None
        member.task = None
        return Outcome(index, value) if kind == DONE else Outcome(index, error=value)

    def _assign(self, function: Callable[[Any], Any], tasks: _Tasks) -> None:
        while True:
            free = next((member for member in self.members if member.task is None), None)
            if (free is None and len(self.members) >= self.size) or not tasks.has_next():
                return
            if free is None:
                free = self._new()
                self.members.append(free)
            try:
                free.connection.send((function, tasks.items[tasks.todo[0]]))
            except OSError:  # it was lost while it waited for a task
                self._remove(free)
                continue
            free.task = tasks.todo.popleft()

    def _wait_for_first(self) -> None:
        if self.starting.is_alive():
            self.starting.join()

    def _new(self) -> _Member:
        ours, theirs = self.context.Pipe()
        # the server of forks has the environment of its own start, which may be that of an earlier pool
        process = self.context.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process ends the connection
        return _Member(process, ours)

    def _remove(self, member: _Member) -> None:
        self.members.remove(member)
        member.connection.close()
        member.process.join(EXIT_S)

    def close(self) -> None:
        """End all processes. A task that has not ended is stopped."""
        self._wait_for_first()
        for member in self.members:
            member.connection.close()  # a process that waits for a task ends by itself
            if member.task is not None:
                member.process.terminate()
        for member in self.members:
            member.process.join(EXIT_S)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
        self.members.clear()


def _lost(process: Any) -> str:
    code = process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    return f"its process was lost ({how}); the system ends processes like this when memory runs out"


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """Call functions until the driver closes the connection; the main function of a process of the pool."""
    global _driver  # noqa: PLW0603 - a process has one driver
    os.environ.clear()
    os.environ.update(environment)
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the driver ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    torch.set_num_threads(1)  # there is a process for each core
    _driver = connection
    while True:
        try:
            function, item = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(function, item))


def _outcome(function: Callable[[Any], Any], item: Any) -> tuple[str, Any]:
    try:
        return DONE, function(item)
    except Exception as error:  # noqa: BLE001 - the driver decides
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
        except Exception:  # noqa: BLE001 - an error of any library
            return FAILED, RuntimeError(f"{type(error).__name__}: {error}")
        return FAILED, error


def _end_with_driver() -> None:
    """End this process when its driver is gone: its work would go on beside that of the next command."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)
