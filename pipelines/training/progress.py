"""The progress bar of a run on a terminal. A log file has only the lines of `monitor`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.options import AFFINITY, BASELINE, DISTILLED, GUIDED, RETRAINED, WIDE
from pipelines.config.loading import Config

Record = Mapping[str, Any]
SPEED_S = 600.0  # the remaining time is estimated from the mean speed over so many seconds


@dataclass(frozen=True)
class Plan:
    """The epochs of all stages of a search.

    Args:
        stages: Stages before the candidates, with the most epochs of each.
        candidates: Candidates in the order in which they are trained.
        search: Epochs of a candidate's search phase.
        rest: Epochs of a candidate after its search phase.
        finalists: The most candidates that can be trained to their end.
        retrained: Epochs of groups that may be trained from scratch; 0 if they never are.
        distilled: Epochs of the distillation; 0 for none.
    """

    stages: tuple[tuple[str, int], ...]
    candidates: tuple[str, ...]
    search: int
    rest: int
    finalists: int
    retrained: int
    distilled: int

    @classmethod
    def of(cls, config: Config, spec: NetworkSpec) -> Plan:
        """The plan of a configuration."""
        settings, options = config.settings(), config.search_options()
        candidates = tuple(options.candidates(spec))
        stages = [(BASELINE, settings.epochs)] if config.search.baseline else []
        stages += [(AFFINITY, options.affinity_epochs(settings)[1])] if GUIDED in candidates else []
        several = options.method == "guided" and len(candidates) > 1
        return cls(
            tuple(stages),
            candidates,
            settings.search_epochs,
            settings.epochs - settings.search_epochs,
            len(candidates) if options.method == "guided" else 1,
            settings.epochs if several and options.retrain and WIDE in candidates else 0,
            options.distilled(settings).epochs if several and options.distil_share else 0,
        )

    def total(self, records: Sequence[Record]) -> int:
        """The most epochs of the run, given the epochs so far: stages can end early and candidates can stop."""
        most = (
            sum(self._stage_epochs(name, epochs, records) for name, epochs in self.stages)
            + len(self.candidates) * self.search
        )
        most += self.finalists * self.rest + self.distilled
        if self.finalists == 1:
            return most
        finished = [name for name in self.candidates if self._is_finalist(name, records)]
        last = records[-1]["stage"] if records else ""
        if last != DISTILLED or any(record["stage"] == RETRAINED for record in records):
            most += self.retrained
        passed = self.candidates if last in (RETRAINED, DISTILLED) else self.candidates[: self._place(finished)]
        stopped = sum(self._missing(name, records) for name in (*finished, RETRAINED) if name != last)
        return most - stopped - self.rest * sum(name not in finished for name in passed)

    def epochs_of(self, record: Record) -> int:
        """Epochs of the stage of a record."""
        if record["stage"] == DISTILLED:
            return self.distilled
        if record["stage"] == RETRAINED:
            return self.retrained
        return dict(self.stages).get(record["stage"], self.search + self.rest)

    def _stage_epochs(self, name: str, most: int, records: Sequence[Record]) -> int:
        """Epochs of a stage before the candidates, which may end early."""
        own = sum(record["stage"] == name for record in records)
        return own if own and records[-1]["stage"] != name else most

    def _missing(self, name: str, records: Sequence[Record]) -> int:
        """Epochs by which a stage ended early."""
        own = [record for record in records if record["stage"] == name]
        return self.epochs_of(own[-1]) - len(own) if own else 0

    def _is_finalist(self, name: str, records: Sequence[Record]) -> bool:
        return any(record["stage"] == name and record["epoch"] > self.search for record in records)

    def _place(self, finished: Sequence[str]) -> int:
        return self.candidates.index(finished[-1]) if finished else 0


class Display(Protocol):
    """What a monitor shows below the lines that it prints."""

    live: bool

    def show(self, records: Sequence[Record], gate: Sequence[Record], current: tuple[int, int]) -> None:
        """Show all epochs so far, the gate's probabilities, and step and steps of the current epoch."""
        ...


class NoDisplay:
    """No display."""

    live = False

    def show(self, records: Sequence[Record], gate: Sequence[Record], current: tuple[int, int]) -> None:
        """Do nothing."""


class _Bar(Progress):
    """A bar with a line of figures below it."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures, style="dim", overflow="ellipsis", no_wrap=True)


class LiveDisplay:
    """A bar over all epochs, and the metrics of the last one.

    Args:
        plan: The epochs of the run.
        console: The terminal.
    """

    live = True

    def __init__(self, plan: Plan, console: Console) -> None:
        columns: tuple[str | ProgressColumn, ...] = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[step]}"), TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        self.plan = plan
        self.bar = _Bar(
            *columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=2,
            speed_estimate_period=SPEED_S,
        )  # fmt: skip
        self.task = self.bar.add_task("starting", total=plan.total(()), step="")
        self.known, self.stale = 0, (0, 0)

    def show(self, records: Sequence[Record], gate: Sequence[Record], current: tuple[int, int]) -> None:
        """See `Display`."""
        if len(records) != self.known:  # the reported step belongs to the epoch that has ended
            self.known, self.stale = len(records), current
        step, steps = (0, 0) if current == self.stale else current
        total = self.plan.total(records)
        done = len(records) + (step / steps if steps else 0)
        self.bar.figures = figures(self.plan, records[-1], gate) if records else ""
        self.bar.update(
            self.task, total=total, completed=done, step=f"step {step} of {steps}" if steps else "",
            description=f"epoch {min(len(records) + 1, total)} of {total}",
        )  # fmt: skip


def figures(plan: Plan, record: Record, gate: Sequence[Record]) -> str:
    """The last epoch in one line: stage, loss, entropy of the gate, current groups, speed."""
    loss = sum(record["train_loss"].values()) / len(record["train_loss"])
    parts = [f"{record['stage']} {record['epoch']} of {plan.epochs_of(record)}: loss {loss:.4g}"]
    key = (record["stage"], record["epoch"])
    rows = next((g["probabilities"] for g in reversed(gate) if (g["stage"], g["epoch"]) == key), [[1.0]])
    if len(rows[0]) > 1:
        groups = len({int(np.argmax(row)) for row in rows})
        parts.append(f"gate entropy {record['gate']['entropy']:.2f}, {groups} group{'s' * (groups > 1)} so far")
    return ", ".join([*parts, f"{record['samples_per_second']:.0f} samples/s"])


@contextmanager
def display(plan: Plan) -> Iterator[Display]:
    """A live display for the time of the block if stderr is a terminal; printed lines appear above it."""
    if not sys.stderr.isatty():
        yield NoDisplay()
        return
    live = LiveDisplay(plan, Console(stderr=True))
    with live.bar:
        yield live
