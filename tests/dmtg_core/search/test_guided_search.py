"""The guided search: rungs, the budget, further networks and distillation."""

import importlib
from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from dmtg_core import (
    ArrayData,
    Grouping,
    GroupingNetwork,
    SearchOptions,
    cluster,
    evaluate,
    feature_overlap,
    grouping_cost,
    inference_cost,
    search,
)
from dmtg_core.evaluation.jackknife import Difference
from dmtg_core.network.cost import history_flops, naive_flops, wide_spec
from dmtg_core.search.baselines import hard_network
from dmtg_core.search.budget import LONGEST, Budget
from dmtg_core.search.distillation import Ensemble
from dmtg_core.search.extendable import extend, score_noise
from dmtg_core.search.feature_overlap import are_stable, overlap_spec
from dmtg_core.search.search import is_better
from dmtg_core.training.loop import score_of
from dmtg_core.training.state import TrainState
from tests.dmtg_core import samples, searches
from tests.dmtg_core.interrupted import Interrupted, without_times
from tests.dmtg_core.searches import assert_same_result, local
from tests.soak import others_in_soak

SEED = 85  # with it a uniform gate is best, and the ensemble of it and the proposed groups is better
SPEC = replace(searches.SPEC, seed=SEED)
SETTINGS = replace(searches.SETTINGS, seed=SEED)
# enough for further networks and a distillation; a large `within` keeps all candidates while the budget allows it
GUIDED = SearchOptions(budget=40, within=10.0, rung=0.25, compare=0.15)
CANDIDATES = ("wide", "guided", "start_0")
FIRST = {"wide": 2, "guided": 1, "start_0": 1}  # epochs of the first rung: those of the wide encoder cost less


@pytest.fixture(scope="module")
def data() -> ArrayData:
    return samples.data(SPEC.input, SPEC.tasks, missing=0.2)


def run(data, options=GUIDED, *, spec=SPEC, folder=None, stop=None, baseline=True, **changes):
    """A search with its records. `stop` is the number of records after which it is interrupted."""
    records = []

    def listen(record):
        if stop is not None and len(records) == stop:
            raise Interrupted
        records.append(record)

    settings = replace(SETTINGS, **changes)
    context = local(folder, on_record=listen)
    return search(spec, data, settings, options, baseline=baseline, context=context), records


@pytest.fixture(scope="module")
def guided(data):
    """A complete guided search with its records."""
    return run(data)


def spec_of(stage: str):
    """The network of a stage."""
    if stage.startswith("wide"):
        return wide_spec(SPEC)
    return replace(SPEC, groups=1) if stage in ("one_encoder", "naive_mtl") else SPEC


def stages(records) -> list[tuple[str, int]]:
    """The stages in order, with the number of epochs that were trained each time."""
    return [(name, len(list(part))) for name, part in groupby(records, key=lambda record: record["stage"])]


def test_candidates_are_trained_side_by_side_and_the_best_one_to_the_end(guided):
    _, records = guided
    assert stages(records) == [
        ("naive_mtl", 4),
        # the second rung has twice the epochs of the first one, the best of the rung before first
        ("wide", 2), ("guided", 1), ("start_0", 1 + 1), ("guided", 1), ("wide", 2),
        ("start_0", 17), ("guided", 11), ("wide", 9), ("distilled", 8),
    ]  # fmt: skip
    for name in CANDIDATES:
        rates = [record["learning_rate"] for record in records if record["stage"] == name]
        assert set(rates[: 2 * FIRST[name]]) == {SETTINGS.learning_rate}  # constant in the rungs
        assert 0 < rates[-1] < SETTINGS.learning_rate
        assert sorted(rates, reverse=True) == rates
    scores = {
        name: min(r["val_score"] for r in records if r["stage"] == name and r["epoch"] <= 2 * count)
        for name, count in FIRST.items()
    }
    assert min(scores, key=scores.__getitem__) == "start_0"


def test_the_result_has_the_best_validation_score_of_all_networks(guided):
    result, records = guided
    assert [one["stage"] for one in result.candidates] == ["start_0", "guided", "wide"]
    for one in result.candidates:
        assert one["final"] == one["score"] == min(r["val_score"] for r in records if r["stage"] == one["stage"])
    assert result.score == min(r["val_score"] for r in records)
    assert result.score == pytest.approx(score_of(SPEC.tasks, result.metrics["val"]), abs=1e-6)


