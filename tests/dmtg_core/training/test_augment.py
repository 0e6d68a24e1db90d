"""Augmentation: fixed values, randomness as a function of its arguments, and where it is used."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dmtg_core import AUGMENTATIONS, Batch, GroupingNetwork, Task, TrainSettings, TrainState, augment
from dmtg_core.training.augment import augment_generator
from dmtg_core.training.loop import advance
from dmtg_core.training.step import step_noise
from tests.dmtg_core import samples
from tests.dmtg_core.host_syncs import HostSyncs
from tests.dmtg_core.samples import DENSE, IMAGE, MIXED, image_spec, mlp_spec
from tests.dmtg_core.training.test_step import local

NAN = math.nan
NORMALS = Task("normals", "dense_regression", 3, flip=(-1, 1, 1))
DEPTH, SEGMENTS = Task("depth", "dense_regression"), Task("segments", "dense_classification", 5)
SMILING, COLOUR = Task("smiling", "binary"), Task("colour", "multiclass", 3)
TASKS = (NORMALS, SMILING, DEPTH, SEGMENTS, COLOUR)


def generator(seed: int = 0, step: int = 0, rank: int = 0) -> torch.Generator:
    return augment_generator(seed, step, rank)


def images(rows: int) -> torch.Tensor:
    """Stored images of 2×3 pixels and 2 channels, `(rows, 2, 3, 2)`: ascending values except the last."""
    one = torch.tensor([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 255]]], dtype=torch.uint8)
    return one.expand(rows, 2, 3, 2).contiguous()


def hand_made(rows: int = 64) -> Batch:
    """Equal samples with a target of every kind."""
    targets = {
        "normals": torch.tensor(
            [[[0.1, 0.2, 0.3], [0.4, 0.5, NAN]], [[1, 2, 3], [4, 5, NAN]], [[6, 7, 8], [9, 10, NAN]]]
        ),  # (3, 2, 3)
        "depth": torch.tensor([[[NAN, 2.0, 3.0], [4.0, 5.0, 6.0]]]),  # (1, 2, 3)
        "segments": torch.tensor([[0, 1, 2], [3, 4, -1]]),  # (2, 3)
        "smiling": torch.tensor(1.0),
        "colour": torch.tensor(2),
    }
    return Batch(images(rows), {name: t.expand(rows, *t.shape).contiguous() for name, t in targets.items()})


# the same sample mirrored
MIRRORED = {
    "normals": [
        [[-0.3, -0.2, -0.1], [NAN, -0.5, -0.4]],
        [[3, 2, 1], [NAN, 5, 4]],
        [[8, 7, 6], [NAN, 10, 9]],
    ],
    "depth": [[[3.0, 2.0, NAN], [6.0, 5.0, 4.0]]],
    "segments": [[2, 1, 0], [-1, 4, 3]],
    "smiling": 1.0,
    "colour": 2,
}
MIRRORED_IMAGE = [[[5, 6], [3, 4], [1, 2]], [[11, 255], [9, 10], [7, 8]]]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in dtype, shape and all bits, NaN included."""
    return found.dtype == expected.dtype and torch.equal(
        found.double().nan_to_num(1e9), expected.double().nan_to_num(1e9)
    )


def same_batch(found: Batch, expected: Batch) -> bool:
    return same(found.inputs, expected.inputs) and all(
        same(found.targets[name], target) for name, target in expected.targets.items()
    )


def flipped(batch: Batch) -> torch.Tensor:
    """Which samples of a hand-made batch were mirrored, bool `(B,)`."""
    return batch.inputs[:, 0, 0, 0] == 5


def test_a_sample_is_unchanged_or_mirrored_with_all_its_targets():
    batch = hand_made()
    found = augment(batch, TASKS, ("flip",), generator())
    mirrored = flipped(found)
    assert 0 < mirrored.sum() < len(mirrored)
    for row, mirror in enumerate(mirrored.tolist()):
        assert same(found.inputs[row], torch.tensor(MIRRORED_IMAGE).byte() if mirror else batch.inputs[row])
        for name, target in batch.targets.items():
            expected = torch.tensor(MIRRORED[name], dtype=target.dtype) if mirror else target[row]
            assert same(found.targets[name][row], expected), name


def test_the_input_batch_is_not_changed():
    batch = hand_made()
    augment(batch, TASKS, ("flip",), generator())
    assert same_batch(batch, hand_made())


def test_without_an_augmentation_the_batch_is_the_same_object():
    batch = hand_made()
    assert augment(batch, TASKS, (), generator()) is batch


def test_two_equal_flips_restore_the_batch():
    batch = samples.batch(IMAGE, MIXED, 16, missing=0.3)
    tasks = [replace(t, flip=(-1, 1, 1)) if t.name == "normals" else t for t in MIXED]
    once = augment(batch, tasks, ("flip",), generator())
    assert not same(once.inputs, batch.inputs)
    assert same_batch(augment(once, tasks, ("flip",), generator()), batch)


def test_labels_of_whole_samples_are_the_same_tensors():
    batch = samples.batch(IMAGE, MIXED, 16)
    found = augment(batch, MIXED, ("flip",), generator())
    for task in MIXED:
        assert (found.targets[task.name] is batch.targets[task.name]) == (not task.dense)


def test_a_task_without_factors_keeps_its_signs():
    batch = samples.batch(IMAGE, DENSE, 16)
    found = augment(batch, DENSE, ("flip",), generator())
    for task in DENSE:
        pixels = [t.targets[task.name].flatten(1).sort().values for t in (batch, found)]
        assert same(*pixels), task.name


