"""The method "dmtg": gates that start uniform, as in the paper.

A single run can converge to a poor grouping, so several starts are possible. The one whose pruned network has the
best validation score is trained to the end.
"""

from __future__ import annotations

from dataclasses import replace

from dmtg_core.search.stages import Stages
from dmtg_core.training.loop import advance
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState


class PublishedSearch(Stages):
    """The search of the paper, with several starts."""

    def run(self) -> str:
        """Train all gates, and the best one to the end. Return its name."""
        for name in self.candidates:
            if not self.done(name):
                self._search(name)
        best = self._best()
        if "final" not in self.result(best):
            self._finish(best)
        return best

    def _best(self) -> str:
        scores = {name: self.result(name)["score"] for name in self.candidates}
        return min(scores, key=scores.__getitem__)

    def _search(self, name: str) -> None:
        settings = self._settings(name)
        spec = replace(self.spec, seed=self.spec.seed + settings.seed - self.settings.seed)
        state = self.current(spec, self.warm_start, settings)
        self._advance(name, state, settings, settings.search_epochs)
        self.state.held[name] = state
        scores = [record["val_score"] for record in state.history]
        self.end(name, state, score=min(scores), probabilities=state.network.gate.probabilities().tolist())
        if self.done(self.candidates[-1]):
            self.state.held = {self._best(): self.state.held[self._best()]}

    def _finish(self, name: str) -> None:
        if self.state.current is None:
            self.state.current = self.state.held.pop(name)
        state = self.state.current
        self._advance(name, state, self._settings(name), self.settings.epochs)
        state.take_best()
        self.state.trained[name] = state.network
        result = self.result(name)
        result["final"] = state.best_score
        result["cost"] = self.budget.of(state.network.spec, state.history)
        self.state.current = None

    def _settings(self, name: str) -> TrainSettings:
        return replace(self.settings, seed=self.settings.seed + int(name.removeprefix("start_")))

    def _advance(self, name: str, state: TrainState, settings: TrainSettings, until: int) -> None:
        advance(state, self.data, settings, self.context, until=until, hooks=self.reports(name))