def test_the_cost_is_that_of_all_epochs_and_of_the_predictions_of_teachers(guided):
    result, records = guided
    unit = naive_flops(SPEC) * SETTINGS.epochs
    by_stage = {stage: [r for r in records if r["stage"] == stage] for stage in (*CANDIDATES, "distilled")}
    expected = {name: history_flops(spec_of(name), by_stage[name]) / unit for name in CANDIDATES}
    names, found = [task.name for task in SPEC.tasks], {one["stage"]: one for one in result.candidates}
    teachers = [
        hard_network(SPEC, Grouping.from_dict(found[name]["grouping"], names)) for name in ("start_0", "guided")
    ]
    taught = sum(inference_cost(teacher).flops for teacher in teachers)
    own = history_flops(result.network.spec, by_stage["distilled"])
    expected["distilled"] = (own + len(by_stage["distilled"]) * taught) / unit
    assert result.costs == pytest.approx({"naive_mtl": 1.0, **expected})
    assert result.cost == pytest.approx(sum(expected.values()))
    spent = [record["spent"] for record in records]
    assert spent[:4] == [0] * 4
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(result.cost - len(by_stage["distilled"]) * taught / unit)


@pytest.mark.parametrize("budget", [1, 1.5, 2, 3.3, 5, 8, 13])
def test_a_search_never_spends_more_than_its_budget(data, budget):
    result, _ = run(data, SearchOptions(budget=budget), baseline=False)
    assert result.budget == budget
    cheapest = min(result.costs.values())
    assert result.cost <= max(budget, cheapest) + 1e-9
    assert result.grouping.tasks


def test_without_a_number_the_budget_is_two_more_than_the_groups(data):
    result, _ = run(data, SearchOptions(), baseline=False)
    assert result.budget == SPEC.groups + 2
    assert 0.5 * result.budget < result.cost <= result.budget


def test_a_small_budget_has_fewer_candidates(data):
    _, records = run(data, SearchOptions(budget=1.5), baseline=False)
    assert "start_0" not in {record["stage"] for record in records}
    assert {record["stage"] for record in records} <= {"wide", "guided"}


def test_the_gate_starts_at_groups_of_the_feature_overlap_in_the_wide_encoder(data, guided):
    result, records = guided
    state = TrainState.fresh(GroupingNetwork(wide_spec(SPEC)), SETTINGS)
    extend(state, data, SETTINGS, local(), until=FIRST["wide"])
    overlap = feature_overlap(state.validated, data)
    assert result.affinity == overlap.tolist()
    proposed = cluster(overlap, SPEC.groups)
    first = next(r for r in records if r["stage"] == "guided")
    likely = [max(range(SPEC.groups), key=row.__getitem__) for row in first["probabilities"]]
    assert sum(a == b for a, b in zip(likely, proposed, strict=True)) > len(proposed) / 2


def unstable(data, seed, within=10.0, **more):
    """A search whose groups after the first rung differ from those in the middle of it."""
    options = replace(GUIDED, distil=False, within=within)
    return run(data, options, spec=replace(SPEC, seed=seed), seed=seed, baseline=False, **more)


@pytest.mark.parametrize(("seed", "epochs"), [(28, 3), (16, 4), (8, 5), (6, 6)])  # the last one is the limit
def test_the_wide_encoder_is_trained_on_until_its_groups_are_stable(data, seed, epochs):
    result, records = unstable(data, seed)
    settings, proposed = replace(SETTINGS, seed=seed), []
    state = TrainState.fresh(GroupingNetwork(wide_spec(replace(SPEC, seed=seed))), settings)
    for epoch in range(1, epochs + 1):
        assert epoch <= FIRST["wide"] or not are_stable(proposed)
        extend(state, data, settings, local(), until=epoch)
        overlap = feature_overlap(state.validated, data)
        proposed.append(cluster(overlap, SPEC.groups))
    assert are_stable(proposed) is (epochs < LONGEST * FIRST["wide"])
    assert stages(records)[:2] == [("wide", epochs), ("guided", 1)]
    assert result.affinity == overlap.tolist()


@pytest.mark.parametrize("seed", [8, 16, 28])
def test_candidates_are_compared_after_the_same_cost_if_one_has_been_trained_for_longer(data, seed):
    result, records = unstable(data, seed, within=0.0)
    rung = {
        name: [r["val_score"] for r in records if r["stage"] == name and r["epoch"] <= count]
        for name, count in FIRST.items()
    }
    best = min(rung, key=lambda name: min(rung[name]))
    near = min(map(min, rung.values())) + score_noise(rung[best])
    kept = {name for name, scores in rung.items() if min(scores) <= near}
    assert {one["stage"] for one in result.candidates if one["final"] is not None} <= kept
    assert result.chosen in kept


@pytest.fixture(scope="module")
def late(data):
    """A complete search whose groups are stable after five epochs, with its records."""
    return unstable(data, 8)


