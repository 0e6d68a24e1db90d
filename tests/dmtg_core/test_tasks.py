"""Tasks: validation, encoding of stored values, and decoding."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import InputSpec, Task
from dmtg_core.tasks import LOSSES, METRICS, MOST_SHARES, check_names
from tests.dmtg_core.samples import MIXED, raw_labels


@pytest.mark.parametrize(
    ("kind", "channels", "loss", "metric"),
    [
        ("binary", 1, "binary_cross_entropy", "accuracy"),
        ("multiclass", 2, "cross_entropy", "accuracy"),
        ("regression", 1, "mse", "rmse"),
        ("dense_classification", 2, "cross_entropy", "miou"),
        ("dense_regression", 1, "l1", "rmse"),
    ],
)
def test_each_kind_has_its_default_loss_and_metric(kind, channels, loss, metric):
    task = Task("t", kind, channels)
    assert (task.loss, task.metric) == (loss, metric)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ordinal"}, r"'t'.*unknown kind 'ordinal'.*binary"),
        ({"kind": "binary", "loss": "mse"}, r"'t'.*unknown loss 'mse'.*binary_cross_entropy"),
        ({"kind": "regression", "metric": "accuracy"}, r"'t'.*unknown metric 'accuracy'.*rmse"),
        ({"kind": "multiclass"}, r"at least 2 classes, got 1"),
        ({"kind": "dense_classification", "channels": 1}, r"at least 2 classes, got 1"),
        ({"kind": "binary", "channels": 2}, r"1 channel, got 2"),
        ({"kind": "regression", "channels": 0}, r"at least 1, got 0"),
        ({"kind": "regression", "channels": 3, "offset": (1.0, 2.0)}, r"offset needs 1 or 3 values, got 2"),
        ({"kind": "regression", "channels": 3, "scale": (1.0, 2.0)}, r"scale needs 1 or 3 values, got 2"),
        ({"kind": "regression", "scale": (0.0,)}, r"scale must be positive"),
        ({"kind": "regression", "scale": (-1.0,)}, r"scale must be positive"),
        ({"kind": "multiclass", "channels": 3, "labels": ("a", "b")}, r"2 class names for 3 classes"),
        ({"kind": "dense_regression", "channels": 2, "metric": "within_30"}, r"within_30 needs 3 channels, got 2"),
        ({"kind": "dense_regression", "metric": "mean_angle"}, r"mean_angle needs 3 channels, got 1"),
    ],
)
def test_values_that_do_not_fit_the_kind_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Task("t", **values)


@pytest.mark.parametrize(
    ("names", "message"), [([], "at least one task"), (["a", "b", "a"], "unique, got a more")]
)
def test_task_names_must_exist_and_be_unique(names, message):
    with pytest.raises(ValueError, match=message):
        check_names([Task(name, "binary") for name in names])


@pytest.mark.parametrize("task", MIXED, ids=lambda t: t.name)
def test_json_round_trip_gives_an_equal_task(task):
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_reading_a_task_refuses_an_unknown_field_by_name():
    with pytest.raises(ValueError, match="no field losss"):
        Task.from_dict({"name": "t", "kind": "binary", "losss": "mse"})


def test_encoded_classes_are_int64_and_missing_ones_the_ignore_index():
    task = Task("t", "multiclass", 3, ignore_index=255)
    target = task.encode(torch.tensor([0, 1, 2, 1], dtype=torch.uint8), torch.tensor([True, False, True, True]))
    assert target.dtype == torch.int64
    assert target.tolist() == [0, 255, 2, 1]


def test_encoded_values_are_network_units_and_missing_ones_nan():
    task = Task("t", "regression", 2, offset=(10.0, 20.0), scale=(2.0, 5.0))
    raw = torch.tensor([[12.0, 25.0], [10.0, torch.nan], [0.0, 0.0]])
    target = task.encode(raw, torch.tensor([True, True, False]))
    assert target.dtype == torch.float32
    expected = torch.tensor([[1.0, 1.0], [0.0, torch.nan], [torch.nan, torch.nan]])
    assert torch.equal(target.nan_to_num(-9.0), expected.nan_to_num(-9.0))


def test_encoded_binary_labels_are_not_scaled():
    task = Task("t", "binary", offset=(5.0,), scale=(3.0,))
    assert task.encode(torch.tensor([0, 1, 1], dtype=torch.uint8)).tolist() == [0.0, 1.0, 1.0]


def test_dense_values_at_or_above_the_limit_are_missing():
    task = Task("t", "dense_regression", valid_below=8.0, offset=(1.0,), scale=(2.0,))
    target = task.encode(torch.tensor([[[3, 7], [8, 65535]]], dtype=torch.int32))
    assert target.shape == (1, 1, 2, 2)
    assert target[0, 0].isnan().tolist() == [[False, False], [True, True]]
    assert target[0, 0, 0].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("kind", ["dense_classification", "dense_regression"])
def test_dense_labels_can_be_absent_for_a_sample_or_for_a_pixel(kind, per_pixel):
    task = Task("t", kind, 3)
    raw = torch.ones((2, 4, 4) if kind == "dense_classification" else (2, 4, 4, 3))
    present = torch.ones((2, 4, 4) if per_pixel else (2,), dtype=torch.bool)
    present[0] = False
    target = task.encode(raw, present)
    missing = target == task.ignore_index if task.classes else target.isnan()
    assert missing[0].all()
    assert not missing[1].any()


@pytest.mark.parametrize("task", MIXED, ids=lambda t: t.name)
def test_targets_have_the_layout_of_the_outputs(task):
    raw = torch.from_numpy(raw_labels(task, 2, np.random.default_rng(0), (4, 5)).astype(np.int32))
    target = task.encode(raw)
    area = (4, 5) if task.dense else ()
    channels = (
        (task.channels,) if task.kind == "dense_regression" or (not task.classes and task.channels > 1) else ()
    )
    assert target.shape == (2, *channels, *area)
    assert target.dtype == (torch.int64 if task.classes else torch.float32)


def _output_of(task: Task, target: torch.Tensor) -> torch.Tensor:
    """The network output that predicts exactly `target`."""
    if task.classes:
        logits = torch.nn.functional.one_hot(target, task.channels).float() * 50
        return logits.movedim(-1, 1)
    return torch.logit(target, eps=1e-6) if task.kind == "binary" else target


def _labels_of(task: Task, decoded: torch.Tensor) -> torch.Tensor:
    if task.kind == "binary":
        return (decoded > 0.5).float()
    return decoded.argmax(1) if task.kind == "multiclass" else decoded


@given(
    task=st.sampled_from(MIXED),
    rows=st.integers(1, 4),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_decoding_what_was_encoded_gives_the_raw_labels_back(task, rows, size, seed):
    raw = raw_labels(task, rows, np.random.default_rng(seed), size)
    if task.valid_below is not None:
        raw = np.minimum(raw, int(task.valid_below) - 1)
    stored = torch.from_numpy(raw.astype(np.int32) if raw.dtype == np.uint16 else raw)
    found = _labels_of(task, task.decode(_output_of(task, task.encode(stored))))
    assert found.shape == stored.shape
    torch.testing.assert_close(found.double(), stored.double(), rtol=1e-5, atol=1e-2)


def test_decoded_classes_of_a_sample_are_probabilities():
    found = Task("t", "multiclass", 3).decode(torch.tensor([[0.0, 0.0, 0.0], [np.log(2.0), 0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25]]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "video", "shape": (3,)}, "unknown input kind 'video'"),
        ({"kind": "image", "shape": (3,)}, r"3 axes for image input, got \(3,\)"),
        ({"kind": "features", "shape": (3, 3)}, r"1 axes for features input"),
        ({"kind": "image", "shape": (8, 8, 3), "mean": (1.0, 2.0)}, "mean needs 1 or 3 values, got 2"),
        ({"kind": "features", "shape": (4,), "std": (1.0, 2.0)}, "std needs 1 or 4 values, got 2"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        InputSpec(**values)


def test_input_json_round_trip_gives_an_equal_spec():
    spec = InputSpec("image", [8, 9, 3], "uint8", mean=[1.0, 2.0, 3.0], std=[1.0])
    assert InputSpec(**json.loads(json.dumps(spec.to_dict()))) == spec


def test_every_kind_has_losses_and_metrics():
    assert LOSSES.keys() == METRICS.keys()
    assert all(LOSSES[kind] and METRICS[kind] for kind in LOSSES)


@pytest.mark.parametrize("kind", ["regression", "dense_regression"])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_output_in_the_units_of_another_data_set_means_the_same(kind, channels):
    one = Task("t", kind, channels, offset=(3.0,), scale=(2.0,))
    other = Task("t", kind, channels, offset=(1.0, 5.0)[:channels], scale=(0.5, 4.0)[:channels])
    size = {"regression": (4, channels) if channels > 1 else (4,), "dense_regression": (4, channels, 3, 3)}[kind]
    output = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = one.in_units_of(other, output)
    assert torch.allclose(other.decode(found), one.decode(output), atol=1e-5)
    assert torch.allclose(other.in_units_of(one, found), output, atol=1e-5)


def test_classes_and_flags_have_no_units():
    output = torch.randn(3, 4)
    for kind, channels in (("binary", 1), ("multiclass", 4), ("dense_classification", 4)):
        one, other = (Task("t", kind, channels, offset=(offset,)) for offset in (0.0, 7.0))
        assert torch.equal(one.in_units_of(other, output), output)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("task", "dtype", "shape"),
    [
        (Task("t", "binary", offset=(3.0,)), "uint8", ()),
        (Task("t", "multiclass", 4, ignore_index=9), "int32", ()),
        (Task("t", "regression", offset=(0.1,), scale=(0.3,)), "float64", ()),
        (Task("t", "regression", 3, offset=(0.1, 7.0, 0.0), scale=(0.3, 1.0, 3.0)), "float32", (3,)),
        (Task("t", "dense_classification", 4, ignore_index=250), "uint8", (5, 4)),
        (Task("t", "dense_regression", valid_below=2.5, offset=(1500.0,), scale=(7.0,)), "uint16", (5, 4)),
        (Task("t", "dense_regression", 3, offset=(0.1, 7.0, 0.0), scale=(0.3, 1.0, 3.0)), "uint8", (5, 4, 3)),
    ],
)
def test_labels_in_host_memory_are_encoded_as_on_a_device(task, dtype, shape, masked):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 4, (6, *shape)).astype(dtype)
    if raw.dtype.kind == "f":
        raw.flat[0] = np.nan
    present = rng.random((6, *shape[:2]) if task.dense else 6) < 0.5 if masked else None
    out = np.empty(raw.shape, np.int64 if task.classes else np.float32)
    task.encode_rows(raw, present, out)
    found = task.in_layout(torch.from_numpy(out))
    expected = task.encode(torch.from_numpy(raw), None if present is None else torch.from_numpy(present))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_shares_name_the_classes_of_a_task() -> None:
    decoded = np.array([0.25, 0.75], np.float32)
    named = Task("t", "binary", labels=("nein", "ja")).named_shares(decoded)
    assert {name: share.tolist() for name, share in named.items()} == {"t.ja": [0.25, 0.75]}
    assert Task("t", "binary").named_shares(decoded) == {}
    both = np.stack((decoded, 1 - decoded), 1)
    named = Task("t", "multiclass", 2, labels=("a", "b c")).named_shares(both)
    assert {name: share.tolist() for name, share in named.items()} == {"t.a": [0.25, 0.75], "t.b c": [0.75, 0.25]}
    labels = tuple(map(str, range(MOST_SHARES + 1)))
    assert Task("t", "multiclass", len(labels), labels=labels).shares == ()
    assert Task("t", "multiclass", 2).shares == ()
    assert Task("t", "dense_classification", 2, labels=("a", "b")).shares == ()
