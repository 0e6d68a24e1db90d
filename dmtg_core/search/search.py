"""`search`: naive MTL as the baseline, candidates for the grouping, and distillation of the best candidate.

The method "dmtg" follows the paper: gates that start uniform. A single run can converge to a poor grouping, so
several starts are possible. The one whose pruned network has the best validation score is trained to the end.

The method "guided" has more candidates. One wide branch for all tasks is trained until the groups of its
`feature_overlap` have converged. One gate starts at these groups. Further gates start uniform, because tasks
without conflicts gain more from sharing for a longer time than from any grouping. One wide encoder has the
inference cost of all branches, because no grouping is better if only capacity matters. Candidates with a much
worse score at the end of the search are stopped. If the wide encoder is the best at the end, the groups of the
best gate are trained once from scratch, because the weights that a gate ends with can be poor for good groups.
Finally all trained candidates are distilled into the best one on validation data (see `distillation`), at the
inference cost of one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import history_flops, inference_cost, naive_flops, wide_spec
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.affinity_phase import affinity_plan, compare_tasks
from dmtg_core.search.baselines import hard_network
from dmtg_core.search.distillation import distil, distillation_state
from dmtg_core.search.feature_overlap import cluster
from dmtg_core.search.options import AFFINITY, BASELINE, DISTILLED, GUIDED, RETRAINED, WIDE, SearchOptions
from dmtg_core.search.state import SearchState
from dmtg_core.training.context import LocalContext, TrainContext
from dmtg_core.training.data import ArrayData, Data
from dmtg_core.training.loop import Hooks, advance, evaluate, generalisation_gap
from dmtg_core.training.metrics import Metrics
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from dmtg_core.training.warm_start import WarmStart

TEACHER_FACTOR = 2.0  # times `within`: a candidate that is too far behind to be the result can be a teacher


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Args:
        network: The hard network with the weights of its best epoch, in evaluation mode.
        naive: The network of naive MTL with the weights of its best epoch, in evaluation mode; None without a
            baseline.
        grouping: The grouping of `network`. It is one group if the wide encoder was best.
        chosen: Name of the selected candidate.
        distilled: Result of the distillation: `teachers`, the best `score` and the `metrics` before it, the best
            score after it (`final`), whether the distilled network was `kept`, and its part of `cost`. It is empty
            without a distillation.
        metrics: Split → task → metric → value.
        baseline: Metrics of naive MTL; empty without a baseline.
        candidates: For each candidate: `stage`, `grouping`, `score` (the lowest validation score in its search),
            `final` (the validation score of its best epoch; None if it was stopped at the end of the search) and
            `probabilities` of the gate `(N, K)` at the end of the search. For groups that were trained from
            scratch, the probabilities are those of the gate with these groups, and `gate` is its name.
        affinity: `feature_overlap` of the tasks `(N, N)`; empty if it was not measured.
        affinity_cost: Training cost of the affinity phase in runs of naive MTL.
        cost: Training cost in runs of naive MTL, without the baseline.
    """

    network: GroupingNetwork
    naive: GroupingNetwork | None
    grouping: Grouping
    chosen: str
    distilled: dict[str, Any]
    metrics: dict[str, Metrics]
    baseline: dict[str, Metrics]
    candidates: list[dict[str, Any]]
    affinity: list[list[float]]
    affinity_cost: float
    cost: float


def search(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    options: SearchOptions | None = None,
    *,
    baseline: bool = True,
    splits: Sequence[str] = ("val", "test"),
    context: TrainContext | None = None,
    warm_start: WarmStart | None = None,
) -> SearchResult:
    """Find a grouping and train its networks. The search resumes from the context's latest checkpoint.

    Args:
        spec: The grouping network. Start i has seed `spec.seed + i`.
        options: The candidates. The default is `SearchOptions()`.
        baseline: Train naive MTL (one branch, all epochs) first, as the baseline.
        splits: Splits on which naive MTL and the result are evaluated. Selections use only "val".
        warm_start: Models from which all gated candidates start. Naive MTL starts from them only if it is a single
            model, and otherwise from scratch.

    Raises:
        NonFiniteLossError: If the loss is not finite.
        ValueError: If the warm start does not fit, if the checkpoint is damaged, or as `ArrayData.check`.
    """
    if isinstance(data, ArrayData):
        data.check(spec.input, spec.tasks)
    return _Search(
        spec, data, settings, options or SearchOptions(), baseline, splits, context or LocalContext(), warm_start
    ).run()