def test_the_draws_are_a_function_of_seed_step_and_rank():
    def draws(*arguments: int) -> list[bool]:
        return flipped(augment(hand_made(), TASKS, ("flip",), generator(*arguments))).tolist()

    arguments = [(seed, step, rank) for seed in (0, 22) for step in (0, 1, 1000) for rank in (0, 1, 7)]
    found = [draws(*a) for a in arguments]
    assert found == [draws(*a) for a in arguments]
    assert len({tuple(f) for f in found}) == len(found)


@pytest.mark.parametrize("row", [0, 3])
def test_each_sample_is_flipped_in_half_of_the_steps(row):
    batch = Batch(images(4), {})
    found = [bool(flipped(augment(batch, (), ("flip",), generator(22, step)))[row]) for step in range(1000)]
    assert 440 < sum(found) < 560  # 3.8 standard deviations
    changes = sum(a != b for a, b in zip(found[1:], found, strict=False))
    assert 440 < changes < 560  # steps are independent


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_the_draws_do_not_share_their_seed_with_the_noise_of_the_gate(rank):
    """Equal seeds would make the mirrored samples those whose gates have little noise."""
    network = GroupingNetwork(mlp_spec(sampling="gumbel_per_sample"))
    noise = step_noise(network, TrainSettings(seed=3), 7, rank, 5)
    others = [network.gate.noise(generator(3, 7, other), 5) for other in range(8)]
    assert not any(torch.equal(noise, other) for other in others)


def test_input_that_is_not_an_image_is_refused_with_its_shape():
    spec = mlp_spec()
    with pytest.raises(ValueError, match=r"flip needs images \(B, H, W, C\), got input of shape \(5, 6\)"):
        augment(samples.batch(spec.input, spec.tasks), spec.tasks, ("flip",), generator())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip": (-1, 1)}, r"'t': flip needs 0 or 3 values, got 2"),
        ({"flip": (-1,)}, r"'t': flip needs 0 or 3 values, got 1"),
        ({"flip": (-1, 1, 0)}, r"'t': flip takes factors of 1 and -1, got \(-1, 1, 0\)"),
        ({"kind": "dense_classification", "flip": (1, 1, 1)}, r"flip is for dense_regression"),
        ({"kind": "regression", "flip": (-1, 1, 1)}, r"flip is for dense_regression, not for regression"),
    ],
)
def test_factors_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Task("t", **{"kind": "dense_regression", "channels": 3} | values)


def test_settings_refuse_an_unknown_augmentation():
    with pytest.raises(ValueError, match="unknown augment 'rotate', expected one of flip"):
        TrainSettings(augment=("flip", "rotate"))
    assert TrainSettings(augment=["flip"]) == TrainSettings(augment=tuple(AUGMENTATIONS))


def test_the_host_does_not_wait():
    batch = samples.batch(IMAGE, MIXED, 8)
    tasks = [replace(t, flip=(-1, 1, 1)) if t.name == "normals" else t for t in MIXED]
    with HostSyncs() as counter:
        augment(batch, tasks, ("flip",), generator())
    assert counter.found == Counter()
    assert counter.seen["where"] == 1 + sum(task.dense for task in tasks)


# --- in training


class Seen:
    """A data set that records its batches and the inputs of the network."""

    def __init__(self, data) -> None:
        self.data = data
        self.given: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self.got: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}

    def steps(self, batch_size):
        return self.data.steps(batch_size)

    def train(self, epoch, batch_size, start=0):
        for batch in self.data.train(epoch, batch_size, start):
            self.given["train"].append(batch.inputs)
            yield batch

    def evaluate(self, split, batch_size):
        for batch in self.data.evaluate(split, batch_size):
            self.given["eval"].append(batch.inputs)
            yield batch

    def watch(self, network: GroupingNetwork) -> None:
        network.normalise.register_forward_pre_hook(
            lambda module, arguments: self.got["train" if module.training else "eval"].append(arguments[0])
        )


def trained(augmentations: tuple[str, ...], epochs: int = 1) -> tuple[Seen, TrainState]:
    spec = image_spec((samples.SAMPLEWISE[0], samples.DENSE[2]))
    # without the trial of `batch_branches`, whose copies of the network would be watched, too
    settings = TrainSettings(epochs=4, batch_size=8, augment=augmentations, seed=5, batch_branches="off")
    seen = Seen(samples.data(spec.input, spec.tasks, rows=16))
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    seen.watch(state.network)
    return seen, advance(state, seen, settings, local(), until=epochs)


def test_training_uses_mirrored_images_and_evaluation_stored_ones():
    seen, _ = trained(("flip",), epochs=2)
    assert len(seen.got["train"]) == len(seen.given["train"]) == 4
    looked_at, evaluated = seen.got["eval"][::3], [x for i, x in enumerate(seen.got["eval"]) if i % 3]
    assert all(same(*pair) for pair in zip(looked_at, seen.got["train"][1::2], strict=True))  # for its cosines
    assert len(evaluated) == len(seen.given["eval"]) == 4
    assert all(torch.equal(*pair) for pair in zip(seen.given["eval"], evaluated, strict=True))
    for step, (given, got) in enumerate(zip(seen.given["train"], seen.got["train"], strict=True)):
        # the run's seed, the run's count of steps and the worker's rank, in an epoch after the first as well
        assert same(got, augment(Batch(given, {}), (), ("flip",), generator(5, step, 0)).inputs)
    assert not all(torch.equal(*pair) for pair in zip(seen.given["train"], seen.got["train"], strict=True))


def test_without_augmentation_training_uses_stored_images():
    seen, _ = trained(())
    assert all(torch.equal(*pair) for pair in zip(seen.given["train"], seen.got["train"], strict=True))


def test_a_run_with_augmentation_is_reproducible_and_differs_from_one_without():
    losses = [trained(names)[1].history[0]["train_loss"] for names in (("flip",), ("flip",), ())]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