@pytest.mark.parametrize("number", others_in_soak(range(8), 1, 3))
def test_a_search_interrupted_before_its_groups_are_stable_has_the_same_result(tmp_path, data, late, number):
    expected, records = late
    with pytest.raises(Interrupted):
        unstable(data, 8, folder=tmp_path, stop=number)
    found, rest = unstable(data, 8, folder=tmp_path)
    assert_same_result(found, expected)
    assert without_times(rest) == without_times(records[number:])


def test_with_probability_one_the_proposed_groups_are_trained_without_a_gate(data):
    result, records = run(data, replace(GUIDED, probability=1.0, distil=False), baseline=False)
    proposed = cluster(torch.tensor(result.affinity), SPEC.groups)
    for record in records:
        if record["stage"] == "guided":
            assert record["probabilities"] == [
                [float(k == group) for k in range(SPEC.groups)] for group in proposed
            ]


def test_much_worse_candidates_are_dropped_after_the_first_rung(data):
    result, records = run(data, replace(GUIDED, within=0.0), baseline=False)
    epochs = Counter(record["stage"] for record in records)
    scores = {
        name: min(r["val_score"] for r in records if r["stage"] == name and r["epoch"] <= count)
        for name, count in FIRST.items()
    }
    first, second, third = sorted(CANDIDATES, key=scores.__getitem__)
    by_name = {one["stage"]: one for one in result.candidates}
    assert by_name[first]["final"] is not None
    assert (epochs[second], epochs[third]) == (FIRST[second], FIRST[third])
    assert by_name[second]["final"] is by_name[third]["final"] is None


def test_only_networks_that_improve_the_ensemble_are_distilled_into_the_best_one(data, guided):
    result, records = guided
    assert result.distilled["teachers"] == ["start_0", "guided"]  # and neither the baseline nor the wide encoder
    finals = {one["stage"]: one["final"] for one in result.candidates}
    assert result.distilled["ensemble"] < finals["start_0"] == min(finals.values()) == result.distilled["score"]
    later = min(r["val_score"] for r in records if r["stage"] == "distilled")
    assert result.distilled["kept"]
    assert result.score == result.distilled["final"] == later < finals["start_0"]
    assert score_of(SPEC.tasks, result.distilled["metrics"]["val"]) == pytest.approx(finals["start_0"], abs=1e-6)


def test_nothing_is_distilled_if_no_ensemble_is_better_than_the_best_network(data):
    spec = replace(SPEC, seed=6)
    result, records = run(data, spec=spec, seed=6)
    assert stages(records)[-2:] == [("wide", 21), ("guided", 19)]  # a member of an ensemble
    assert result.distilled == {}


def test_an_ensemble_predicts_the_mean_probability_of_its_networks(data):
    networks = [GroupingNetwork(replace(SPEC, groups=1, seed=seed)) for seed in range(3)]
    found = evaluate(Ensemble(networks), data, "val")
    batch = next(iter(data.evaluate("val", 10_000)))
    kinds = set()
    for task in SPEC.tasks:
        outputs = torch.stack([network(batch.inputs)[task.name] for network in networks])
        mean = outputs.sigmoid().mean(0).logit() if task.kind == "binary" else outputs.mean(0)
        if task.classes:
            mean = outputs.softmax(-1).mean(0).log()
        assert torch.allclose(Ensemble(networks)(batch.inputs)[task.name], mean, atol=1e-5)
        kinds.add(task.kind)
    assert "binary" in kinds
    assert all(not network.training for network in networks)
    assert set(found) == {task.name for task in SPEC.tasks}


def test_a_search_without_distillation_ends_with_the_best_candidate(data):
    result, records = run(data, replace(GUIDED, distil=False), baseline=False)
    assert result.distilled == {}
    assert {record["stage"] for record in records} == set(CANDIDATES)
    assert result.score == min(one["final"] for one in result.candidates if one["final"] is not None)


@pytest.mark.parametrize(
    ("difference", "kept"),
    [(Difference(-1.0, 0.4), True), (Difference(-1.0, 0.6), False), (Difference(0.0, 0.0), False)],
)
def test_naive_mtl_stays_unless_a_network_is_better_by_two_standard_errors(data, monkeypatch, difference, kept):
    module = importlib.import_module("dmtg_core.search.search")  # the package exports a function of this name
    monkeypatch.setattr(module, "difference_of", lambda *_: difference)
    result, _ = run(data, SearchOptions())
    assert (result.chosen != "naive_mtl") is kept
    assert result.difference == difference
    if not kept:
        assert len(result.grouping.groups) == 1
        assert result.network is result.naive
        assert result.metrics == result.baseline
        assert result.distilled == {}


