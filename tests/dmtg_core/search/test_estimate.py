"""The estimate before a search: it never spends more, and time follows from the timed steps."""

import importlib
import math
import tempfile
import time
from dataclasses import replace
from itertools import takewhile

import pytest
import torch

from dmtg_core import EncoderSpec, SearchOptions, search, training_flops
from dmtg_core.network.cost import naive_flops
from dmtg_core.search.budget import LONGEST, Budget
from dmtg_core.search.estimate import (
    GATE,
    STEPS,
    WARM_UP,
    Epoch,
    Plan,
    _TimedData,
    kind_of,
    measure,
    networks,
    peak_memory,
    plan,
    seconds_of,
)
from dmtg_core.search.guided import GROUPS, MEMBERS
from dmtg_core.search.options import BASELINE
from dmtg_core.training.warm_start import WarmStart
from tests.dmtg_core import samples
from tests.dmtg_core.searches import SETTINGS, SPEC, local

LONG = replace(SETTINGS, epochs=10)
CROWDED = samples.crowded(SPEC)


@pytest.fixture(scope="module")
def data():
    return samples.data(SPEC.input, SPEC.tasks, missing=0.2)


CASES = {
    "default": (SPEC, LONG, SearchOptions()),
    "the least": (SPEC, LONG, SearchOptions(budget=1)),
    "large": (SPEC, SETTINGS, SearchOptions(budget=12, within=10.0)),
    "no distillation": (SPEC, SETTINGS, SearchOptions(budget=8, distil=False, wide=False)),
    "one epoch": (SPEC, replace(SETTINGS, epochs=1), SearchOptions(budget=2)),
    "published": (SPEC, SETTINGS, SearchOptions(method="dmtg", starts=2)),
    "one group": (replace(SPEC, groups=1), SETTINGS, SearchOptions()),
    "many tasks": (CROWDED, LONG, SearchOptions(budget=8)),
    "many tasks, little budget": (CROWDED, LONG, SearchOptions(budget=2)),
}


def assert_begins_with(planned, records):
    """Assert that the first rung is as planned; its first candidate goes on until its groups are stable."""
    rung, records = planned.rung, records[planned.overlap_epochs :]
    stages = [record["stage"] for record in records]
    (first, least), *others = rung.items()
    longer = len(list(takewhile(lambda name: name == first, stages)))
    assert least <= planned.longest <= LONGEST * least
    assert least <= longer
    assert longer <= planned.longest or not others  # one candidate goes on to the end
    following = [name for name, count in others for _ in range(count)]
    assert stages[longer : longer + len(following)] == following


@pytest.mark.parametrize("case", CASES)
def test_a_search_spends_no_more_than_the_estimate_and_begins_as_planned(case, data):
    spec, settings, options = CASES[case]
    if spec.tasks != SPEC.tasks:
        data = samples.data(spec.input, spec.tasks)
    expected, records = plan(spec, settings, options, baseline=False), []
    found = search(spec, data, settings, options, baseline=False, context=local(on_record=records.append))
    assert 0 < found.cost <= expected.runs + 1e-9
    assert expected.budget == (None if spec.groups == 1 else found.budget)
    for name in expected.left_out:
        assert name not in [record["stage"] for record in records]
    assert expected.overlap_epochs == (case == "many tasks")
    assert [record["stage"] for record in records[: expected.overlap_epochs]] == (
        ["overlap_encoder"] * expected.overlap_epochs
    )
    assert_begins_with(expected, records)
    assert ("overlap_encoder" in found.costs) is (case == "many tasks")


def test_the_baseline_is_one_run_more_and_of_any_other_budget_the_rest_stays(data):
    ours, without = (plan(SPEC, LONG, SearchOptions(), baseline=baseline) for baseline in (True, False))
    assert (ours.baseline, without.baseline) == (1, 0)
    assert ours == replace(without, baseline=1, members=ours.members)
    assert (ours.members, without.members) == (1, 0)  # naive MTL is trained as a member otherwise
    assert ours.runs == ours.budget == SPEC.groups + 2
    small, large = (plan(SPEC, LONG, SearchOptions(budget=runs)) for runs in (1, 40))
    assert {*small.left_out, *small.rung} == {*ours.rung}
    assert small.left_out
    assert small.epochs < ours.epochs < large.epochs
    assert large.members == MEMBERS
    assert plan(SPEC, LONG, SearchOptions(budget=40, distil=False)).members == 0


