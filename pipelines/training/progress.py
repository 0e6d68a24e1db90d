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
from dmtg_core.search.options import BASELINE
from pipelines.config.loading import Config

Record = Mapping[str, Any]
SPEED_S = 600.0  # the remaining time is estimated from the mean speed over so many seconds


@dataclass(frozen=True)
class Plan:
    """The length of a run, and how much of it is done.

    Args:
        epochs: Epochs of naive MTL.
        baseline: Whether naive MTL is trained as the baseline.
        budget: Budget of the search in runs of naive MTL; None for a search of fixed length.
        starts: Gates of a search of fixed length, in the order in which they are trained.
        search: Epochs of each gate before the best one is fine-tuned.
    """

    epochs: int
    baseline: bool
    budget: float | None
    starts: tuple[str, ...]
    search: int

    @classmethod
    def of(cls, config: Config, spec: NetworkSpec) -> Plan:
        """The plan of a configuration."""
        settings, options = config.settings(), config.search_options()
        budget = options.runs(spec.groups)
        starts = tuple(options.candidates(spec)) if budget is None else ()
        return cls(settings.epochs, config.search.baseline, budget, starts, settings.search_epochs)

    @property
    def total(self) -> float:
        """The most training: in runs of naive MTL with a budget, else in epochs."""
        if self.budget is not None:
            return self.budget + self.baseline
        return (self.baseline + 1) * self.epochs + (len(self.starts) - 1) * self.search

    def done(self, record: Record) -> float:
        """The training until the end of an epoch, in the unit of `total`. Epochs that a stage left out count."""
        stage, epoch = record["stage"], record["epoch"]
        if self.budget is not None:
            done = epoch / self.epochs if stage == BASELINE else self.baseline + record["spent"]
        elif stage == BASELINE:
            done = epoch
        else:
            before = self.starts.index(stage) if epoch <= self.search else len(self.starts) - 1
            done = self.baseline * self.epochs + before * self.search + epoch
        return float(min(done, self.total))

    def next_epoch(self, records: Sequence[Record]) -> float:
        """Length of the current epoch, if it is as long as the last one or else as one of naive MTL."""
        if len(records) > 1 and records[-1]["stage"] == records[-2]["stage"]:
            return self.done(records[-1]) - self.done(records[-2])
        return 1.0 if self.budget is None else 1 / self.epochs

    def text(self, done: float) -> str:
        """What is done, as text."""
        if self.budget is not None:
            return f"{done:.1f} of {self.total:.3g} runs of naive MTL"
        return f"epoch {min(int(done) + 1, int(self.total))} of {self.total:.0f}"


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
    """A bar over the whole training, and the metrics of the last epoch.

    Args:
        plan: The length of the run.
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
        self.task = self.bar.add_task("starting", total=plan.total, step="")
        self.known, self.stale, self.most = 0, (0, 0), 0.0

    def show(self, records: Sequence[Record], gate: Sequence[Record], current: tuple[int, int]) -> None:
        """See `Display`."""
        if len(records) != self.known:  # the reported step belongs to the epoch that has ended
            self.known, self.stale = len(records), current
        step, steps = (0, 0) if current == self.stale else current
        done = self.plan.done(records[-1]) if records else 0.0
        done += self.plan.next_epoch(records) * step / steps if steps else 0.0
        self.most = min(max(done, self.most), self.plan.total)  # it does not go back
        self.bar.figures = figures(records[-1], gate) if records else ""
        self.bar.update(
            self.task, completed=self.most, step=f"step {step} of {steps}" if steps else "",
            description=self.plan.text(self.most),
        )  # fmt: skip

    def end(self) -> None:
        """Show a run that has ended: it can take less training than its plan allows."""
        self.bar.update(self.task, completed=self.plan.total, step="", description="done")


def figures(record: Record, gate: Sequence[Record]) -> str:
    """The last epoch in one line: stage, loss, entropy of the gate, current groups, speed."""
    loss = sum(record["train_loss"].values()) / len(record["train_loss"])
    parts = [f"{record['stage']} epoch {record['epoch']}: loss {loss:.4g}"]
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
        live.end()
