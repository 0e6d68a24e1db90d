"""The guided search: candidates, groups that are trained from scratch, and distillation."""

from dataclasses import replace
from itertools import cycle, pairwise

import pytest
import torch

from dmtg_core import (
    ArrayData,
    Grouping,
    GroupingNetwork,
    SearchOptions,
    cluster,
    grouping_cost,
    inference_cost,
    search,
    training_flops,
)
from dmtg_core.search import affinity_phase
from dmtg_core.search.baselines import hard_network, train_hard
from dmtg_core.search.search import _score_noise, _Search
from dmtg_core.training.checkpoint import seal
from dmtg_core.training.loop import score_of
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted, without_times
from tests.dmtg_core.searches import SETTINGS, SPEC, assert_same_result, local
from tests.soak import others_in_soak

# all candidates are trained to the end, whatever their scores
GUIDED = SearchOptions(within=10.0, affinity_share=0.25, affinity_limit=0.25, distil_share=0.5)
UNDISTILLED = replace(GUIDED, distil_share=0.0)
CANDIDATES = ("guided", "start_0", "wide")
GUIDED_STAGES = [("naive_mtl", n) for n in (1, 2, 3, 4)] + [("affinity", 1)]
GUIDED_STAGES += [(name, n) for epochs in ((1, 2), (3, 4)) for name in CANDIDATES for n in epochs]
GUIDED_STAGES += [("retrained", n) for n in (1, 2, 3, 4)]  # the wide encoder is best on this problem
GUIDED_STAGES += [("distilled", n) for n in (1, 2)]


@pytest.fixture(scope="module")
def data() -> ArrayData:
    return samples.data(SPEC.input, SPEC.tasks, missing=0.2)


@pytest.fixture(scope="module")
def guided(data):
    """A complete guided search with its records."""
    records = []
    result = search(SPEC, data, SETTINGS, GUIDED, context=local(on_record=records.append))
    return result, records


@pytest.fixture(scope="module")
def plain(data):
    """The same search without distillation, with its records."""
    records = []
    result = search(SPEC, data, SETTINGS, UNDISTILLED, context=local(on_record=records.append))
    return result, records


def test_a_guided_search_starts_with_the_affinity_phase_and_trains_all_near_candidates_to_the_end(guided):
    result, records = guided
    assert [(record["stage"], record["epoch"]) for record in records] == GUIDED_STAGES
    assert [candidate["stage"] for candidate in result.candidates] == [*CANDIDATES, "retrained"]
    finals = {candidate["stage"]: candidate["final"] for candidate in result.candidates}
    assert result.chosen == min(finals, key=finals.__getitem__)
    for name, final in finals.items():
        every = name == "retrained"  # its groups never change: all epochs are candidates for the best
        ended = [r for r in records if r["stage"] == name and (every or r["phase"] == "finetune")]
        assert final == min(r["val_score"] for r in ended)
    assert result.distilled["teachers"] == [*CANDIDATES, "retrained"]
    assert result.distilled["score"] == finals[result.chosen]
    later = min(r["val_score"] for r in records if r["stage"] == "distilled")
    assert result.distilled["final"] == min(later, finals[result.chosen])
    assert result.distilled["kept"] == (later < finals[result.chosen])
    assert score_of(result.distilled["metrics"]["val"]) == pytest.approx(finals[result.chosen], abs=1e-6)
    affinity = torch.tensor(result.affinity)
    assert affinity.shape == (len(SPEC.tasks),) * 2
    assert torch.allclose(affinity, affinity.T)