def test_the_models_of_a_grouping_are_a_candidate_too(data):
    trained = search(SPEC, data, SETTINGS, SearchOptions(method="dmtg"), baseline=False, context=local())
    models = list(trained.network.specialise().values())
    assert len(models) > 1
    start, options = WarmStart(models, [f"{i}" for i in range(len(models))]), SearchOptions(budget=12)
    assert start.is_grouping(SPEC.tasks)
    expected, records = plan(SPEC, LONG, options, baseline=False, champion=True), []
    context = local(on_record=records.append)
    found = search(SPEC, data, LONG, options, baseline=False, context=context, warm_start=start)
    assert list(expected.rung) == ["wide", "guided", "champion", "start_0"]
    assert_begins_with(expected, records)
    assert found.cost <= expected.runs + 1e-9


@pytest.mark.parametrize("baseline", [True, False])
def test_room_for_further_networks_is_their_training_and_half_as_many_epochs_of_distillation(baseline):
    found = plan(SPEC, LONG, SearchOptions(budget=40), baseline=baseline)
    naive, groups = (found.costs[name] * LONG.epochs for name in ("naive_mtl", GROUPS))
    best = found.rung_runs + (LONG.epochs - found.rung["guided"]) * found.costs[GROUPS]
    narrow = 0 if baseline else naive  # the baseline is there already
    room = len(found.rung) * found.rung["guided"] * found.costs[GATE]  # for the first rung
    needed = [
        best + narrow + (groups + groups / 3 + naive / 3) / 2,
        best + narrow + groups + (groups + 2 * groups / 3 + naive / 3) / 2,
        best + narrow + 2 * groups + (groups + 3 * groups / 3 + naive / 3) / 2,
    ]
    for count, runs in enumerate(needed):
        for budget, members in ((runs - 1e-6, count), (runs + 1e-6, count + 1)):
            options = SearchOptions(budget=budget, compare=min(room / budget + 1e-9, 1))
            assert plan(SPEC, LONG, options, baseline=baseline).members == members


@pytest.mark.parametrize("case", ["default", "large", "no distillation", "many tasks"])
def test_candidates_of_a_rung_have_the_same_cost(case):
    spec, settings, options = CASES[case]
    options = replace(options, budget=100)
    found = plan(spec, settings, options)
    costs = [count * found.costs[kind_of(name)] for name, count in found.rung.items()]
    assert found.rung["guided"] == found.rung["start_0"] == max(round(options.rung * settings.epochs), 1)
    assert len(set(found.rung.values())) == 2
    for name, cost in zip(found.rung, costs, strict=True):
        assert abs(cost - max(costs)) <= found.costs[kind_of(name)]  # epochs are whole
    assert found.rung_runs == pytest.approx(
        sum(costs) + found.overlap_epochs * found.costs.get("overlap_encoder", 0)
    )


