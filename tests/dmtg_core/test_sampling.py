"""The sampler "balanced": weights by hand, how often samples occur, the same batches for any number of workers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dmtg_core import ArrayData, Arrays, GroupingNetwork, Task, fit
from dmtg_core.sampling import class_ids, epoch_order, repeats, sample_weights
from dmtg_core.training.data import Chunks, DeviceArrays
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted
from tests.dmtg_core.samples import assert_same_tensors, mlp_spec
from tests.dmtg_core.training.test_loop import SEARCHING
from tests.dmtg_core.training.test_resume import stopping_after
from tests.dmtg_core.training.test_step import local

FLAG = Task("flag", "binary")


def flags(values, **present) -> Arrays:
    """Samples with a flag, whose input is their number."""
    numbers = np.arange(len(values), dtype=np.float32)[:, None]
    return Arrays(numbers, {"flag": np.array(values, np.uint8)}, {k: np.array(v) for k, v in present.items()})


def test_the_weight_of_a_sample_is_that_of_its_class():
    # ten labels in two classes: 10 / (2 · 8) and 10 / (2 · 2)
    assert sample_weights([FLAG], [flags([0] * 5), flags([1, 0, 0, 0, 1])]).tolist() == [0.625] * 5 + [
        2.5, 0.625, 0.625, 0.625, 2.5,
    ]  # fmt: skip


def test_the_weight_of_several_labels_is_the_largest_and_that_of_none_is_1():
    tasks = [FLAG, Task("colour", "multiclass", 5, ignore_index=4), Task("age", "regression")]
    labels = {
        "flag": np.array([0, 0, 0, 1, 1, 0, 0], np.uint8),
        "colour": np.array([0, 1, 1, 1, 3, 4, 4], np.uint8),
        "age": np.zeros(7, np.float32),
    }
    part = Arrays(np.zeros((7, 1)), labels, {"flag": np.array([True] * 5 + [False, True])})
    # flags: six labels, 6 / (2 · 4) for 0 and 6 / (2 · 2) for 1; colours: five labels of three classes
    expected = [5 / 3, 0.75, 0.75, 1.5, 5 / 3, 1.0, 0.75]
    assert sample_weights(tasks, [part]).tolist() == pytest.approx(expected)


def test_class_ids_of_small_types_and_of_missing_labels():
    bytes_ = Arrays(np.zeros((3, 1)), {"c": np.array([0, 255, 254], np.uint8)}, {})
    assert class_ids(Task("c", "multiclass", 256), bytes_).tolist() == [0, 255, 254]
    assert class_ids(Task("c", "multiclass", 255, ignore_index=255), bytes_).tolist() == [0, -1, 254]
    values, present = np.array([1.0, np.nan, 0.0], np.float32), np.array([True, True, False])
    known = Arrays(np.zeros((3, 1)), {"c": values}, {"c": present})
    assert class_ids(Task("c", "binary"), known).tolist() == [1, -1, -1]
    booleans = Arrays(np.zeros((2, 1)), {"c": np.array([True, False])}, {})
    assert class_ids(Task("c", "binary"), booleans).tolist() == [1, 0]


def test_samples_of_three_classes_occur_as_often_as_computed_by_hand():
    # six labels of three classes: 6 / (3 · 1) = 2 for each rare sample, 6 / (3 · 4) = 1/2 for each other one
    task, labels = Task("c", "multiclass", 3), np.array([0, 2, 0, 0, 1, 0], np.uint8)
    weights = sample_weights([task], [Arrays(np.zeros((6, 1)), {"c": labels}, {})])
    drawn = set()
    for epoch in range(40):
        found = repeats(weights, [1, epoch])
        assert found[[1, 4]].tolist() == [2, 2]
        assert sorted(found[[0, 2, 3, 5]]) == [0, 0, 1, 1]
        drawn.add(tuple(found))
    assert len(drawn) == 6  # each pair of the four


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=50), seed=st.integers(0, 99))
def test_each_sample_occurs_its_share_rounded_up_or_down(weights, seed):
    found, shares = repeats(np.array(weights), [seed, 0]), np.array(weights) * len(weights) / sum(weights)
    assert found.sum() == len(weights)
    assert (np.abs(found - shares) < 1 + 1e-6).all()


def test_the_mean_number_of_a_sample_is_its_share():
    weights = np.array([0.625] * 8 + [2.5] * 2)
    mean = np.mean([repeats(weights, [0, epoch]) for epoch in range(3000)], 0)
    assert mean == pytest.approx(weights, abs=0.05)


def test_uniform_is_a_permutation_and_its_order_that_of_earlier_versions():
    expected = np.random.default_rng([3, 5]).permutation(20)
    assert epoch_order(20, None, [3, 5]).tolist() == expected.tolist()


def epochs_of(data: ArrayData, batch_size: int, epoch: int, start: int = 0) -> list[list[int]]:
    return [batch.inputs[:, 0].int().tolist() for batch in data.train(epoch, batch_size, start)]


def scarce(rows: int, **options) -> ArrayData:
    """Every tenth sample is positive."""
    split = flags([i % 10 == 0 for i in range(rows)])
    return ArrayData({"train": split, "val": split}, [FLAG], sampler="balanced", **options)


@given(rows=st.integers(20, 90), workers=st.integers(2, 4), batch_size=st.integers(4, 30), start=st.integers(0, 3))
def test_workers_share_the_batches_of_one_and_a_resumed_epoch_has_the_rest(rows, workers, batch_size, start):
    assume(scarce(rows).steps(batch_size) == scarce(rows, world_size=workers).steps(batch_size))
    alone = epochs_of(scarce(rows), batch_size, 1)
    parts = [epochs_of(scarce(rows, rank=r, world_size=workers), batch_size, 1) for r in range(workers)]
    for number, whole in enumerate(alone):
        assert [i for part in parts for i in part[number]] == whole
    assert epochs_of(scarce(rows), batch_size, 1, start) == alone[start:]


def test_half_of_the_drawn_samples_are_positive_and_the_draw_depends_on_seed_and_epoch():
    found = {}
    for seed in (1, 2):
        for epoch in (0, 1):
            drawn = Counter(i for batch in epochs_of(scarce(200, seed=seed), 16, epoch) for i in batch)
            assert sum(drawn.values()) == 200
            positive = [drawn[i] for i in range(0, 200, 10)]  # 20 samples with the weight 5
            assert positive == [5] * 20
            found[tuple(sorted(drawn.items()))] = True
    assert len(found) == 4


def test_samples_on_the_device_and_in_parts_are_drawn_as_those_in_one_array():
    whole = flags([i % 7 == 0 for i in range(40)], flag=[i % 5 > 0 for i in range(40)])
    parts = [whole.part(slice(0, 11)), whole.part(slice(11, 40))]
    drawn = [
        epochs_of(ArrayData({"train": split, "val": whole}, [FLAG], sampler="balanced"), 8, 2)
        for split in (whole, Chunks(parts), DeviceArrays(Chunks(parts), torch.device("cpu")))
    ]
    first, *others = [[sorted(batch) for batch in batches] for batches in drawn]
    assert others == [first, first]


def test_validation_has_each_sample_once():
    seen = [i for batch in scarce(30).evaluate("val", 8) for i in batch.inputs[:, 0].int().tolist()]
    assert seen == list(range(30))


def test_a_sampler_without_classes_or_with_an_unknown_name_is_refused():
    tasks, split = [Task("age", "regression")], Arrays(np.zeros((4, 1)), {"age": np.zeros(4, np.float32)}, {})
    with pytest.raises(ValueError, match="balanced needs a binary or multiclass task"):
        ArrayData({"train": split}, tasks, sampler="balanced")
    with pytest.raises(ValueError, match="unknown sampler 'even', expected one of uniform, balanced"):
        ArrayData({"train": split}, tasks, sampler="even")


def test_a_run_interrupted_within_an_epoch_has_the_same_result(tmp_path):
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2, sampler="balanced")
    settings = replace(SEARCHING, epochs=2, checkpoint_every=1)
    expected = fit(GroupingNetwork(spec), data, settings, local())
    assert data.steps(settings.batch_size) > 1
    with pytest.raises(Interrupted):
        fit(GroupingNetwork(spec), data, settings, stopping_after(local(tmp_path), 1))
    resumed = fit(GroupingNetwork(spec), data, settings, local(tmp_path))
    assert_same_tensors(samples.snapshot(resumed.network), samples.snapshot(expected.network))