def test_the_affinity_phase_ends_when_the_groups_have_converged(data):
    settings = replace(SETTINGS, epochs=20)
    options = SearchOptions(affinity_share=0.1, affinity_limit=1.0)
    records = []

    def listen(record):
        if record["stage"] != "affinity":
            raise Interrupted
        records.append(record)

    with pytest.raises(Interrupted):
        search(SPEC, data, settings, options, baseline=False, context=local(on_record=listen))
    proposed = [r["proposed"] for r in records]
    assert 2 <= len(proposed) < 20
    names = [task.name for task in SPEC.tasks]
    groupings = [Grouping.from_assignment(names, groups) for groups in proposed]
    converged = [a.adjusted_rand_index(b) >= 0.9 for a, b in pairwise(groupings)]
    assert converged[-1]
    assert not any(converged[:-1])


def test_the_affinity_phase_ends_at_its_limit_if_groups_do_not_converge(data, monkeypatch):
    tasks = len(SPEC.tasks)
    turns = cycle([[n % 3 for n in range(tasks)], [3 * n // tasks for n in range(tasks)]])
    monkeypatch.setattr(affinity_phase, "cluster", lambda *_: next(turns))
    records = []
    options = SearchOptions(affinity_share=0.1, affinity_limit=0.75, distil_share=0.0, retrain=False)
    search(SPEC, data, SETTINGS, options, baseline=False, context=local(on_record=records.append))
    assert [r["epoch"] for r in records if r["stage"] == "affinity"] == [1, 2, 3]


def test_the_guided_gate_starts_at_the_clusters_of_the_affinity(guided):
    result, records = guided
    proposed = cluster(torch.tensor(result.affinity), SPEC.groups)
    first = next(r for r in records if r["stage"] == "guided")
    alone = GroupingNetwork(SPEC)
    alone.gate.start_from(proposed, GUIDED.probability)
    assert alone.gate.assignment() == proposed
    assert torch.allclose(alone.gate.probabilities().amax(1), torch.full((len(proposed),), 0.9))
    likely = [max(range(SPEC.groups), key=row.__getitem__) for row in first["probabilities"]]
    assert sum(a == b for a, b in zip(likely, proposed, strict=True)) > len(proposed) / 2


def test_candidates_with_much_worse_scores_stop_at_the_end_of_the_search(data, guided):
    records = []
    options = replace(GUIDED, within=0.0, retrain=False)
    found = search(SPEC, data, SETTINGS, options, context=local(on_record=records.append))
    best = min(found.candidates, key=lambda candidate: candidate["score"])["stage"]
    assert [c["stage"] for c in found.candidates if c["final"] is not None] == [best]
    assert {r["stage"] for r in records if r["epoch"] > 2} == {"naive_mtl", best}
    assert found.cost < guided[0].cost
    assert found.distilled == {}  # there are no further teachers


def test_without_distillation_the_result_is_the_best_candidate(guided, plain):
    found, records = plain
    assert [(record["stage"], record["epoch"]) for record in records] == GUIDED_STAGES[:-2]
    assert found.distilled == {}
    assert found.candidates == guided[0].candidates
    best = min(found.candidates, key=lambda candidate: candidate["final"])
    assert score_of(found.metrics["val"]) == pytest.approx(best["final"], abs=1e-6)


def test_the_cost_of_distillation_includes_the_teachers(guided, plain):
    undistilled, _ = plain
    naive = training_flops(GroupingNetwork(replace(SPEC, groups=1)))
    spread = Grouping.from_assignment([t.name for t in SPEC.tasks], [n % 3 for n in range(len(SPEC.tasks))])
    one = training_flops(guided[0].network)
    assert guided[0].distilled["cost"] == pytest.approx(guided[0].cost - undistilled.cost)
    assert guided[0].distilled["metrics"] == undistilled.metrics
    extra = (guided[0].cost - undistilled.cost) * 4 * naive / 2 - one  # two of four epochs
    assert 0 < extra <= 4 * grouping_cost(SPEC, spread).flops  # of four teachers


@pytest.mark.parametrize(
    ("stage", "epoch"),
    others_in_soak(GUIDED_STAGES, ("affinity", 1), ("guided", 3), ("distilled", 1)),
)
def test_a_guided_search_interrupted_in_any_stage_has_the_same_result(tmp_path, data, guided, stage, epoch):
    expected, records = guided

    def kill(record):
        if (record["stage"], record["epoch"]) == (stage, epoch):
            raise Interrupted

    with pytest.raises(Interrupted):
        search(SPEC, data, SETTINGS, GUIDED, context=local(tmp_path, on_record=kill))
    rest = []
    found = search(SPEC, data, SETTINGS, GUIDED, context=local(tmp_path, on_record=rest.append))
    assert_same_result(found, expected)
    assert without_times(rest) == without_times(records[GUIDED_STAGES.index((stage, epoch)) :])


def test_with_one_branch_there_are_no_further_candidates(data):
    result = search(replace(SPEC, groups=1), data, SETTINGS, baseline=False, context=local())
    assert [candidate["stage"] for candidate in result.candidates] == ["start_0"]
    assert result.affinity == []
    assert len(result.grouping.groups) == 1


def test_where_the_wide_encoder_is_best_it_is_the_result_at_no_higher_cost(data, monkeypatch):
    results = {}
    for name in ("guided", "start_0"):  # the wide encoder is better than both gates
        results[name] = 1e3
    original = _Search._end

    def worse(self, name, state, **found):
        original(self, name, state, **found)
        self.state.results[-1]["score"] += results.get(name, 0.0)

    monkeypatch.setattr(_Search, "_end", worse)
    result = search(SPEC, data, SETTINGS, GUIDED, baseline=False, context=local())
    assert result.chosen == "wide"
    assert len(result.grouping.groups) == 1
    names = [task.name for task in SPEC.tasks]
    spread = Grouping.from_assignment(names, [n % SPEC.groups for n in range(len(names))])
    assert inference_cost(result.network).flops <= grouping_cost(SPEC, spread).flops
    (model,) = result.network.specialise().values()
    inputs = samples.batch(SPEC.input, SPEC.tasks).inputs
    with torch.no_grad():
        assert all(torch.equal(value, result.network(inputs)[name]) for name, value in model(inputs).items())


def test_groups_of_the_best_gate_are_trained_from_scratch_before_the_wide_encoder_is_selected(data, guided, plain):
    by_name = {candidate["stage"]: candidate for candidate in guided[0].candidates}
    gates = [by_name["guided"], by_name["start_0"]]
    assert by_name["wide"]["final"] < min(gate["final"] for gate in gates)
    best = min(gates, key=lambda gate: gate["final"])
    retrained = by_name["retrained"]
    assert (retrained["gate"], retrained["grouping"]) == (best["stage"], best["grouping"])
    assert retrained["probabilities"] == best["probabilities"]
    grouping = Grouping.from_dict(best["grouping"], [task.name for task in SPEC.tasks])
    alone = train_hard(hard_network(SPEC, grouping), data, SETTINGS, splits=())
    assert retrained["final"] == alone.score
    options = replace(UNDISTILLED, retrain=False)
    without = search(SPEC, data, SETTINGS, options, baseline=False, context=local())
    spent = plain[0].cost
    unit = training_flops(GroupingNetwork(replace(SPEC, groups=1)))
    assert without.chosen == "wide"
    assert spent - without.cost == pytest.approx(training_flops(alone.network) / unit)


def test_groups_that_are_better_from_scratch_are_the_result(data, monkeypatch):
    end = _Search._end

    def ended(self, name, state, **found):
        end(self, name, state, **found)
        if name == "retrained":
            self.state.results[-1]["final"] -= 100

    monkeypatch.setattr(_Search, "_end", ended)
    result = search(SPEC, data, SETTINGS, GUIDED, baseline=False, context=local())
    assert result.chosen == "retrained"
    assert len(result.grouping.groups) > 1
    assert not result.distilled["kept"]


@pytest.mark.parametrize(("behind", "teaches"), [(0.19, True), (0.21, False)])
def test_groups_that_are_much_worse_from_scratch_are_no_teachers(data, monkeypatch, behind, teaches):
    end = _Search._end

    def ended(self, name, state, **found):
        end(self, name, state, **found)
        if name == "retrained":
            self.state.results[-1]["final"] = self._result("wide")["final"] + behind

    monkeypatch.setattr(_Search, "_end", ended)
    monkeypatch.setattr(_Search, "_finalists", lambda *_: list(CANDIDATES))
    result = search(SPEC, data, SETTINGS, replace(GUIDED, within=0.1), baseline=False, context=local())
    assert result.distilled["teachers"] == [*CANDIDATES, *(["retrained"] if teaches else [])]


@pytest.mark.parametrize(("ahead", "groups"), [("guided", None), ("wide", 1)])
def test_nothing_is_trained_from_scratch_if_a_gate_is_best_or_has_one_group(data, monkeypatch, ahead, groups):
    finish = _Search._finish

    def finished(self, name):
        finish(self, name)
        self._result(name)["final"] -= 100 * (name == ahead)
        if groups:
            self._result(name)["grouping"] = {"group_0": [task.name for task in SPEC.tasks]}

    monkeypatch.setattr(_Search, "_finish", finished)
    result = search(SPEC, data, SETTINGS, GUIDED, baseline=False, context=local())
    assert result.chosen == ahead
    assert [candidate["stage"] for candidate in result.candidates] == list(CANDIDATES)


def test_a_slightly_worse_candidate_is_a_teacher_and_not_the_result(data, monkeypatch):
    given = {"guided": 0.0, "start_0": 0.15, "wide": 0.3}
    end, finish = _Search._end, _Search._finish

    def ended(self, name, state, **found):
        end(self, name, state, **found)
        if name in given:
            self.state.results[-1] |= {"score": given[name], "noise": 0.0}

    def finished(self, name):
        finish(self, name)
        self._result(name)["final"] -= 100 * (name == "start_0")

    monkeypatch.setattr(_Search, "_end", ended)
    monkeypatch.setattr(_Search, "_finish", finished)
    result = search(SPEC, data, SETTINGS, replace(GUIDED, within=0.1), baseline=False, context=local())
    assert {c["stage"]: c["final"] is None for c in result.candidates} == {
        "guided": False, "start_0": False, "wide": True,
    }  # fmt: skip
    assert result.chosen == "guided"
    assert result.distilled["teachers"] == ["guided", "start_0"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "magic"}, "unknown method 'magic', expected one of guided, dmtg"),
        ({"starts": -1}, "starts must be at least"),
        ({"affinity_share": 0.0}, "affinity_share"),
        ({"affinity_limit": 1.5}, "affinity_limit"),
        ({"probability": 1.0}, "probability"),
        ({"within": -0.1}, "within"),
        ({"distil_share": -0.1}, "distil_share"),
    ],
)
def test_options_out_of_range_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        SearchOptions(**options)


def test_the_noise_of_a_score_is_that_of_the_second_half_of_its_search():
    assert _score_noise([9.0, 0.0, 1.0, 3.0]) == 2.0
    assert _score_noise([1.0, 2.0, 2.5, 3.5, 3.0, 3.25]) == 0.375
    assert _score_noise([1.0]) == 0.0
    assert _score_noise([0.0, 1.0, float("inf"), 2.0]) == 0.0


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, data):
    first = search(SPEC, data, SETTINGS, GUIDED, baseline=False, context=local(tmp_path))
    for file in tmp_path.glob("*/search.json"):
        text = file.read_text()
        assert '"noise"' in text
        file.write_text(text.replace('"noise"', '"restless"'))
        seal(file.parent)
    again = search(SPEC, data, SETTINGS, GUIDED, baseline=False, context=local(tmp_path))
    assert again.candidates == first.candidates
