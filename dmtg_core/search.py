"""The whole run: naive MTL to compare with, several starts of the gate, and fine-tuning of the best one.

One start follows the paper. Because a single run can lock into an early accident, several can be made; the one
whose pruned network has the best validation score goes on, the others stop where the search ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dmtg_core import checkpoint
from dmtg_core.context import LocalContext, TrainContext
from dmtg_core.data import Data
from dmtg_core.grouping import Grouping
from dmtg_core.metrics import Metrics
from dmtg_core.network import GroupingNetwork, NetworkSpec
from dmtg_core.settings import TrainSettings
from dmtg_core.training import TrainState, advance, evaluate
from dmtg_core.warm_start import WarmStart

BASELINE, FINETUNE = "naive_mtl", "finetune"


@dataclass
class SearchState:
    """Where a search stands: what a checkpoint holds.

    `results` has an entry for each finished stage, in order: its name, score, grouping and metrics by split.
    `plan` is what the search was asked for; a checkpoint of another plan is refused.
    """

    plan: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    current: TrainState | None = None
    leader: TrainState | None = None
    leader_score: float = math.inf

    def save(self, folder: Path) -> None:
        """Write everything into `folder`."""
        described: dict[str, Any] = {
            "plan": self.plan,
            "results": self.results,
            "leader_score": self.leader_score if math.isfinite(self.leader_score) else None,
        }
        for name, state in (("current", self.current), ("leader", self.leader)):
            described[name] = state is not None
            if state is not None:
                state.save(folder / name)
        checkpoint.write_json(folder / "search.json", described)

    @classmethod
    def load(
        cls, folder: Path, plan: dict[str, Any], settings: TrainSettings, device: torch.device
    ) -> SearchState:
        """Read what `save` wrote.

        Raises:
            ValueError: When a file is missing or damaged, or the checkpoint is of another plan.
        """
        described = checkpoint.read_json(
            folder / "search.json", "plan", "results", "leader_score", "current", "leader"
        )
        if described["plan"] != plan:
            held = described["plan"]
            changed = sorted(key for key in {*plan, *held} if plan.get(key) != held.get(key))
            raise ValueError(f"{folder}: checkpoint of another search, differing in {', '.join(changed)}")
        score = described["leader_score"]
        held = {
            name: TrainState.load(folder / name, settings, device) if described[name] else None
            for name in ("current", "leader")
        }
        leader_score = math.inf if score is None else score
        return cls(plan, described["results"], held["current"], held["leader"], leader_score)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        network: The hard network with the weights of its best epoch, in evaluation mode.
        grouping: Its grouping.
        metrics: Split → task → metric → value.
        baseline: The same of naive MTL; empty when it was not asked for.
        starts: For each start: score, grouping and validation metrics at the end of its search.
    """

    network: GroupingNetwork
    grouping: Grouping
    metrics: dict[str, Metrics]
    baseline: dict[str, Metrics]
    starts: list[dict[str, Any]]


def search(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    *,
    starts: int = 1,
    baseline: bool = True,
    splits: Sequence[str] = ("val", "test"),
    context: TrainContext | None = None,
    warm_start: WarmStart | None = None,
) -> SearchResult:
    """Find a grouping and train its networks; goes on from the context's latest checkpoint.

    Args:
        spec: The grouping network. Start i has seed `spec.seed + i`.
        starts: Searches of `settings.search_epochs` epochs; the best by validation is fine-tuned to the end.
        baseline: Train naive MTL (one branch, all epochs) first, to compare with.
        splits: What the finished networks are evaluated on. Choices use "val" alone.
        warm_start: What every start begins with. Naive MTL begins with it too when it is a single model; no
            one of several models could stand for all of them, so it then begins afresh.

    Raises:
        NonFiniteLossError: When the loss stops being finite.
        ValueError: For a number of starts below 1, a warm start that does not fit, or a checkpoint that is
            damaged.
    """
    if starts < 1:
        raise ValueError(f"starts must be at least 1, got {starts}")
    return _Search(spec, data, settings, starts, baseline, splits, context or LocalContext(), warm_start).run()


