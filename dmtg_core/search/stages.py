"""`Stages`: what the searches share: their state, the training of a stage with checkpoints, and costs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.budget import Budget
from dmtg_core.search.options import BASELINE, GUIDED, SearchOptions
from dmtg_core.search.state import SearchState
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import Hooks, advance, evaluate_splits, generalisation_gap
from dmtg_core.training.metrics import Metrics, normalized_gain
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from dmtg_core.training.warm_start import WarmStart


class Stages:
    """A search as a sequence of stages. After each epoch its state is reported to the context.

    Every decision follows from the state, so that an interrupted search resumes with the same result.

    Args:
        spec, data, settings, options, baseline, splits, context, warm_start: As for `search`.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        data: Data,
        settings: TrainSettings,
        options: SearchOptions,
        baseline: bool,
        splits: Sequence[str],
        context: TrainContext,
        warm_start: WarmStart | None,
    ) -> None:
        self.spec, self.data, self.settings, self.options = spec, data, settings, options
        self.baseline, self.splits, self.context, self.warm_start = baseline, splits, context, warm_start
        champion = warm_start is not None and warm_start.is_grouping(spec.tasks)
        self.candidates = options.candidates(spec, champion=champion)
        self.budget = Budget(spec, settings, options.runs(spec.groups) or math.inf)
        # through JSON, as in the checkpoint: tuples become lists
        described = {
            "network": spec.to_dict(), "settings": asdict(settings), "options": asdict(options),
            "stages": [BASELINE] * baseline + self.candidates,
        }  # fmt: skip
        plan = json.loads(json.dumps(described))
        if warm_start is not None:
            warm_start.check(spec)
            plan["warm_start"] = warm_start.digest()
        latest = context.latest()
        self.state, self.active = SearchState(plan), ""
        if latest is not None:
            self.state = SearchState.load(latest, plan, settings, context.device)

    def done(self, name: str) -> bool:
        """Whether a stage has ended."""
        return any(result["stage"] == name for result in self.state.results)

    def result(self, name: str) -> dict[str, Any]:
        """Return the last result of a stage."""
        return next(result for result in reversed(self.state.results) if result["stage"] == name)

    @property
    def spent(self) -> float:
        """Training so far in runs of naive MTL, without the baseline."""
        counted = {BASELINE, *self.state.held, *([self.active] if self.state.current else [])}
        ended = sum(one.get("cost", 0.0) for one in self.state.results if one["stage"] not in counted)
        states = [*self.state.held.values(), *([self.state.current] if self.state.current else [])]
        return float(ended + sum(self.budget.of(state.network.spec, state.history) for state in states))

    def train_baseline(self) -> None:
        """Train naive MTL for all epochs, if it is wanted and has not been trained."""
        if not self.baseline or self.done(BASELINE):
            return
        shared = self.warm_start if self.warm_start is not None and self.warm_start.single else None
        state = self.current(replace(self.spec, groups=1, sampling="fixed"), shared)
        advance(
            state, self.data, self.settings, self.context, until=self.settings.epochs, hooks=self.reports(BASELINE)
        )
        state.take_best()
        self.state.trained[BASELINE] = state.network
        gap = generalisation_gap(state.history[-1])
        self.end(BASELINE, state, final=state.best_score, gap=gap, metrics=self.evaluate(state.network))

    def evaluate(self, network: GroupingNetwork) -> dict[str, Metrics]:
        """Compute the metrics of a network on all splits."""
        return evaluate_splits(network, self.data, self.splits, self.settings, self.context)

    def current(
        self, spec: NetworkSpec, warm_start: WarmStart | None, settings: TrainSettings | None = None
    ) -> TrainState:
        """Return the state of the stage: from the checkpoint, or fresh."""
        if self.state.current is None:
            network = GroupingNetwork(spec)
            if warm_start is not None:
                warm_start.apply(network)
            network.to(self.context.device)
            self.state.current = TrainState.fresh(network, settings or self.settings)
        return self.state.current

    def reports(self, stage: str) -> Hooks:
        """Return the hooks that report metrics and checkpoints of a stage, which is trained next."""
        self.active = stage

        def epoch(state: TrainState) -> None:
            record = {"stage": stage, "spent": self.spent if stage != BASELINE else 0.0, **state.history[-1]}
            self.context.report(record | {"gain": self._gain(record["val"])}, self.state.save)

        return Hooks(
            on_epoch=epoch,
            on_step=lambda _: self.context.report(None, self.state.save),
            proposed=stage == GUIDED,
        )

    def _gain(self, metrics: Metrics) -> float | None:
        """The gain of validation metrics over naive MTL in per cent; None before naive MTL has been trained."""
        if not self.done(BASELINE) or "val" not in self.splits:
            return None
        return normalized_gain(self.spec.tasks, metrics, self.result(BASELINE)["metrics"]["val"])

    def end(self, name: str, state: TrainState, **found: Any) -> None:
        """Append the result of a stage."""
        result = {
            "stage": name,
            "epochs": state.epoch,
            "score": state.history[-1]["val_score"],
            "grouping": state.network.grouping().to_dict(),
            "cost": self.budget.of(state.network.spec, state.history),
        }
        self.state.results.append(result | found)
        self.state.current = None
