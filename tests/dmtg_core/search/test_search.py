"""A whole search: naive MTL, several starts, the best one fine-tuned; interruptions do not change the result."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmtg_core import (
    ArrayData,
    Arrays,
    Grouping,
    GroupingNetwork,
    NonFiniteLossError,
    SearchOptions,
    evaluate,
    fit,
    search,
    training_flops,
)
from dmtg_core.search.options import BASELINE
from dmtg_core.training.metrics import normalized_gain
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted, without_times
from tests.dmtg_core.samples import SAMPLEWISE, assert_same_tensors, mlp_spec
from tests.dmtg_core.searches import SETTINGS, SPEC, assert_same_result, local
from tests.soak import others_in_soak

DMTG = SearchOptions("dmtg", starts=2)
STAGES = [("naive_mtl", n) for n in (1, 2, 3, 4)]
STAGES += [(f"start_{i}", n) for i in (0, 1) for n in (1, 2)]
STAGES += [("start_0", n) for n in (3, 4)]


@pytest.fixture(scope="module")
def data() -> ArrayData:
    return samples.data(SPEC.input, SPEC.tasks, missing=0.2)


@pytest.fixture(scope="module")
def undisturbed(data):
    """A complete search with its records."""
    records = []
    result = search(SPEC, data, SETTINGS, options=DMTG, context=local(on_record=records.append))
    return result, records


def test_stages_run_in_order_for_their_share_of_the_epochs(undisturbed):
    _, records = undisturbed
    assert [(record["stage"], record["epoch"]) for record in records] == STAGES


def test_the_result_is_the_hard_network_with_its_metrics_on_every_split(undisturbed, data):
    result, _ = undisturbed
    assert result.grouping == result.network.grouping()
    assert len(result.network.pairs) == len(SPEC.tasks)
    assert not result.network.training
    assert result.metrics.keys() == result.baseline.keys() == {"val", "test"}
    for split, expected in result.metrics.items():
        assert evaluate(result.network, data, split, context=local()) == expected
    assert set(result.metrics["test"]) == {task.name for task in SPEC.tasks}


def test_the_start_with_the_best_validation_score_is_trained_to_the_end(undisturbed):
    result, _ = undisturbed
    scores = [start["score"] for start in result.candidates]
    assert [start["stage"] for start in result.candidates] == ["start_0", "start_1"]
    assert len(set(scores)) == 2
    best = min(result.candidates, key=lambda start: start["score"])
    assert Grouping.from_dict(best["grouping"], result.grouping.tasks) == result.grouping


def test_starts_differ_in_their_seeds(undisturbed, data):
    _, records = undisturbed
    firsts = [r for r in records if r["stage"].startswith("start_") and r["epoch"] == 1]
    assert firsts[0]["train_loss"] != firsts[1]["train_loss"]
    alone = []
    spec, settings = replace(SPEC, seed=SPEC.seed + 1), replace(SETTINGS, seed=SETTINGS.seed + 1)
    search(spec, data, settings, SearchOptions("dmtg"), baseline=False, context=local(on_record=alone.append))
    second = [r for r in records if r["stage"] == "start_1"]
    for here, there in zip(second, alone[:2], strict=True):
        other = {"stage": "", "spent": 0.0, "gain": None}  # the cost of the first start is counted too
        assert without_times([here | other]) == without_times([there | other])


def test_epochs_have_their_gain_once_naive_mtl_has_been_trained(undisturbed):
    result, records = undisturbed
    gains = [record["gain"] for record in records if record["stage"] != BASELINE]
    expected = [
        normalized_gain(SPEC.tasks, record["val"], result.baseline["val"])
        for record in records
        if record["stage"] != BASELINE
    ]
    assert gains == expected
    assert all(math.isfinite(gain) for gain in gains)
    assert {record["gain"] for record in records if record["stage"] == BASELINE} == {None}


def test_one_start_without_a_baseline_is_a_single_training(data):
    result = search(SPEC, data, SETTINGS, SearchOptions("dmtg"), baseline=False, context=local())
    state = fit(GroupingNetwork(SPEC), data, SETTINGS, local())
    assert result.baseline == {}
    assert len(result.candidates) == 1
    assert_same_tensors(samples.snapshot(result.network), samples.snapshot(state.network))


def test_the_baseline_is_one_branch_trained_for_all_epochs(undisturbed, data):
    result, records = undisturbed
    naive = fit(GroupingNetwork(replace(SPEC, groups=1, sampling="fixed")), data, SETTINGS, local())
    assert evaluate(naive.network, data, "test", context=local()) == result.baseline["test"]
    assert [r["heads"] for r in records if r["stage"] == "naive_mtl"] == [len(SPEC.tasks)] * 4


# each epoch is also interrupted in the next test, in one search
@pytest.mark.parametrize(("stage", "epoch"), others_in_soak(STAGES, ("start_0", 3)))
def test_a_search_interrupted_in_any_stage_has_the_same_result(tmp_path, data, undisturbed, stage, epoch):
    expected, records = undisturbed

    def kill(record):
        if (record["stage"], record["epoch"]) == (stage, epoch):
            raise Interrupted

    with pytest.raises(Interrupted):
        search(SPEC, data, SETTINGS, options=DMTG, context=local(tmp_path, on_record=kill))
    rest = []
    found = search(SPEC, data, SETTINGS, options=DMTG, context=local(tmp_path, on_record=rest.append))
    assert_same_result(found, expected)
    assert without_times(rest) == without_times(records[STAGES.index((stage, epoch)) :])


def test_a_search_interrupted_at_each_epoch_has_the_same_result(tmp_path, data, undisturbed):
    seen: Counter = Counter()

    def kill_once(record):
        seen[record["stage"], record["epoch"]] += 1
        if seen[record["stage"], record["epoch"]] == 1:
            raise Interrupted

    result = None
    for _ in range(len(STAGES) + 1):
        try:
            result = search(SPEC, data, SETTINGS, options=DMTG, context=local(tmp_path, on_record=kill_once))
        except Interrupted:
            continue
    assert result is not None
    assert_same_result(result, undisturbed[0])
    assert set(seen.values()) == {2}


def test_a_finished_search_resumes_without_training(tmp_path, data, undisturbed):
    search(SPEC, data, SETTINGS, options=DMTG, context=local(tmp_path))
    context = local(tmp_path, on_record=lambda _: pytest.fail("trained"))
    assert_same_result(search(SPEC, data, SETTINGS, options=DMTG, context=context), undisturbed[0])


def test_a_search_over_all_epochs_ends_with_hard_groups(data):
    settings = replace(SETTINGS, search_share=1.0, prune_threshold=0.0)
    result = search(SPEC, data, settings, options=DMTG, context=local())
    assert len(result.network.pairs) == len(SPEC.tasks)
    assert result.grouping == result.network.grouping()


def test_selections_use_validation_data_and_not_the_test_split(data, undisturbed):
    test = data.splits["test"]
    shuffled = Arrays(test.inputs[::-1].copy(), {n: y.copy() for n, y in test.labels.items()}, test.present)
    other = ArrayData({**data.splits, "test": shuffled}, SPEC.tasks)
    found = search(SPEC, other, SETTINGS, options=DMTG, context=local())
    expected, _ = undisturbed
    assert_same_tensors(samples.snapshot(found.network), samples.snapshot(expected.network))
    assert found.metrics["val"] == expected.metrics["val"]
    assert found.metrics["test"] != expected.metrics["test"]


def test_only_requested_splits_are_evaluated(data):
    splits = {name: data.splits[name] for name in ("train", "val")}
    result = search(SPEC, ArrayData(splits, SPEC.tasks), SETTINGS, splits=("val",), context=local())
    assert result.metrics.keys() == {"val"}


def test_a_loss_that_is_not_finite_stops_the_search_and_names_its_task():
    data = samples.data(SPEC.input, SPEC.tasks)
    data.splits["train"].labels["age"][3] = np.inf
    with pytest.raises(NonFiniteLossError, match="age"):
        search(SPEC, data, SETTINGS, context=local())


def test_a_search_needs_a_start():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SearchOptions("dmtg", starts=0)


def test_a_checkpoint_that_lost_a_file_is_refused_by_its_name(tmp_path, data):
    search(SPEC, data, SETTINGS, options=DMTG, context=local(tmp_path))
    for folder in tmp_path.iterdir():
        (folder / "search.json").unlink()
    with pytest.raises(ValueError, match=r"search\.json"):
        search(SPEC, data, SETTINGS, options=DMTG, context=local(tmp_path))


@pytest.mark.parametrize("method", others_in_soak(["dmtg", "guided"], "dmtg"))
def test_a_search_of_images_with_dense_tasks_resumes_too(tmp_path, method):
    spec, options = samples.image_spec(samples.ONE_OF_EACH, groups=2), SearchOptions(method)
    data = samples.data(spec.input, spec.tasks, 12)
    settings = replace(SETTINGS, batch_size=6)
    expected = search(spec, data, settings, options, baseline=False, context=local())

    def kill(record):
        if record["epoch"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        search(spec, data, settings, options, baseline=False, context=local(tmp_path, on_record=kill))
    found = search(spec, data, settings, options, baseline=False, context=local(tmp_path))
    assert_same_result(found, expected)
    torch.manual_seed(0)
    inputs = samples.batch(spec.input, spec.tasks).inputs
    with torch.no_grad():
        hard = expected.network(inputs)
        for model in expected.network.specialise().values():
            assert all(torch.equal(value, hard[name]) for name, value in model(inputs).items())


def test_more_groups_than_tasks_can_be_searched():
    spec = mlp_spec(SAMPLEWISE[:2], groups=4)
    data = samples.data(spec.input, spec.tasks, 24)
    result = search(spec, data, SETTINGS, context=local())
    assert 1 <= len(result.grouping.groups) <= 2


def test_the_cost_counts_all_live_heads_of_all_epochs_in_units_of_naive_mtl(data):
    settings = replace(SETTINGS, prune_threshold=0.0)
    result = search(SPEC, data, settings, SearchOptions("dmtg"), baseline=False, context=local())
    full = GroupingNetwork(SPEC)
    naive = training_flops(GroupingNetwork(replace(SPEC, groups=1)))
    expected = 2 * (training_flops(full) + training_flops(result.network)) / (4 * naive)
    assert result.cost == pytest.approx(expected)
    assert 1 < result.cost <= SPEC.groups