@pytest.mark.parametrize("compare", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("budget", [1.0, 2.0, 5.0, 17.0, 300.0])
def test_the_first_rung_has_all_candidates_that_its_share_allows(budget, compare):
    costs = {"wide": 0.04, "guided": 0.1, "start_0": 0.1, "start_1": 0.1}
    found = Budget(SPEC, LONG, budget).first_rung(costs, compare, 0.5)
    cost = {name: count * costs[name] for name, count in found.items()}
    limit = compare * budget
    assert list(found) == list(costs)[: len(found)]
    assert len(found) == 1 or sum(cost.values()) <= limit
    assert len(found) == 1 or len(found) * max(costs[name] for name in found) <= limit
    if len(found) < len(costs):
        assert (len(found) + 1) * 0.1 > limit
    else:
        assert found["guided"] == min(5, int(limit / 0.4))
        assert found["wide"] == min(round(found["guided"] * 2.5), int(limit / 4 / costs["wide"]))


@pytest.mark.parametrize(
    ("runs", "epochs", "cost", "longest"),
    [(30, 4, 0.1, 12), (3, 4, 0.1, 10), (2, 4, 0.1, 6), (1, 4, 0.1, 4), (1, 4, 2.0, 4), (12, 1, 1.0, 3)],
)
def test_groups_are_proposed_within_three_rungs_and_a_third_of_the_budget(runs, epochs, cost, longest):
    assert Budget(SPEC, LONG, runs).longest(epochs, cost) == longest


def test_costs_are_those_of_the_networks():
    found = networks(SPEC, SearchOptions())
    assert list(found) == ["naive_mtl", "wide", GATE, GROUPS]
    costs = plan(SPEC, LONG, SearchOptions(), found=found).costs
    unit = naive_flops(SPEC) * LONG.epochs
    for name, network in found.items():
        assert costs[name] == training_flops(network) / unit
    assert costs["naive_mtl"] == pytest.approx(1 / LONG.epochs)
    assert len(found[GATE].pairs) == SPEC.groups * len(SPEC.tasks)
    assert len(found[GROUPS].pairs) == len(SPEC.tasks)
    assert len(found[GROUPS].grouping().groups) == SPEC.groups
    wider = networks(CROWDED, SearchOptions())
    assert list(wider) == ["naive_mtl", "wide", "overlap_encoder", GATE, GROUPS]
    ratio = training_flops(wider["overlap_encoder"]) / training_flops(wider["wide"])
    assert 2 < ratio < 5  # four times the operations, in whole units
    assert list(networks(CROWDED, SearchOptions(wide=False))) == ["naive_mtl", "one_encoder", GATE, GROUPS]
    fixed = replace(SPEC, encoder=EncoderSpec("mlp", 1, {"widths": [8, 8]}))
    assert "one_encoder" in networks(fixed, SearchOptions(wide=False))


def test_the_time_is_that_of_the_rungs_and_of_the_rest_in_the_slower_network():
    costs = {"naive_mtl": 0.1, "wide": 0.3, GATE: 0.4, GROUPS: 0.2}
    guided = Plan(5.0, 5.0, 1, (), 0, {"wide": 3, "guided": 2, "start_0": 2}, 3, 2.5, 20, 0, costs)
    epochs = {"naive_mtl": 1.0, "wide": 6.0, GATE: 5.0, GROUPS: 3.0}
    # 10 epochs of naive MTL, the first rung, and 2.5 runs at 20 s (wide) rather than 15 s (groups)
    assert seconds_of(guided, LONG, epochs) == pytest.approx(10 * 1 + 3 * 6 + 2 * (5 + 5) + 2.5 * 20)
    fixed = Plan(5.0, None, 0, (), 0, {"start_0": 5, "start_1": 5}, 5, 4.0, 10, 0, costs)
    assert seconds_of(fixed, LONG, epochs) == pytest.approx(5 * (5 + 5) + 5 * 3)
    assert Epoch(0.5, 0.25, 2.0).seconds(steps=10, batches=4) == 8.0


def test_timed_steps_are_the_steps_between_batches(monkeypatch, data):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timed = _TimedData(data, torch.device("cpu"))
    assert len(list(timed.train(1, 16))) == STEPS == 5
    assert timed.steps_seconds == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_networks_are_timed_as_they_are_trained(data):
    found = networks(SPEC, SearchOptions())
    timed, memory = measure(found, data, SETTINGS, local())
    assert timed.keys() == found.keys()
    for epoch in timed.values():
        assert 0 < epoch.step < math.inf
        assert 0 < epoch.validation < math.inf
        assert epoch.rest >= 0
    assert memory is not None
    assert 2**26 < memory <= peak_memory(torch.device("cpu"))  # torch alone takes more than 64 MiB
    few = samples.data(SPEC.input, SPEC.tasks, rows=4)  # fewer steps in an epoch than are timed
    assert few.steps(SETTINGS.batch_size) < WARM_UP
    assert measure({"naive_mtl": found["naive_mtl"]}, few, SETTINGS, local())[0]["naive_mtl"].step > 0


@pytest.mark.parametrize("average", [1.0, 0.0])
def test_weights_are_averaged_as_in_the_search(data, monkeypatch, average):
    module, found = importlib.import_module("dmtg_core.search.estimate"), networks(SPEC, SearchOptions())
    names = {id(network): name for name, network in found.items()}
    train, averaged = module.advance, []

    def advance(state, *arguments, **more):
        if state.average is not None:
            averaged.append(names[id(state.network)])
        return train(state, *arguments, **more)

    monkeypatch.setattr(module, "advance", advance)
    measure(found, data, replace(SETTINGS, average=average), local())
    assert sorted(averaged) == sorted(set(found) - {BASELINE} if average else [])


def test_without_space_for_temporary_files_the_steps_are_timed_all_the_same(data, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no"))
    found = {"naive_mtl": networks(SPEC, SearchOptions())["naive_mtl"]}
    assert measure(found, data, SETTINGS, local())[0]["naive_mtl"].step > 0
