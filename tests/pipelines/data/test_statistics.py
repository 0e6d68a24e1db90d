import numpy as np
import pytest

from dmtg_core import Task
from pipelines.data.statistics import (
    by_channel,
    constant,
    drift,
    in_network_units,
    label_sums,
    merge,
    moments,
    summary,
    thin_support,
)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    task = Task("depth", "dense_regression", valid_below=100.0)
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 120, (4, 4)).astype(np.uint16) for _ in range(6)] + [None]
    masks = [None, rng.integers(0, 2, (4, 4)).astype(np.uint8), *[None] * 5]
    whole = label_sums(task, labels, masks)
    parts = merge([label_sums(task, labels[:2], masks[:2]), label_sums(task, labels[2:], masks[2:])])
    assert whole == pytest.approx(parts)
    seen = np.concatenate(
        [
            x[(x < 100) & (m.astype(bool) if m is not None else True)]
            for x, m in zip(labels, masks, strict=True)
            if x is not None
        ]
    ).astype(float)
    found = summary(whole)
    assert found["mean"] == pytest.approx(seen.mean())
    assert found["std"] == pytest.approx(seen.std())
    assert found["missing_rate"] == pytest.approx(1 / 7)
    assert whole["values"] == seen.size


def test_classes_are_counted_without_the_ignored_class() -> None:
    task = Task("seg", "dense_classification", 3, ignore_index=0)
    assert label_sums(task, [np.array([[0, 1], [1, 2]], np.uint8)], [None])["classes"] == [0, 2, 1]


@pytest.mark.parametrize(
    ("task", "labels", "reason"),
    [
        (Task("b", "binary"), [np.uint8(1)] * 3, "every label is class 1"),
        (Task("m", "multiclass", 3), [np.uint8(2)] * 3, "every label is class 2"),
        (Task("r", "regression"), [np.float32(4.5)] * 3, "every value is 4.5"),
        (Task("d", "dense_regression"), [np.full((2, 2), 255, np.uint16)] * 2, "every value is 255"),
        (Task("n", "binary"), [None, None], "it has no label"),
        (Task("ok", "regression"), [np.float32(1), np.float32(2)], ""),
        (Task("nan", "regression"), [np.float32(1), np.float32("nan")], "every value is 1"),
    ],
)
def test_constant_target_is_recognised(task: Task, labels: list, reason: str) -> None:
    assert constant(label_sums(task, labels, [None] * len(labels))) == reason


def test_thin_support_names_the_classes() -> None:
    task = Task("m", "multiclass", 3, labels=("a", "b", "c"))
    sums = label_sums(task, [np.uint8(i) for i in (0, 0, 0, 1, 2, 2, 2)], [None] * 7)
    assert thin_support(task, sums, 3) == "classes with fewer than 3 labels (b: 1)"
    assert thin_support(task, sums, 8) == "7 labelled samples"
    assert thin_support(task, sums, 1) == ""


def test_channels_are_summed_separately_and_merged() -> None:
    task = Task("bend", "dense_regression", 2, offset=(100.0, 50.0), scale=(10.0, 2.0))
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 200, (3, 3, 2)).astype(np.uint8) for _ in range(4)]
    masks = [rng.integers(0, 2, (3, 3)).astype(np.uint8) for _ in labels]
    merged = merge([label_sums(task, labels[:1], masks[:1]), label_sums(task, labels[1:], masks[1:])])
    seen = np.concatenate([x[m.astype(bool)] for x, m in zip(labels, masks, strict=True)]).astype(float)
    for channel, sums in enumerate(by_channel(merged)):
        found = in_network_units(task, moments(sums), channel)
        units = (seen[:, channel] - task.offset[channel]) / task.scale[channel]
        expected = {"mean": units.mean(), "std": units.std(), "min": units.min(), "max": units.max()}
        assert found == pytest.approx(expected)
    assert moments(merged)["mean"] == pytest.approx(seen.mean())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([0, 1] * 100, ""),
        ([0] * 20 + [1] * 180, "class 1 has 90.0%, in train 50.0%"),
        ([1] * 3, ""),  # three samples say nothing
        ([None] * 50, ""),
    ],
)
def test_drift_of_a_flag(others: list[int | None], message: str) -> None:
    task = Task("b", "binary")
    train, other = (
        label_sums(task, [None if x is None else np.uint8(x) for x in values], [None] * len(values))
        for values in ([0, 1] * 100, others)
    )
    assert drift(task, train, other) == message