class _Search:
    def __init__(
        self,
        spec: NetworkSpec,
        data: Data,
        settings: TrainSettings,
        starts: int,
        baseline: bool,
        splits: Sequence[str],
        context: TrainContext,
        warm_start: WarmStart | None,
    ) -> None:
        self.spec, self.data, self.settings, self.warm_start = spec, data, settings, warm_start
        self.splits, self.context = splits, context
        self.stages: list[tuple[str, Callable[[str], None]]] = [(BASELINE, self._baseline)] if baseline else []
        self.stages += [(f"start_{i}", self._start) for i in range(starts)]
        self.stages.append((FINETUNE, self._finetune))
        stages = [name for name, _ in self.stages]
        # through JSON, as the checkpoint has it: tuples become lists
        plan = json.loads(json.dumps({"network": spec.to_dict(), "settings": asdict(settings), "stages": stages}))
        if warm_start is not None:
            warm_start.check(spec)
            plan["warm_start"] = warm_start.digest()
        latest = context.latest()
        self.state = SearchState(plan)
        if latest is not None:
            self.state = SearchState.load(latest, plan, settings, context.device)

    def run(self) -> SearchResult:
        for name, stage in self.stages[len(self.state.results) :]:
            stage(name)
        assert self.state.current is not None
        by_name = {result["stage"]: result for result in self.state.results}
        network = self.state.current.network
        return SearchResult(
            network=network.eval(),
            grouping=network.grouping(),
            metrics=by_name[FINETUNE]["metrics"],
            baseline=by_name.get(BASELINE, {}).get("metrics", {}),
            starts=[result for result in self.state.results if result["stage"].startswith("start_")],
        )

    def _baseline(self, name: str) -> None:
        shared = self.warm_start if self.warm_start is not None and self.warm_start.single else None
        state = self._current(replace(self.spec, groups=1, sampling="fixed"), shared)
        self._advance(name, state, self.settings, self.settings.epochs)
        state.take_best()
        self._finish_stage(name, state, self.splits)

    def _start(self, name: str) -> None:
        number = int(name.removeprefix("start_"))
        state = self._current(replace(self.spec, seed=self.spec.seed + number), self.warm_start)
        seeded = replace(self.settings, seed=self.settings.seed + number)
        self._advance(name, state, seeded, self.settings.search_epochs)
        score = state.history[-1]["val_score"]
        if score < self.state.leader_score or self.state.leader is None:
            self.state.leader, self.state.leader_score = state, score
        self._finish_stage(name, state, ())

    def _finetune(self, name: str) -> None:
        if self.state.current is None:
            assert self.state.leader is not None
            self.state.current, self.state.leader = self.state.leader, None
        state = self.state.current
        self._advance(name, state, self.settings, self.settings.epochs)
        state.take_best()
        state.keep(state.network.gate.survivors(2.0), self.settings)
        self._finish_stage(name, state, self.splits, last=True)

    def _current(self, spec: NetworkSpec, warm_start: WarmStart | None) -> TrainState:
        """The stage's state: taken up from the checkpoint, or fresh."""
        if self.state.current is None:
            network = GroupingNetwork(spec)
            if warm_start is not None:
                warm_start.give(network)
            network.to(self.context.device)
            self.state.current = TrainState.fresh(network, self.settings)
        return self.state.current

    def _advance(self, stage: str, state: TrainState, settings: TrainSettings, until: int) -> None:
        advance(
            state, self.data, settings, self.context, until=until,
            on_epoch=lambda s: self.context.report({"stage": stage, **s.history[-1]}, self.state.save),
            on_step=lambda _: self.context.report(None, self.state.save),
        )  # fmt: skip

    def _finish_stage(self, name: str, state: TrainState, splits: Sequence[str], *, last: bool = False) -> None:
        metrics = {split: evaluate(state.network, self.data, split, context=self.context) for split in splits}
        grouping = state.network.grouping().to_dict()
        score = state.history[-1]["val_score"]
        self.state.results.append({"stage": name, "score": score, "grouping": grouping, "metrics": metrics})
        if not last:
            self.state.current = None
