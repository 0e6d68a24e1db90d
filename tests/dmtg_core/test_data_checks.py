"""What the library is given is checked once: lengths, types, shapes, ranges and finiteness."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    SearchOptions,
    Task,
    TemperatureSchedule,
    TrainSettings,
    fit,
    search,
)
from dmtg_core.training.data import Chunks
from tests.dmtg_core import samples
from tests.dmtg_core.samples import FEATURES, IMAGE, MIXED

ROWS = 12
BINARY, CLASSES = Task("a", "binary"), Task("b", "multiclass", 3)
VALUE, PAIR = Task("c", "regression"), Task("d", "regression", 2)


def parts(task: Task = BINARY, labels: Any = None, inputs: Any = None, present: Any = None) -> Arrays:
    held = np.arange(ROWS) % 2 if labels is None else labels
    masks = {} if present is None else {task.name: present}
    return Arrays(np.ones((ROWS, 6), np.float32) if inputs is None else inputs, {task.name: held}, masks)


@pytest.mark.parametrize("count", [0, 1, ROWS - 1, ROWS + 1, 10 * ROWS])
@pytest.mark.parametrize("kind", ["labels", "present"])
def test_arrays_of_another_length_are_refused(count: int, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"expected {ROWS} .*task 'a'.*got {count}"):
        parts(**{kind: np.ones(count, bool)})


@pytest.mark.parametrize("values", [[0, 1] * 6, torch.zeros(ROWS), (0,) * ROWS, None, "ab" * 6])
def test_what_is_no_array_is_refused(values: Any) -> None:
    with pytest.raises(TypeError, match="labels of task 'a' as a NumPy array, got"):
        Arrays(np.ones((ROWS, 6)), {"a": values}, {})


def spoiled(values: np.ndarray, index: int, value: float) -> np.ndarray:
    changed = values.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (BINARY, np.full(ROWS, 2), "binary task 'a' are 0 and 1, got 2"),
        (BINARY, spoiled(np.zeros(ROWS, np.int8), 5, -1), "0 and 1, got -1"),
        (BINARY, spoiled(np.zeros(ROWS, np.uint8), 5, 255), "0 and 1, got 255"),
        (BINARY, spoiled(np.zeros(ROWS), 5, 0.5), "0 and 1, got 0.5"),
        (BINARY, np.zeros((ROWS, 1)), r"expected labels \(n\) of the binary task 'a', got \(12, 1\)"),
        (BINARY, np.array(["y"] * ROWS), "array of numbers"),
        (BINARY, np.array([None] * ROWS), "array of numbers"),
        (CLASSES, np.full(ROWS, 3), "0 to 2, or -1 for a missing label, got 3"),
        (CLASSES, spoiled(np.zeros(ROWS), 3, math.nan), "0 to 2"),
        (CLASSES, spoiled(np.zeros(ROWS, np.int64), 3, -2), "got -2"),
        (VALUE, spoiled(np.zeros(ROWS), 3, math.inf), "finite, or NaN"),
        (VALUE, np.zeros((ROWS, 2)), "got"),
        (PAIR, np.zeros((ROWS, 3)), r"expected labels \(n, 2\)"),
        (PAIR, np.zeros(ROWS), r"expected labels \(n, 2\)"),
    ],
)
def test_labels_that_are_not_what_the_task_says_are_refused(task: Task, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArrayData({"train": parts(task, labels)}, [task])
    with pytest.raises(ValueError, match=message):
        ArrayData({"train": Chunks([parts(task, labels)])}, [task])


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (BINARY, np.zeros(ROWS, bool)),
        (BINARY, spoiled(np.zeros(ROWS), 5, math.nan)),
        (CLASSES, spoiled(np.zeros(ROWS, np.int8), 3, -1)),
        (replace(CLASSES, ignore_index=255), spoiled(np.zeros(ROWS, np.uint8), 3, 255)),
        (VALUE, spoiled(np.zeros(ROWS), 3, math.nan)),
        (VALUE, np.full(ROWS, np.finfo(np.float64).max)),
    ],
)
def test_missing_labels_and_large_values_are_admitted(task: Task, labels: np.ndarray) -> None:
    assert ArrayData({"train": parts(task, labels)}, [task]).steps(ROWS) == 1


@given(row=st.integers(0, ROWS - 1), value=st.sampled_from([math.nan, math.inf, -math.inf]), known=st.booleans())
def test_a_value_counts_only_where_it_is_present(row: int, value: float, known: bool) -> None:
    labels = spoiled(np.zeros(ROWS), row, 7)
    present = np.ones(ROWS, bool)
    present[row] = known
    if known:
        with pytest.raises(ValueError, match="got 7"):
            ArrayData({"train": parts(BINARY, labels, present=present)}, [BINARY])
    else:
        assert ArrayData({"train": parts(BINARY, labels, present=present)}, [BINARY])
    inputs = spoiled(np.ones((ROWS, 6), np.float16), row, value)
    with pytest.raises(ValueError, match=f"split 'train': the inputs of sample {row} are not finite"):
        ArrayData({"train": parts(inputs=inputs)}, [BINARY])


@pytest.mark.parametrize("spec", [FEATURES, IMAGE])
def test_random_samples_of_every_kind_of_task_are_admitted(spec: InputSpec) -> None:
    tasks = MIXED if spec.kind == "image" else [task for task in MIXED if not task.dense]
    held = samples.arrays(spec, tasks, 20, missing=0.3)
    assert len(ArrayData({"train": held, "val": held}, tasks).splits) == 2


def test_data_that_does_not_fit_the_network_is_refused_before_training() -> None:
    spec = NetworkSpec(FEATURES, (BINARY,), EncoderSpec("mlp"), 2)
    split = parts()
    other = {"other tasks": ArrayData({"train": split, "val": split}, [])}
    other["the splits train and val"] = ArrayData({"train": split}, [BINARY])
    wide = parts(inputs=np.ones((ROWS, 7), np.float32))
    other[r"inputs of shape \(n, 6\), got \(12, 7\)"] = ArrayData({"train": wide, "val": wide}, [BINARY])
    for message, data in other.items():
        expected = message.replace("other tasks", "the network has the tasks a")
        with pytest.raises(ValueError, match=expected):
            fit(GroupingNetwork(spec), data, TrainSettings())
        with pytest.raises(ValueError, match=expected):
            search(spec, data, TrainSettings())


FLOATS = (
    "learning_rate", "gate_learning_rate", "weight_decay", "lr_min", "clip_norm", "entropy_weight", "search_share",
)  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_settings_are_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: Task("a", "regression", scale=(x,)), "scale"),
        (lambda x: Task("a", "regression", offset=(x,)), "offset"),
        (lambda x: Task("a", "regression", weight=x), "weight"),
        (lambda x: InputSpec("features", (2,), mean=(x,)), "mean"),
        (lambda x: InputSpec("features", (2,), std=(x,)), "std"),
        (lambda x: TemperatureSchedule(start=x), "temperatures"),
        (lambda x: TemperatureSchedule(warmup=x), "warmup"),
        (lambda x: SearchOptions(within=x), "within"),
        (lambda x: SearchOptions(budget=x), "budget"),
        (lambda x: SearchOptions(probability=x), "probability"),
        (lambda x: NetworkSpec(FEATURES, (BINARY,), EncoderSpec("mlp"), 2, initial_scale=x), "initial_scale"),
    ],
)
def test_other_numbers_are_finite(build, message: str) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=message):
            build(value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"widths": [-3]}, "option widths of encoder mlp must be a list of positive whole numbers"),
        ("mlp", {"widths": [0]}, "positive whole numbers"),
        ("mlp", {"widths": []}, "positive whole numbers"),
        ("mlp", {"widths": 3}, "a list"),
        ("mlp", {"widths": "34"}, "a list"),
        ("mlp", {"widths": [2.5]}, "whole"),
        ("mlp", {"widths": [2**40]}, "at most"),
        ("vit", {"width": 0}, "option width of encoder vit must be a positive whole number"),
        ("vit", {"heads": True}, "whole"),
        ("vit", {"with": 3}, "no option 'with', its options are: patch, width, layers, heads"),
        ("mpl", {}, "unknown encoder 'mpl'"),
    ],
)
def test_an_encoder_is_checked_without_an_input(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderSpec(name, options=options).check()


def test_an_encoder_without_options_passes_the_check() -> None:
    EncoderSpec("mlp").check()
    EncoderSpec("convnet", options={"widths": (4, 8), "dense_stride": 0}).check()
    EncoderSpec("vit", options={"patch": 8}).check()
