"""The method "guided": candidates side by side, and the rest of the budget for the best of them.

One wide encoder for all tasks has the inference cost of all branches, because no grouping is better if only
capacity matters. It is trained first. One gate starts at groups of tasks with a high feature overlap in this
encoder, which is trained on until the groups are stable. With many tasks for each branch, the overlap is measured
in an encoder of its own, which is wider still and trained for a few epochs (see `overlap_spec`). Further gates
start uniform. If the search starts from the models of a grouping, they are a candidate too. All candidates of a
rung have the same cost. After each rung, those with a worse validation score are dropped (successive halving,
Jamieson and Talwalkar 2016), and the others go on without a restart (see `extendable`).

The best one is trained for as long as validation improves and the budget lasts. What is left is spent on further
networks, if they and a distillation fit into the budget: the narrow encoder of naive MTL, the runners-up, and
networks of the same kind with other seeds. If the mean of some of them is better than the best one on validation
data, it is distilled into the best one (see `distillation`), at the inference cost of one.

Naive MTL stays unless the result is better, by more than two standard errors if it costs twice as much at
inference (see `is_better`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import wide_spec
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.baselines import hard_network
from dmtg_core.search.distillation import Ensemble, distil, distillation_state
from dmtg_core.search.extendable import complete, extend, patience_of, score_noise
from dmtg_core.search.feature_overlap import cluster, feature_overlap, overlap_spec, propose_until_stable
from dmtg_core.search.options import (
    BASELINE,
    CHAMPION,
    DISTILLED,
    ENSEMBLE,
    GUIDED,
    ONE,
    OVERLAP,
    OVERLAP_ENCODER,
    RUNG,
    SELECTED,
    WIDE,
)
from dmtg_core.search.stages import Stages
from dmtg_core.training.loop import evaluate, generalisation_gap, rows_evaluated, score_of
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from dmtg_core.training.warm_start import WarmStart

LEAST_DISTILLATION = 0.5  # epochs of the shortest distillation, as a share of those of the networks
MEMBERS = 3  # the most further networks of an ensemble
GROUPS = "groups"  # beginning of the names of networks that are trained with the groups of the chosen candidate


class GuidedSearch(Stages):
    """The search with rungs and a budget."""

    def run(self) -> str:
        """Spend the budget. Return the name of the best network, before distillation."""
        self._measure_apart()
        while not self.done(SELECTED):
            self._rung()
        self._complete(self.result(SELECTED)["name"], self.result(SELECTED)["most"])
        if self.options.distil:
            self._ensemble()
        for name in list(self.state.held):
            self._drop(name)
        return self._best()

    def _rung(self) -> None:
        """Train the remaining candidates until the end of the next rung, and drop the worse ones."""
        last = self.result(RUNG) if self.done(RUNG) else None
        epochs = {name: 2 * last["epochs"][name] for name in last["kept"]} if last else self._first_rung()
        for name, until in epochs.items():
            if last is None and name in (WIDE, ONE):
                self._propose_groups(name, epochs)
            self._extend(name, until)
        seen = {name: _scores(self.state.held[name])[:until] for name, until in epochs.items()}
        scores = {name: min(found) for name, found in seen.items()}
        best = min(scores, key=scores.__getitem__)
        noise = score_noise(seen[best])
        most = scores[best] + self.options.within + noise
        kept = sorted((name for name in epochs if scores[name] <= most), key=scores.__getitem__)
        states = [(self.state.held[name], 2 * epochs[name]) for name in kept]
        again = sum(self.budget.epoch(one.network) * max(until - one.epoch, 0) for one, until in states)
        fits = self.spent + again <= self.options.compare * self.budget.runs
        self.state.results.append(
            {"stage": RUNG, "epochs": epochs, "scores": scores, "noise": noise, "kept": kept}
        )
        for name in epochs:
            if name not in kept:
                self._drop(name)
        if len(kept) == 1 or not fits:
            state = self.state.held[best]
            left = self.budget.epochs(self.budget.epoch(state.network), self.spent)
            self.state.results.append({"stage": SELECTED, "name": best, "most": state.epoch + left})

    def _first_rung(self) -> dict[str, int]:
        """Return the epochs of each candidate that the budget allows."""
        costs = {name: self.budget.epoch_of(self._spec(name)) for name in self.candidates}
        spent = self.result(OVERLAP_ENCODER)["cost"] if self.done(OVERLAP_ENCODER) else 0.0
        return self.budget.first_rung(costs, self.options.compare, self.options.rung, spent)

    def _propose_groups(self, name: str, epochs: Mapping[str, int]) -> None:
        """Train the first candidate for its first rung, and further until the groups that it proposes are stable.

        The features of some tasks are learned late: with 18 tasks of three cameras and five seeds, the mean
        agreement with the true groups was 0.40 after the two epochs of the first rung, and 0.93 after four to six
        epochs, by this rule.
        """
        if self.done(OVERLAP_ENCODER):
            return
        most = least = epochs[name]
        if GUIDED in epochs:
            most = self.budget.longest(least, self.budget.epoch_of(self._spec(name)))

        def propose(epoch: int) -> list[int]:
            self._extend(name, epoch)
            return self._measure(self.state.held[name])

        before = [one["proposed"] for one in self.state.results if one["stage"] == OVERLAP]
        propose_until_stable(propose, least, most, before)

    def _extend(self, name: str, until: int) -> None:
        if name in self.state.held and self.state.held[name].epoch >= until:
            return
        if self.state.current is None:
            self.state.current = self.state.held.pop(name, None) or self._fresh(name)
        state = self.state.current
        extend(state, self.data, self._settings(name), self.context, until=until, hooks=self.reports(name))
        self.state.held[name] = state
        self.state.current = None

    def _measure_apart(self) -> None:
        """Measure the feature overlap in an encoder of its own, if the wide one is too narrow for all tasks."""
        wider = overlap_spec(self.spec) if self.options.wide else None
        if wider is None or self.done(OVERLAP):
            return
        epochs = self.budget.overlap_epochs(self.budget.epoch_of(wider))
        if epochs:
            state = self.current(wider, None)
            hooks = self.reports(OVERLAP_ENCODER)
            extend(state, self.data, self.settings, self.context, until=epochs, hooks=hooks)
            self._measure(state)
            self.end(OVERLAP_ENCODER, state)

    def _measure(self, state: TrainState) -> list[int]:
        """Measure the feature overlap of the tasks, and propose groups."""
        rows = rows_evaluated(self.spec, self.settings)
        overlap = feature_overlap(state.validated, self.data, batch_size=rows, context=self.context)
        proposed = cluster(overlap, min(self.spec.groups, len(self.spec.tasks)))
        for one in self.state.results:
            one.pop("affinity", None)  # every checkpoint has the last one only
        self.state.results.append({"stage": OVERLAP, "affinity": overlap.tolist(), "proposed": proposed})
        return proposed

    def _spec(self, name: str) -> NetworkSpec:
        kind, number = _numbered(name)
        spec = replace(self.spec, seed=self.spec.seed + number)
        if kind == WIDE:
            return wide_spec(spec)
        return replace(spec, groups=1, sampling="fixed") if kind == ONE else spec

    def _fresh(self, name: str) -> TrainState:
        """Return the state of a candidate at its beginning."""
        spec = self._spec(name)
        gated = spec.groups > 1
        network = GroupingNetwork(spec)
        if gated and self.warm_start is not None:
            self.warm_start.apply(network)
        if name == GUIDED:
            self._propose(network)
        elif name == CHAMPION:
            assert self.warm_start is not None
            self._keep_models(network, self.warm_start)
        elif name.startswith(GROUPS):  # the groups that were found, with other initial weights
            network = hard_network(spec, self._grouping(self.result(SELECTED)["name"]))
        return TrainState.fresh(network.to(self.context.device), self._settings(name))

    def _propose(self, network: GroupingNetwork) -> None:
        """Start the gate at the proposed groups."""
        proposed, probability = self.result(OVERLAP)["proposed"], self.options.probability
        if probability == 1:
            network.keep_grouping(Grouping.from_assignment([task.name for task in self.spec.tasks], proposed))
        else:
            network.gate.start_from(proposed, max(probability, 1 / self.spec.groups))

    def _keep_models(self, network: GroupingNetwork, models: WarmStart) -> None:
        """Keep the heads of model k on branch k, and no gate."""
        alive = torch.zeros_like(network.gate.alive)
        for k, model in enumerate(models.models):
            own = {task.name for task in model.network.tasks}
            for n, task in enumerate(self.spec.tasks):
                alive[n, k] = task.name in own
        network.keep(alive)

    def _settings(self, name: str) -> TrainSettings:
        return replace(self.settings, seed=self.settings.seed + _numbered(name)[1])

    def _grouping(self, name: str) -> Grouping:
        return Grouping.from_dict(self.result(name)["grouping"], [task.name for task in self.spec.tasks])

    def _drop(self, name: str) -> None:
        """End a candidate that is not trained to the end."""
        state = self.state.held.pop(name)
        self.end(name, state, score=min(_scores(state)), final=None, probabilities=_soft(state))

    def _complete(self, name: str, most: int) -> None:
        """Train a network to the end."""
        if self.done(name):
            return
        if self.state.current is None:
            self.state.current = self.state.held.pop(name, None) or self._fresh(name)
        state = self.state.current
        complete(state, self.data, self._settings(name), self.context, most=most, hooks=self.reports(name))
        self.state.trained[name] = state.network
        self.end(
            name, state, score=state.best_score, final=state.best_score, probabilities=_soft(state),
            gap=generalisation_gap(state.history[-1]), length=_useful(state),
        )  # fmt: skip

    def _ensemble(self) -> None:
        """Train further networks and distil their mean, as far as the budget allows it."""
        chosen = self.result(SELECTED)["name"]
        if not self.done(ENSEMBLE):
            length = self.result(chosen)["length"]
            members = self._members(chosen, length)
            if not members and length > self.settings.epochs:  # shorter trainings are better than none
                length = self.settings.epochs
                members = self._members(chosen, length)
            self.state.results.append({"stage": ENSEMBLE, "members": members, "length": length})
        entry = self.result(ENSEMBLE)
        for name in entry["members"]:
            if name != BASELINE:
                self._complete(name, entry["length"])
        if not entry["members"]:
            return
        if "teachers" not in entry:
            entry |= self._teachers((chosen, *entry["members"]))
            best, teachers = entry["teachers"][0], self._networks(entry["teachers"])
            cost = self.budget.epoch(teachers[0]) + self.budget.teaching(teachers)
            epochs = min(self.budget.epochs(cost, self.spent), max(self.settings.epochs, entry["length"]))
            entry["epochs"] = epochs if entry["score"] < self.result(best)["final"] else 0
        if entry["epochs"] and not self.done(DISTILLED):
            self._distil(entry["teachers"], entry["epochs"])

    def _teachers(self, names: Sequence[str]) -> dict[str, Any]:
        """Select the networks whose mean has the best validation score, the best network first.

        Networks are added one by one while the score improves (Caruana et al. 2004).
        """
        chosen = [self._best()]
        score = self.result(chosen[0])["final"]
        while True:
            tried = {name: self._score([*chosen, name]) for name in names if name not in chosen}
            best = min(tried, key=tried.__getitem__, default="")
            if not best or tried[best] >= score:
                return {"teachers": chosen, "score": score}
            chosen.append(best)
            score = tried[best]

    def _score(self, names: Sequence[str]) -> float:
        """Return the validation score of the mean of networks."""
        ensemble = Ensemble(self._networks(names))
        rows = rows_evaluated(self.spec, self.settings)
        metrics = evaluate(ensemble, self.data, "val", batch_size=rows, context=self.context)
        return score_of(self.spec.tasks, metrics)

    def _networks(self, names: Sequence[str]) -> list[GroupingNetwork]:
        return [self.state.trained[name].to(self.context.device) for name in names]

    def _members(self, chosen: str, length: int) -> list[str]:
        """Return the networks whose training for `length` epochs, and distillation, the budget allows.

        The narrow encoder of naive MTL is first. It costs least, and nothing if it is there as the baseline.
        """
        narrow = BASELINE if BASELINE in self.state.trained else ONE
        kind = chosen if chosen in (WIDE, ONE) else GROUPS
        names = [narrow] if chosen != ONE else []
        names += [name for name in self.state.held if name != chosen]
        names += [f"{kind}_{i}" for i in range(1, MEMBERS + 1)]
        network, members, cost = self.state.trained[chosen], list[str](), self.spent
        one, taught = self.budget.epoch(network), self.budget.teaching([network])
        for name in names[:MEMBERS]:
            epoch, done = one, 0
            if name in self.state.held:
                epoch, done = self.budget.epoch(self.state.held[name].network), self.state.held[name].epoch
            elif name in (BASELINE, ONE):
                epoch, done = self.budget.epoch_of(self._spec(ONE)), length if name == BASELINE else 0
            cost += (length - done) * epoch
            taught += epoch / 3  # a forward pass is a third of a step
            if cost + LEAST_DISTILLATION * length * (one + taught) > self.budget.runs:
                break
            members.append(name)
        return members

    def _distil(self, names: Sequence[str], epochs: int) -> None:
        """Distil the mean of networks into the first one, which is the best."""
        settings = replace(self.settings, epochs=epochs, search_share=1.0, patience=patience_of(self.settings))
        best, teachers = self.result(names[0]), self._networks(names)
        if self.state.current is None:
            self.state.current = distillation_state(teachers[0], best["final"], settings)
        state, hooks = self.state.current, self.reports(DISTILLED)
        distil(state, teachers, self.data, settings, self.context, gap=best["gap"], hooks=hooks)
        self.state.trained[DISTILLED] = state.network
        self.end(DISTILLED, state, final=state.best_score, teachers=list(names))
        self.result(DISTILLED)["cost"] += state.epoch * self.budget.teaching(teachers)

    def _best(self) -> str:
        """Return the network with the best validation score."""
        finals = {
            one["stage"]: one["final"]
            for one in self.state.results
            if one["stage"] not in (DISTILLED, BASELINE) and one.get("final") is not None
        }
        return min(finals, key=finals.__getitem__)


def _numbered(name: str) -> tuple[str, int]:
    """Split the name of a network into its kind and its number: `wide_1` is a wide encoder with the next seed."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if number.isdigit() else (name, 0)


def _scores(state: TrainState) -> list[float]:
    """The validation scores after each epoch."""
    return [record["val_score"] for record in state.history]


def _soft(state: TrainState) -> list[list[float]]:
    """Probabilities of the gate after the last epoch in which a task had several heads; without one, 0 or 1."""
    soft = [record for record in state.history if record["heads"] > len(record["val"])]
    found: list[list[float]] = (soft or state.history)[-1]["probabilities"]
    return found


def _useful(state: TrainState) -> int:
    """Epochs of a training without those after its best epoch at the constant learning rate."""
    assert state.decay is not None
    first, last = state.decay
    scores = _scores(state)[:first]
    return scores.index(min(scores)) + 1 + last - first if scores else last