@pytest.mark.parametrize(
    ("cost", "errors"), [(0.9, 0.0), (1.0, 0.0), (1.1, 0.2), (1.5, 1.0), (2.0, 2.0), (7.0, 2.0)]
)
def test_the_difference_that_is_needed_follows_from_the_inference_cost(cost, errors):
    assert is_better(Difference(-errors - 1e-6, 1.0), cost)
    assert not is_better(Difference(-errors + 1e-6, 1.0), cost)
    assert not is_better(Difference(0.0, 0.0), cost)


def test_the_difference_to_naive_mtl_is_that_of_the_scores(data):
    result, _ = run(data, SearchOptions(distil=False))
    naive, best = (score_of(SPEC.tasks, found["val"]) for found in (result.baseline, result.metrics))
    assert result.chosen != "naive_mtl"
    assert result.difference.value == pytest.approx(best - naive, abs=1e-6)
    assert 0 < 2 * result.difference.error < -result.difference.value


def test_the_wide_encoder_has_no_higher_inference_cost_than_the_groups(data):
    spec = replace(SPEC, seed=2)
    result, _ = run(data, replace(GUIDED, distil=False), spec=spec, seed=2, baseline=False)
    assert result.chosen == "wide"
    assert len(result.grouping.groups) == 1
    names = [task.name for task in SPEC.tasks]
    spread = Grouping.from_assignment(names, [n % SPEC.groups for n in range(len(names))])
    assert inference_cost(result.network).flops <= grouping_cost(SPEC, spread).flops


EPOCHS = 57  # of all stages


@pytest.mark.parametrize("number", others_in_soak(range(EPOCHS), 9, 50))
def test_an_interrupted_search_has_the_same_result(tmp_path, data, guided, number):
    expected, records = guided
    assert len(records) == EPOCHS
    with pytest.raises(Interrupted):
        run(data, folder=tmp_path, stop=number)
    found, rest = run(data, folder=tmp_path)
    assert_same_result(found, expected)
    assert without_times(rest) == without_times(records[number:])


CROWDED, SIXTEEN_RUNS = samples.crowded(SPEC), SearchOptions(budget=16, distil=False)


def run_crowded(**more):
    """A search of so many tasks that their overlap is measured in an encoder of its own."""
    data = samples.data(CROWDED.input, CROWDED.tasks)
    return run(data, SIXTEEN_RUNS, spec=CROWDED, baseline=False, epochs=40, **more)


@pytest.fixture(scope="module")
def crowded():
    """A complete search of many tasks with its records."""
    return run_crowded()


def test_the_overlap_of_many_tasks_is_measured_in_an_encoder_of_its_own(crowded):
    result, records = crowded
    stages = [record["stage"] for record in records]
    assert stages[:3] == ["overlap_encoder", "overlap_encoder", "wide"]
    assert "overlap_encoder" not in [candidate["stage"] for candidate in result.candidates]
    assert len(result.affinity) == len(CROWDED.tasks)
    epoch = Budget(CROWDED, SETTINGS, 16).epoch_of(overlap_spec(CROWDED))
    assert result.costs["overlap_encoder"] == pytest.approx(2 * epoch / 10)
    assert sum(result.costs.values()) == pytest.approx(result.cost)
    assert result.cost <= 16


@pytest.mark.parametrize("number", others_in_soak(range(4), 1))
def test_an_interrupted_search_of_many_tasks_has_the_same_result(tmp_path, crowded, number):
    expected, records = crowded
    with pytest.raises(Interrupted):
        run_crowded(folder=tmp_path, stop=number)
    found, rest = run_crowded(folder=tmp_path)
    assert_same_result(found, expected)
    assert without_times(rest) == without_times(records[number:])


def test_with_one_branch_there_are_no_further_candidates(data):
    result, _ = run(data, SearchOptions(), spec=replace(SPEC, groups=1), baseline=False)
    assert [candidate["stage"] for candidate in result.candidates] == ["start_0"]
    assert result.affinity == []
    assert len(result.grouping.groups) == 1
    assert result.cost == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "magic"}, "unknown method 'magic', expected one of guided, dmtg"),
        ({"starts": -1}, "starts must be at least"),
        ({"budget": 0.9}, "budget must be at least 1 run"),
        ({"budget": float("inf")}, "budget must be at least 1 run"),
        ({"rung": 0.0}, "rung"),
        ({"compare": 1.5}, "compare"),
        ({"probability": 1.1}, "probability"),
        ({"within": -0.1}, "within"),
    ],
)
def test_options_out_of_range_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        SearchOptions(**options)


def test_the_noise_of_a_score_is_that_of_the_second_half_of_its_search():
    assert score_noise([9.0, 0.0, 1.0, 3.0]) == 2.0
    assert score_noise([1.0, 2.0, 2.5, 3.5, 3.0, 3.25]) == 0.375
    assert score_noise([1.0]) == 0.0
    assert score_noise([0.0, 1.0, float("inf"), 2.0]) == 0.0