def _score_noise(scores: Sequence[float]) -> float:
    """Noise of the validation score: mean absolute change between epochs in the second half of a search."""
    late = scores[len(scores) // 2 :]
    changes = [abs(a - b) for a, b in pairwise(late) if math.isfinite(a - b)]
    return sum(changes) / len(changes) if changes else 0.0


def _described(result: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a candidate for `SearchResult`."""
    keys = ("stage", "grouping", "score", "final", "probabilities")
    return {key: result.get(key) for key in keys} | ({"gate": result["gate"]} if "gate" in result else {})


class _Search:
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
        self.splits, self.context, self.warm_start = splits, context, warm_start
        self.candidates = options.candidates(spec)
        self.stages = [BASELINE] if baseline else []
        self.stages += [AFFINITY] if GUIDED in self.candidates else []
        # through JSON, as in the checkpoint: tuples become lists
        described = {
            "network": spec.to_dict(), "settings": asdict(settings), "options": asdict(options),
            "stages": self.stages + self.candidates,
        }  # fmt: skip
        plan = json.loads(json.dumps(described))
        if not settings.patience:  # checkpoints of earlier versions do not have it
            del plan["settings"]["patience"]
        if warm_start is not None:
            warm_start.check(spec)
            plan["warm_start"] = warm_start.digest()
        latest = context.latest()
        self.state = SearchState(plan)
        if latest is not None:
            self.state = SearchState.load(latest, plan, settings, context.device)

    def run(self) -> SearchResult:
        if BASELINE in self.stages and not self._done(BASELINE):
            self._baseline()
        if AFFINITY in self.stages and not self._done(AFFINITY):
            self._affinity()
        for name in self.candidates:
            if not self._done(name):
                self._search(name)
        for name in self._finalists():
            if "final" not in self._result(name):
                self._finish(name)
        gate = self._gate_to_retrain()
        if gate:
            self._retrain(gate)
        if self._teachers() and not self._done(DISTILLED):
            self._distil()
        return self._conclude()

    def _done(self, name: str) -> bool:
        return any(result["stage"] == name for result in self.state.results)

    def _result(self, name: str) -> dict[str, Any]:
        return next(result for result in self.state.results if result["stage"] == name)

    def _baseline(self) -> None:
        shared = self.warm_start if self.warm_start is not None and self.warm_start.single else None
        state = self._current(replace(self.spec, groups=1, sampling="fixed"), shared)
        self._advance(BASELINE, state, self.settings, self.settings.epochs)
        state.take_best()
        self.state.trained[BASELINE] = state.network
        self._end(BASELINE, state, metrics=self._evaluate(state.network))

    def _affinity(self) -> None:
        """Run the affinity phase. See `affinity_plan`."""
        least, most = self.options.affinity_epochs(self.settings)
        spec, settings = affinity_plan(self.spec, self.settings, most)
        state = self._current(spec, None, settings)
        groups = min(self.spec.groups, len(self.spec.tasks))
        overlap = compare_tasks(
            state, self.data, settings, self.context, groups=groups, least=least,
            hooks=self._reports(AFFINITY),
        )  # fmt: skip
        self._end(AFFINITY, state, affinity=overlap.tolist(), proposed=cluster(overlap, groups))

    def _search(self, name: str) -> None:
        settings = self._settings(name)
        state = self._current(*self._candidate(name), settings)
        if name == GUIDED and state.step == 0:
            least = max(self.options.probability, 1 / self.spec.groups)
            state.network.gate.start_from(self._result(AFFINITY)["proposed"], least)
        self._advance(name, state, settings, settings.search_epochs)
        self.state.held[name] = state
        scores = [record["val_score"] for record in state.history]
        self._end(
            name, state, score=min(scores), noise=_score_noise(scores),
            probabilities=state.network.gate.probabilities().tolist(),
        )  # fmt: skip
        finalists = self._finalists() if self._done(self.candidates[-1]) else self.candidates
        self.state.held = {key: held for key, held in self.state.held.items() if key in finalists}

    def _candidate(self, name: str) -> tuple[NetworkSpec, WarmStart | None]:
        if name != WIDE:
            number = int(name.removeprefix("start_")) if name != GUIDED else 0
            return replace(self.spec, seed=self.spec.seed + number), self.warm_start
        return wide_spec(self.spec), None

    def _settings(self, name: str) -> TrainSettings:
        number = int(name.removeprefix("start_")) if name.startswith("start_") else 0
        return replace(self.settings, seed=self.settings.seed + number)

    def _finalists(self, factor: float = TEACHER_FACTOR) -> list[str]:
        """Candidates that are trained to the end, by their scores at the end of the search.

        Args:
            factor: Largest difference to the best score, in units of `within`.
        """
        scores = {name: self._result(name)["score"] for name in self.candidates}
        best = min(scores, key=scores.__getitem__)
        if self.options.method == "dmtg":
            return [best]
        # a difference within the noise of the score does not separate candidates
        most = scores[best] + factor * self.options.within + self._result(best)["noise"]
        return [name for name, score in scores.items() if score <= most]

    def _finish(self, name: str) -> None:
        if self.state.current is None:
            self.state.current = self.state.held.pop(name)
        state = self.state.current
        self._advance(name, state, self._settings(name), self.settings.epochs)
        state.take_best()
        state.network.keep(state.network.gate.survivors(2.0))
        self.state.trained[name] = state.network
        result = self._result(name)
        result["final"], result["gap"] = state.best_score, generalisation_gap(state.history[-1])
        result["cost"] += history_flops(state.network.spec, state.history[result["epochs"] :])
        self.state.current = None

    def _best(self) -> str:
        """Candidate with the best final validation score, among those within `within` at the end of the search."""
        near = self._finalists(1) + ([RETRAINED] if self._done(RETRAINED) else [])
        finals = {name: self._result(name)["final"] for name in near}
        return min(finals, key=finals.__getitem__)

    def _gate_to_retrain(self) -> str:
        """Gate whose groups are trained from scratch before the wide encoder is selected; empty for none."""
        if not self.options.retrain or self._done(RETRAINED) or self._best() != WIDE:
            return ""
        gates = [self._result(name) for name in self.candidates if name != WIDE]
        best = min(gates, key=lambda gate: (gate.get("final") is None, gate.get("final"), gate["score"]))
        return str(best["stage"]) if len(best["grouping"]) > 1 else ""

    def _retrain(self, name: str) -> None:
        gate, settings = self._result(name), replace(self.settings, search_share=1.0)
        if self.state.current is None:
            grouping = Grouping.from_dict(gate["grouping"], [task.name for task in self.spec.tasks])
            network = hard_network(self.spec, grouping).to(self.context.device)
            self.state.current = TrainState.fresh(network, settings)
        state = self.state.current
        self._advance(RETRAINED, state, settings, settings.epochs)
        state.take_best()
        self.state.trained[RETRAINED] = state.network
        self._end(
            RETRAINED, state, score=state.best_score, final=state.best_score, gate=name,
            probabilities=gate["probabilities"], gap=generalisation_gap(state.history[-1]),
        )  # fmt: skip

    def _teachers(self) -> list[str]:
        """Teachers of the distillation; none if the best candidate would be the only one."""
        names = [name for name in self.state.trained if name not in (BASELINE, DISTILLED)]
        if RETRAINED in names:  # the others were selected at the end of their search
            most = self._result(self._best())["final"] + TEACHER_FACTOR * self.options.within
            names = [name for name in names if name != RETRAINED or self._result(name)["final"] <= most]
        return names if len(names) > 1 and self.options.distil_share else []

    def _distil(self) -> None:
        best, settings = self._best(), self.options.distilled(self.settings)
        teachers = [self.state.trained[name].to(self.context.device) for name in self._teachers()]
        if self.state.current is None:
            self.state.current = distillation_state(
                self.state.trained[best], self._result(best)["final"], settings
            )
        state = self.state.current
        gap, hooks = self._result(best)["gap"], self._reports(DISTILLED)
        distil(state, teachers, self.data, settings, self.context, gap=gap, hooks=hooks)
        self.state.trained[DISTILLED] = state.network
        self._end(DISTILLED, state, final=state.best_score, teachers=self._teachers())
        teaching = state.epoch * sum(inference_cost(teacher).flops for teacher in teachers)
        self._result(DISTILLED)["cost"] += teaching

    def _conclude(self) -> SearchResult:
        chosen, after = self._best(), self._result(DISTILLED) if self._done(DISTILLED) else None
        network = self.state.trained[DISTILLED if after else chosen].eval()
        by_name = {result["stage"]: result for result in self.state.results}
        naive = self.state.trained.get(BASELINE)
        if naive is not None:
            naive.eval()
        once = naive_flops(self.spec) * self.settings.epochs
        spent = sum(result["cost"] for result in self.state.results if result["stage"] != BASELINE)
        distilled: dict[str, Any] = {}
        if after is not None:
            before = by_name[chosen]["final"]
            distilled = {"teachers": after["teachers"], "score": before, "final": after["final"]}
            distilled["kept"] = after["final"] < before
            distilled["metrics"] = self._evaluate(self.state.trained[chosen])
            distilled["cost"] = after["cost"] / once
        return SearchResult(
            network=network,
            naive=naive,
            grouping=network.grouping(),
            chosen=chosen,
            distilled=distilled,
            metrics=self._evaluate(network),
            baseline=by_name.get(BASELINE, {}).get("metrics", {}),
            candidates=[_described(by_name[name]) for name in [*self.candidates, RETRAINED] if name in by_name],
            affinity=by_name.get(AFFINITY, {}).get("affinity", []),
            affinity_cost=by_name.get(AFFINITY, {}).get("cost", 0) / once,
            cost=spent / once,
        )

    def _evaluate(self, network: GroupingNetwork) -> dict[str, Metrics]:
        return {split: evaluate(network, self.data, split, context=self.context) for split in self.splits}

    def _current(
        self, spec: NetworkSpec, warm_start: WarmStart | None, settings: TrainSettings | None = None
    ) -> TrainState:
        """State of the stage: from the checkpoint, or fresh."""
        if self.state.current is None:
            network = GroupingNetwork(spec)
            if warm_start is not None:
                warm_start.apply(network)
            network.to(self.context.device)
            self.state.current = TrainState.fresh(network, settings or self.settings)
        return self.state.current

    def _advance(self, stage: str, state: TrainState, settings: TrainSettings, until: int) -> None:
        advance(state, self.data, settings, self.context, until=until, hooks=self._reports(stage))

    def _reports(self, stage: str) -> Hooks:
        """Hooks that report metrics and checkpoints of a stage."""
        return Hooks(
            on_epoch=lambda state: self.context.report({"stage": stage, **state.history[-1]}, self.state.save),
            on_step=lambda _: self.context.report(None, self.state.save),
        )

    def _end(self, name: str, state: TrainState, **found: Any) -> None:
        self.state.results.append(
            {
                "stage": name,
                "epochs": state.epoch,
                "score": state.history[-1]["val_score"],
                "grouping": state.network.grouping().to_dict(),
                "cost": history_flops(state.network.spec, state.history),
                **found,
            }
        )
        self.state.current = None
