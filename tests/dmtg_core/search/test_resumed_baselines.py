"""Baselines that are interrupted, within an epoch or between two, and resumed: as if they had not been."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmtg_core import ArrayData, Grouping, LocalContext, TrainSettings
from dmtg_core.network.cost import wide_spec
from dmtg_core.search.baselines import (
    Trained,
    hard_network,
    overlap_groups,
    together,
    train_distilled,
    train_hard,
    train_naive_with_affinities,
    train_within,
)
from dmtg_core.training.context import Save
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted
from tests.dmtg_core.samples import SAMPLEWISE, assert_same_tensors, mlp_spec, snapshot

SPEC = mlp_spec(SAMPLEWISE[:4])
SETTINGS = TrainSettings(epochs=3, batch_size=16, learning_rate=1e-2, average=0.5)
APART = Grouping.of([[task.name] for task in SPEC.tasks])
Contexts = Callable[[str], LocalContext]
Found = tuple[Trained | None, list[Any]]


class EachStep(LocalContext):
    """A context that writes a checkpoint after each step, until `left` of them have been written."""

    def __init__(self, folder: Path, left: list[int]) -> None:
        super().__init__(folder, device="cpu")
        self.left = left

    def checkpoint_due(self) -> bool:
        return True

    def report(self, record: Mapping[str, Any] | None, save: Save) -> None:
        super().report(record, save)
        self.left[0] -= 1
        if not self.left[0]:
            raise Interrupted


def _hard(data: ArrayData, contexts: Contexts) -> Found:
    return train_hard(hard_network(SPEC, APART), data, SETTINGS, context=contexts("network")), []


def _within(data: ArrayData, contexts: Contexts) -> Found:
    return train_within(hard_network(SPEC, APART), data, SETTINGS, 6.0, context=contexts("network")), []


def _distilled(data: ArrayData, contexts: Contexts) -> Found:
    specs = [replace(SPEC, groups=1, seed=seed) for seed in (0, 1)]
    return train_distilled(specs, data, SETTINGS, 4.0, contexts=contexts), []


def _overlap(data: ArrayData, contexts: Contexts) -> Found:
    affinity, groups, cost = overlap_groups(SPEC, data, SETTINGS, 0.34, 6.0, context=contexts("encoder"))
    return None, [affinity, groups, cost]


def _affinities(data: ArrayData, contexts: Contexts) -> Found:
    done, affinities, costs = train_naive_with_affinities(SPEC, data, SETTINGS, context=contexts("network"))
    return done, [*(affinities[name] for name in sorted(affinities)), costs]


@pytest.fixture(scope="module")
def data() -> ArrayData:
    return samples.data(SPEC.input, SPEC.tasks, missing=0.2)


@pytest.mark.parametrize("train", [_hard, _within, _distilled, _overlap, _affinities])
def test_a_baseline_that_is_interrupted_often_is_that_of_one_go(
    data: ArrayData, tmp_path: Path, train: Callable[[ArrayData, Contexts], Found]
) -> None:
    expected, others = train(data, lambda _stage: LocalContext(device="cpu"))
    left, interrupted = [0], 0
    while True:
        left[0] = 3  # of the four checkpoints of an epoch, so that each of them is the last one once
        try:
            found, found_others = train(data, lambda stage: EachStep(tmp_path / stage, left))
            break
        except Interrupted:
            interrupted += 1
    assert interrupted >= 2
    for one, other in zip(others, found_others, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other
    if expected is not None and found is not None:
        assert_same_tensors(snapshot(found.network), snapshot(expected.network))
        assert (found.score, found.metrics, found.cost) == (expected.score, expected.metrics, expected.cost)
        assert found.gap == expected.gap


def test_a_wide_encoder_resumes_with_its_own_width(data: ArrayData, tmp_path: Path) -> None:
    wide = wide_spec(SPEC)
    with pytest.raises(Interrupted):
        train_hard(hard_network(wide, together(wide)), data, SETTINGS, context=EachStep(tmp_path, [2]))
    found = train_hard(hard_network(wide, together(wide)), data, SETTINGS, context=LocalContext(tmp_path))
    assert found.network.spec.encoder.options == wide.encoder.options
