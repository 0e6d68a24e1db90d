"""Losses: fixed values, missing labels, and all heads at once against a double loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmtg_core import GroupingNetwork, Task
from dmtg_core.training.losses import PairLosses, label_count, label_counts, sample_loss, shifted_l1
from tests.dmtg_core import samples
from tests.dmtg_core.network.test_grouping_network import pair_outputs
from tests.dmtg_core.samples import MIXED, image_spec, mlp_spec

NAN = math.nan
LN2 = math.log(2)

# name → (task, output, target, loss of each sample, labels in the batch); every number made by hand
TABLE = {
    "binary cross-entropy": (
        Task("t", "binary"),
        [0.0, 0.0, math.log(3), math.log(3), 5.0],
        [1.0, 0.0, 1.0, 0.0, NAN],  # -log of 1/2, 1/2, 3/4, 1/4
        [LN2, LN2, math.log(4 / 3), math.log(4), 0.0],
        4,
    ),
    "cross-entropy": (
        Task("t", "multiclass", 3),
        [[0.0, 0.0, 0.0], [LN2, 0.0, 0.0], [LN2, 0.0, 0.0], [9.0, 0.0, 0.0]],
        [2, 0, 1, -1],  # -log of 1/3, 2/4, 1/4
        [math.log(3), LN2, math.log(4), 0.0],
        3,
    ),
    "cross-entropy with a class that is ignored": (
        Task("t", "multiclass", 3, ignore_index=0),
        [[0.0, 0.0, 0.0], [LN2, 0.0, 0.0]],
        [0, 1],
        [0.0, math.log(4)],
        1,
    ),
    "mse": (Task("t", "regression"), [1.0, -2.0, 3.0], [3.0, 1.0, NAN], [4.0, 9.0, 0.0], 2),
    "mse of two channels": (
        Task("t", "regression", 2),
        [[1.0, 2.0], [0.0, 5.0]],
        [[0.0, 4.0], [3.0, NAN]],
        [5.0, 9.0],
        3,
    ),
    "l1": (Task("t", "regression", loss="l1"), [1.0, -2.0, 3.0], [3.0, 1.0, NAN], [2.0, 3.0, 0.0], 2),
    "smooth l1": (
        Task("t", "regression", loss="smooth_l1"),
        [0.0, 0.0, 0.0, 0.0],
        [0.5, -1.0, 3.0, NAN],  # e²/2 up to 1, then |e| − 1/2
        [0.125, 0.5, 2.5, 0.0],
        3,
    ),
    "focal of a flag": (
        Task("t", "binary", loss="focal"),  # alpha · (1 - p)² · cross-entropy
        [0.0, 0.0, math.log(3), 5.0],
        [1.0, 0.0, 1.0, NAN],
        [LN2 / 16, 3 * LN2 / 16, math.log(4 / 3) / 64, 0.0],
        3,
    ),
    "focal of classes": (
        Task("t", "multiclass", 3, loss="focal"),
        [[0.0, 0.0, 0.0], [LN2, 0.0, 0.0], [9.0, 0.0, 0.0]],
        [2, 0, -1],
        [4 / 9 * math.log(3), LN2 / 4, 0.0],
        2,
    ),
    "ordinal": (
        Task("t", "multiclass", 3, loss="ordinal"),
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [LN2, 0.0, 0.0], [9.0, 0.0, 0.0]],
        [2, 1, 0, -1],  # above 0 and above 1; above 0 and up to 1; up to 0 and up to 1
        [math.log(3 / 2 * 3), 2 * math.log(3 / 2), math.log(2 * 4 / 3), 0.0],
        3,
    ),
    "huber": (
        Task("t", "regression", loss="huber", loss_options={"delta": 2.0}),
        [0.0, 0.0, 0.0],
        [1.0, -4.0, NAN],  # e²/2 up to 2, then 2 (|e| - 1)
        [0.5, 6.0, 0.0],
        2,
    ),
    "quantile": (
        Task("t", "regression", loss="quantile", loss_options={"quantile": 0.9}),
        [1.0, 1.0, 1.0],
        [3.0, -2.0, NAN],
        [1.8, 0.3, 0.0],
        2,
    ),
    "dense focal": (
        Task("t", "dense_classification", 2, loss="focal", ignore_index=255),
        [[[[0.0, math.log(3)]], [[0.0, 0.0]]]],
        [[[1, 0]]],
        [LN2 / 4 + math.log(4 / 3) / 16],
        2,
    ),
    "dense ordinal": (
        Task("t", "dense_classification", 3, loss="ordinal", ignore_index=0),
        [[[[0.0, 9.0]], [[0.0, 0.0]], [[0.0, 0.0]]]],
        [[[2, 0]]],
        [math.log(4.5)],
        1,
    ),
    "dense huber": (
        Task("t", "dense_regression", loss="huber"),
        [[[[0.0, 0.0], [0.0, 0.0]]]],
        [[[[0.5, NAN], [3.0, 0.0]]]],
        [0.125 + 2.5],
        3,
    ),
    "dense quantile": (
        Task("t", "dense_regression", loss="quantile", loss_options={"quantile": 0.25}),
        [[[[1.0, 1.0], [1.0, 1.0]]]],
        [[[[3.0, NAN], [-1.0, 1.0]]]],
        [0.5 + 1.5],
        3,
    ),
    "dense cross-entropy": (
        Task("t", "dense_classification", 2, ignore_index=255),
        [[[[0.0, math.log(3)]], [[0.0, 0.0]]]],
        [[[1, 0]]],
        [LN2 + math.log(4 / 3)],
        2,
    ),
    "dense cross-entropy with pixels that are ignored": (
        Task("t", "dense_classification", 2, ignore_index=255),
        [[[[0.0, math.log(3)]], [[0.0, 0.0]]], [[[7.0, 7.0]], [[0.0, 0.0]]]],
        [[[255, 1]], [[255, 255]]],
        [math.log(4), 0.0],
        1,
    ),
    "dense l1 with missing pixels": (
        Task("t", "dense_regression"),
        [[[[1.0, 2.0], [3.0, 4.0]]]],
        [[[[0.0, NAN], [5.0, 4.0]]]],
        [3.0],
        3,
    ),
    "dense mse with missing pixels": (
        Task("t", "dense_regression", loss="mse"),
        [[[[1.0, 2.0], [3.0, 4.0]]]],
        [[[[0.0, NAN], [5.0, 4.0]]]],
        [5.0],
        3,
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_losses_at_fixed_values(case):
    task, output, target, expected, count = TABLE[case]
    target = torch.tensor(target)
    torch.testing.assert_close(sample_loss(task, torch.tensor(output), target), torch.tensor(expected))
    assert label_counts([task], {"t": target}).tolist() == [count]


def test_every_loss_but_the_shifted_one_is_in_the_table():
    from dmtg_core.tasks import LOSSES

    tested = {(task.kind, task.loss) for task, *_ in TABLE.values()}
    assert tested == {(k, loss) for k, losses in LOSSES.items() for loss in losses} - {
        ("dense_regression", "l1_shift")
    }


@pytest.mark.parametrize("case", TABLE)
def test_missing_labels_have_no_gradient_and_others_a_finite_one(case):
    task, output, target, _, _ = TABLE[case]
    values, labels = torch.tensor(output, requires_grad=True), torch.tensor(target)
    sample_loss(task, values, labels).sum().backward()
    assert values.grad.isfinite().all()
    missing = labels == task.ignore_index if task.classes else labels.isnan()
    if task.classes:
        missing = missing.unsqueeze(1).expand_as(values)
    assert (values.grad[missing] == 0).all()


@pytest.mark.parametrize("low_precision", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(low_precision):
    output = torch.tensor([300.25, 0.5]).to(low_precision)
    found = sample_loss(Task("t", "regression"), output, torch.tensor([0.0, 0.0]))
    assert found.dtype == torch.float32
    assert found.tolist() == [float(output[0]) ** 2, 0.25]


# --- shifts


SHIFTS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_target_shifted_by_a_pixel_has_no_loss_inside(shift, channels):
    output = torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(0))
    target = output.roll(shift, (2, 3))
    assert shifted_l1(output, target).tolist() == [0.0, 0.0]
    assert ((output - target)[:, :, 1:-1, 1:-1].abs().max() > 0) == (shift != (0, 0))


def test_a_target_shifted_by_two_pixels_has_a_loss():
    output = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert shifted_l1(output, output.roll(2, 3)).item() > 1.0


def test_the_shift_is_one_for_all_pixels_and_channels_of_an_image_and_each_image_has_its_own():
    corners = torch.zeros(2, 2, 3, 3)
    corners[0, 0, 0, 0], corners[0, 1, 2, 2] = 1.0, 1.0  # the values of the channels are in opposite corners
    corners[1, :, 0, 0] = 1.0
    assert shifted_l1(corners, torch.ones(2, 2, 3, 3)).tolist() == [1.0, 0.0]
    alternating = torch.tensor([[0.0, 1.0] * 3] * 5).reshape(1, 1, 5, 6)
    # a pixel's neighbours hold both values, so a shift of its own for each pixel would give no loss at all
    assert shifted_l1(alternating, torch.zeros(1, 1, 5, 6)).item() == 6.0


def plain_shifted_l1(output: torch.Tensor, target: torch.Tensor) -> tuple[list[float], int]:
    """Sum of each image and count of all, by loops over every pixel."""
    totals, count = [], 0
    batch, channels, height, width = target.shape
    for b in range(batch):
        sums = []
        for dy, dx in SHIFTS:
            places = [
                (c, y, x) for c in range(channels) for y in range(1, height - 1) for x in range(1, width - 1)
            ]
            known = [(c, y, x) for c, y, x in places if not math.isnan(target[b, c, y, x])]
            sums.append(sum(abs(float(output[b, c, y + dy, x + dx] - target[b, c, y, x])) for c, y, x in known))
        totals, count = [*totals, min(sums)], count + len(known)
    return totals, count


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), channels=st.sampled_from([1, 3]), missing=st.floats(0, 1))
def test_shifted_l1_equals_a_loop_over_pixels(seed, channels, missing):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(2, channels, 5, 4, generator=generator)
    target = torch.randn(2, channels, 5, 4, generator=generator)
    target[torch.rand(target.shape, generator=generator) < missing] = NAN
    task = Task("t", "dense_regression", channels, loss="l1_shift")
    totals, count = plain_shifted_l1(output, target)
    assert sample_loss(task, output, target).tolist() == pytest.approx(totals, rel=1e-5)
    assert label_counts([task], {"t": target}).item() == count


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_shifted_l1_is_that_of_the_best_shift(seed):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(3, 2, 6, 7, generator=generator, requires_grad=True)
    target = torch.randn(3, 2, 6, 7, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = NAN
    weight = torch.tensor([1.0, -2.0, 0.5])
    (found,) = torch.autograd.grad(shifted_l1(output, target) @ weight, output)
    inner = target[:, :, 1:-1, 1:-1]
    shifted = [
        (output[:, :, 1 + dy : 5 + dy, 1 + dx : 6 + dx] - inner).abs().nan_to_num(0).flatten(1).sum(1)
        for dy, dx in SHIFTS
    ]
    (expected,) = torch.autograd.grad(torch.stack(shifted).amin(0) @ weight, output)
    torch.testing.assert_close(found, expected)


# --- all pairs at once


@torch.no_grad()
def assert_equals_a_double_loop(network: GroupingNetwork, batch) -> None:
    losses = PairLosses(network.tasks, network.pairs)
    together = losses(network.forward_pairs(batch.inputs), batch.targets)
    outputs = pair_outputs(network, network.forward_pairs(batch.inputs))
    assert together.shape == (len(network.pairs), len(batch.inputs))
    for row, (k, n) in zip(together, network.pairs, strict=True):
        task = network.tasks[n]
        torch.testing.assert_close(row, sample_loss(task, outputs[k, n], batch.targets[task.name]), msg=task.name)


@pytest.mark.parametrize("missing", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "spec",
    [image_spec(), mlp_spec(), image_spec(samples.DENSE), mlp_spec(groups=1)],
    ids=["images", "features", "dense", "one group"],
)
def test_all_pairs_at_once_equal_a_double_loop(spec, missing):
    network = GroupingNetwork(spec).eval()
    assert_equals_a_double_loop(network, samples.batch(spec.input, spec.tasks, missing=missing))


@given(
    kept=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=10, max_size=10),
    missing=st.floats(0, 1),
)
def test_all_pairs_at_once_equal_a_double_loop_after_any_pruning(kept, missing):
    network = GroupingNetwork(mlp_spec()).eval()
    alive = torch.tensor(kept)
    alive[:, 0] |= ~alive.any(1)
    network.keep(alive)
    assert_equals_a_double_loop(network, samples.batch(network.spec.input, network.tasks, missing=missing))


@pytest.mark.parametrize("seed", range(4))
def test_all_pairs_at_once_equal_a_double_loop_after_pruning_images(seed):
    network = GroupingNetwork(image_spec()).eval()
    alive = torch.rand(len(MIXED), 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    alive[:, 1] |= ~alive.any(1)
    network.keep(alive)
    assert_equals_a_double_loop(network, samples.batch(network.spec.input, network.tasks, missing=0.3))


def dense_tasks(kinds: list[tuple[str, int]]) -> list[Task]:
    """A dense task of each (loss, channels or classes)."""
    kind = {"cross_entropy": "dense_classification"}
    ignored = {"cross_entropy": 255}
    return [
        Task(f"t{i}", kind.get(loss, "dense_regression"), size, loss=loss, ignore_index=ignored.get(loss, -1))
        for i, (loss, size) in enumerate(kinds)
    ]


DENSE_KINDS = st.tuples(st.sampled_from(["l1_shift", "l1", "mse", "cross_entropy"]), st.integers(2, 3))


@settings(max_examples=15)
@given(
    kinds=st.lists(DENSE_KINDS, min_size=2, max_size=5),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1000),
    missing=st.floats(0, 1),
)
def test_dense_tasks_of_any_losses_and_channels_equal_a_double_loop(kinds, groups, seed, missing):
    tasks = dense_tasks([("l1_shift", 1), *kinds])
    network = GroupingNetwork(image_spec(tasks, groups)).eval()
    alive = torch.rand(len(tasks), groups, generator=torch.Generator().manual_seed(seed)) < 0.6
    alive[:, 0] |= ~alive.any(1)
    network.keep(alive)
    batch = samples.batch(network.spec.input, tasks, 3, missing=missing)
    assert_equals_a_double_loop(network, batch)
    losses = PairLosses(network.tasks, network.pairs)
    with torch.no_grad():
        outputs = network.forward_pairs(batch.inputs)
        apart = losses.separate(outputs, batch.targets)
        torch.testing.assert_close(torch.stack(apart), losses(outputs, batch.targets))
    counts = [label_count(task, batch.targets[task.name]).item() for task in tasks]
    assert label_counts(tasks, batch.targets).tolist() == counts


def test_dense_tasks_are_computed_by_family_and_not_one_by_one():
    kinds = [("l1_shift", 1), ("cross_entropy", 4), ("l1_shift", 3), ("cross_entropy", 5), ("cross_entropy", 4)]
    network = GroupingNetwork(image_spec(dense_tasks(kinds), groups=1))
    families = PairLosses(network.tasks, network.pairs).dense.families
    assert families == [
        ("l1_shift", [(0, 0), (0, 2)]), ("cross_entropy", [(0, 1), (0, 4)]), ("cross_entropy", [(0, 3)]),
    ]  # fmt: skip


def test_probabilities_of_classes_are_the_targets_of_dense_tasks_too():
    tasks = dense_tasks([("cross_entropy", 3), ("cross_entropy", 3)])
    network = GroupingNetwork(image_spec(tasks, groups=2)).eval()
    batch = samples.batch(network.spec.input, tasks, 2)
    for name in batch.targets:
        batch.targets[name] = torch.rand(2, 3, 16, 16).softmax(1)
    assert_equals_a_double_loop(network, batch)
    assert label_counts(tasks, batch.targets).tolist() == [2 * 16 * 16] * 2


def test_small_tasks_are_computed_by_family_and_not_one_by_one():
    tasks = [Task(f"t{n}", "binary") for n in range(40)]
    network = GroupingNetwork(mlp_spec(tasks, groups=4))
    assert PairLosses(network.tasks, network.pairs).families == [("binary_cross_entropy", 1)]


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
def test_an_infinite_target_gives_an_infinite_loss(loss):
    task = Task("t", "regression", loss=loss)
    assert sample_loss(task, torch.zeros(2), torch.tensor([math.inf, 1.0])).isfinite().tolist() == [False, True]


@pytest.mark.parametrize("loss", ["mse", "l1", "l1_shift"])
def test_an_infinite_pixel_gives_an_infinite_loss(loss):
    target = torch.zeros(1, 1, 3, 3)
    target[0, 0, 1, 1] = -math.inf
    assert (
        not sample_loss(Task("t", "dense_regression", loss=loss), torch.zeros(1, 1, 3, 3), target).isfinite().any()
    )
