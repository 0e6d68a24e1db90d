"""Options of losses: the values of torch, torchvision and scikit-learn, for one task and for all pairs at once."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_pinball_loss
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from dmtg_core import Batch, EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task, balanced_tasks
from dmtg_core.training.loop import score_of
from dmtg_core.training.losses import PairLosses, label_count, sample_loss
from dmtg_core.training.metrics import MetricSums
from tests.dmtg_core import parallel, samples
from tests.dmtg_core.network.test_grouping_network import pair_outputs
from tests.dmtg_core.samples import image_spec, mlp_spec

LOSSES = ("binary", "focal flag", "cross_entropy", "focal", "ordinal", "huber", "quantile")


def task_of(name: str, loss: str, rng: np.random.Generator, classes: int = 3) -> Task:
    """A task with random options of its loss."""

    def number(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    weights = rng.uniform(0.1, 9.0, classes).tolist()
    kind, options = {
        "binary": ("binary", {"pos_weight": number(0.1, 50), "label_smoothing": number(0, 0.5)}),
        "focal flag": ("binary", {"gamma": number(0, 4), "alpha": number(0, 1)}),
        "cross_entropy": ("multiclass", {"class_weights": weights, "label_smoothing": number(0, 0.5)}),
        "focal": ("multiclass", {"class_weights": weights, "gamma": number(0, 4)}),
        "ordinal": ("multiclass", {"class_weights": weights}),
        "huber": ("regression", {"delta": number(0.1, 3)}),
        "quantile": ("regression", {"quantile": number(0.01, 0.99)}),
    }[loss]
    chosen = {"binary": "", "focal flag": "focal"}.get(loss, loss)
    channels = classes if kind == "multiclass" else 1
    return Task(name, kind, channels, loss=chosen, loss_options=options, ignore_index=-7)


def of_values(task: Task, output: torch.Tensor, target: torch.Tensor) -> float:
    """The sum of the losses of labels that are flags or values, by a library."""
    options = task.loss_options
    if task.loss == "huber":
        return F.huber_loss(output, target, delta=options.delta, reduction="sum").item()
    if task.loss == "quantile":
        return len(target) * mean_pinball_loss(target.numpy(), output.detach().numpy(), alpha=options.quantile)
    if task.loss == "focal":
        return sigmoid_focal_loss(output, target, options.alpha, options.gamma, reduction="sum").item()
    soft = target * (1 - options.label_smoothing) + options.label_smoothing / 2
    weight = torch.tensor(options.pos_weight)
    return F.binary_cross_entropy_with_logits(output, soft, pos_weight=weight, reduction="sum").item()


def of_classes(task: Task, output: torch.Tensor, target: torch.Tensor) -> float:
    """The sum of the losses of class ids, by torch or by the formula."""
    options, shares = task.loss_options, output.softmax(1)
    weight = torch.tensor(options.class_weights or [1.0] * task.channels, dtype=torch.float64)
    if task.loss == "cross_entropy":
        smoothing = options.label_smoothing
        return F.cross_entropy(output, target, weight, label_smoothing=smoothing, reduction="sum").item()
    if task.loss == "focal":
        share = shares.gather(1, target.unsqueeze(1)).squeeze(1)
        return (weight[target] * (1 - share) ** options.gamma * -share.log()).sum().item()
    total = 0.0
    for row, label in zip(shares, target.tolist(), strict=True):
        for k in range(task.channels - 1):
            side = row[k + 1 :] if label > k else row[: k + 1]
            total -= weight[label].item() * math.log(side.sum().item())
    return total


def expected_sum(task: Task, output: torch.Tensor, target: torch.Tensor) -> float:
    """The sum of the losses of all labels that exist."""
    known = target != task.ignore_index if task.classes else ~target.isnan()
    if not known.any():
        return 0.0
    if task.classes:
        return of_classes(task, output[known].double(), target[known])
    return of_values(task, output[known].double(), target[known].double())


def targets_of(task: Task, rows: int, generator: torch.Generator, missing: float) -> torch.Tensor:
    """Random encoded labels, of which a share is missing."""
    gone = torch.rand(rows, generator=generator) < missing
    if task.classes:
        return torch.randint(task.channels, (rows,), generator=generator).where(~gone, task.ignore_index)
    values = torch.randn(rows, generator=generator)
    return (values.gt(0).float() if task.kind == "binary" else values).masked_fill(gone, math.nan)


@settings(max_examples=60)
@given(
    loss=st.sampled_from(LOSSES),
    classes=st.sampled_from([2, 3, 11, 101, 256, 300]),
    rows=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 1000),
    missing=st.floats(0, 1),
)
def test_a_loss_is_that_of_the_libraries(loss, classes, rows, seed, missing):
    generator = torch.Generator().manual_seed(seed)
    task = task_of("t", loss, np.random.default_rng(seed), classes)
    output = 3 * torch.randn(rows, *([task.channels] if task.channels > 1 else []), generator=generator)
    target = targets_of(task, rows, generator, missing)
    found = sample_loss(task, output, target)
    assert found.shape == (rows,)
    assert found.sum().item() == pytest.approx(expected_sum(task, output, target), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_loss_without_weights_ignores_missing_labels_too(smoothing):
    task = Task("t", "multiclass", 3, ignore_index=2, loss_options={"label_smoothing": smoothing})
    output, target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 2])
    found = sample_loss(task, output, target)
    assert found[1] == found[3] == 0
    expected = F.cross_entropy(output[[0, 2]], target[[0, 2]], label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(found[[0, 2]], expected)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "ordinal"])
def test_probabilities_of_classes_weight_the_losses_of_the_classes(loss):
    task = task_of("t", loss, np.random.default_rng(0), 4)
    task = replace(task, loss_options={**task.loss_options.to_dict()})
    generator = torch.Generator().manual_seed(1)
    output, shares = torch.randn(5, 4, generator=generator), torch.rand(5, 4, generator=generator).softmax(1)
    by_class = torch.stack([sample_loss(task, output, torch.full((5,), c)) for c in range(4)], 1)
    torch.testing.assert_close(sample_loss(task, output, shares), (by_class * shares).sum(1))


def test_the_ordinal_loss_of_two_classes_is_the_cross_entropy_and_grows_with_the_distance():
    output, target = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2
    torch.testing.assert_close(
        sample_loss(Task("t", "multiclass", 2, loss="ordinal"), output, target),
        sample_loss(Task("t", "multiclass", 2), output, target),
    )
    peak = torch.tensor([[4.0, 0.0, 0.0, 0.0, 0.0]]).expand(5, 5)
    found = sample_loss(Task("t", "multiclass", 5, loss="ordinal"), peak, torch.arange(5)).tolist()
    assert found == sorted(found)
    assert len(set(found)) == 5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_losses_and_gradients_are_finite_for_extreme_outputs(loss, scale):
    task = task_of("t", loss, np.random.default_rng(3), 5)
    if loss == "focal":
        task = replace(task, loss_options={"gamma": 0.5})
    output = scale * torch.randn(
        64, *([5] if task.channels > 1 else []), generator=torch.Generator().manual_seed(0)
    )
    output.requires_grad_()
    found = sample_loss(task, output, targets_of(task, 64, torch.Generator().manual_seed(1), 0.2))
    found.sum().backward()
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert output.grad.isfinite().all()


# --- all pairs at once


def batch_of(tasks, features: int, rows: int, missing: float) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, features, generator=generator)
    return Batch(inputs, {task.name: targets_of(task, rows, generator, missing) for task in tasks})


@torch.no_grad()
def assert_pairs_equal_single_losses(network: GroupingNetwork, batch: Batch) -> None:
    losses, outputs = PairLosses(network.tasks, network.pairs), network.forward_pairs(batch.inputs)
    together, apart = losses(outputs, batch.targets), losses.separate(outputs, batch.targets)
    single = pair_outputs(network, outputs)
    for row, alone, (k, n) in zip(together, apart, network.pairs, strict=True):
        task = network.tasks[n]
        expected = expected_sum(task, single[k, n], batch.targets[task.name])
        assert row.sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-5), task.name
        torch.testing.assert_close(alone, row)
        each = sample_loss(task, single[k, n], batch.targets[task.name])
        torch.testing.assert_close(each, row, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(
    losses=st.lists(st.sampled_from(LOSSES), min_size=2, max_size=14),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1000),
    missing=st.floats(0, 1),
    prune=st.booleans(),
)
def test_all_pairs_with_any_options_equal_the_libraries(losses, groups, seed, missing, prune):
    rng = np.random.default_rng(seed)
    tasks = [task_of(f"t{i}", loss, rng, int(rng.integers(2, 4))) for i, loss in enumerate(losses)]
    network = GroupingNetwork(mlp_spec(tasks, groups)).eval()
    if prune:
        alive = torch.rand(len(tasks), groups, generator=torch.Generator().manual_seed(seed)) < 0.5
        alive[:, 0] |= ~alive.any(1)
        network.keep(alive)
    assert_pairs_equal_single_losses(network, batch_of(tasks, 6, 5, missing))


@pytest.mark.parametrize("count", [11, 101, 257])
def test_many_weighted_tasks_are_one_family(count):
    rng = np.random.default_rng(count)
    tasks = [Task(f"t{i}", "binary", loss_options={"pos_weight": float(rng.uniform(2, 9))}) for i in range(count)]
    network = GroupingNetwork(mlp_spec(tasks, 2)).eval()
    alive = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    alive[:, 0] |= ~alive.any(1)
    network.keep(alive)
    assert PairLosses(network.tasks, network.pairs).families == [("binary_cross_entropy", 1)]
    assert_pairs_equal_single_losses(network, batch_of(tasks, 6, 3, 0.3))


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "ordinal"])
@pytest.mark.parametrize("classes", [11, 101, 257])
def test_many_weighted_classes_equal_the_libraries(loss, classes):
    rng = np.random.default_rng(classes)
    tasks = [task_of(f"t{i}", loss, rng, classes) for i in range(2)]
    network = GroupingNetwork(mlp_spec(tasks, 2)).eval()
    assert_pairs_equal_single_losses(network, batch_of(tasks, 6, 4, 0.3))


def test_dense_tasks_with_options_equal_single_losses():
    tasks = [
        Task("a", "dense_classification", 3, loss_options={"class_weights": [1, 5, 2], "label_smoothing": 0.1}),
        Task("b", "dense_classification", 3, loss="focal", loss_options={"gamma": 1.5}),
        Task("c", "dense_classification", 3, loss="ordinal", ignore_index=0),
        Task("d", "dense_classification", 3),
        Task("e", "dense_regression", loss="huber", loss_options={"delta": 0.3}),
        Task("f", "dense_regression", 2, loss="quantile", loss_options={"quantile": 0.8}),
        Task("g", "dense_regression", loss="quantile", loss_options={"quantile": 0.2}),
    ]
    network = GroupingNetwork(image_spec(tasks, 2)).eval()
    network.keep(torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 0], [1, 1]]).bool())
    batch = samples.batch(network.spec.input, tasks, 3, missing=0.3)
    losses = PairLosses(network.tasks, network.pairs)
    with torch.no_grad():
        outputs = network.forward_pairs(batch.inputs)
        together = losses(outputs, batch.targets)
    for row, (k, n) in zip(together, network.pairs, strict=True):
        expected = sample_loss(tasks[n], outputs.dense[k, n], batch.targets[tasks[n].name])
        torch.testing.assert_close(row, expected)
    weighted, output, target = tasks[0], outputs.dense[0, 0].detach(), batch.targets["a"]
    expected = F.cross_entropy(
        output, target, torch.tensor([1.0, 5.0, 2.0]), ignore_index=-1, label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(sample_loss(weighted, output, target), expected.sum((1, 2)))


def test_members_of_an_encoder_have_the_mean_of_their_losses():
    tasks = [task_of(f"t{i}", loss, np.random.default_rng(i)) for i, loss in enumerate(LOSSES)]
    encoder = EncoderSpec("tabm", options={"width": 8, "blocks": 2, "members": 2})
    network = GroupingNetwork(NetworkSpec(InputSpec("features", (6,)), tuple(tasks), encoder, 2)).eval()
    batch = batch_of(tasks, 6, 5, 0.3)
    with torch.no_grad():
        outputs = network.forward_pairs(batch.inputs)
        found = PairLosses(tasks, network.pairs)(outputs, batch.targets)
        each = []
        for member in range(2):
            alone = replace(outputs, rows=outputs.rows[:, member::2], members=0)
            each.append(PairLosses(tasks, network.pairs)(alone, batch.targets))
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)


# --- weights from counts


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_balanced_weights_are_those_of_scikit_learn(labels):
    values = np.array(labels)
    task = Task("t", "multiclass", 5, loss_options={"class_weights": "balanced"})
    (found,) = balanced_tasks([task], [samples.Arrays(values, {"t": values}, {})])
    present = np.unique(values)
    weights = compute_class_weight("balanced", classes=present, y=values)
    assert [found.loss_options.class_weights[c] for c in present] == pytest.approx(weights)
    assert {found.loss_options.class_weights[c] for c in set(range(5)) - set(labels)} <= {1.0}


def test_balanced_weights_are_counted_over_labels_that_exist_in_all_parts():
    flag = Task("f", "binary", loss_options={"pos_weight": "balanced"})
    pixel = Task("p", "dense_classification", 3, ignore_index=0, loss_options={"class_weights": "balanced"})
    plain = Task("o", "regression")

    def part(flags, present, pixels):
        labels = {"f": np.array(flags, np.uint8), "p": np.array(pixels, np.uint8).reshape(-1, 1, 2)}
        labels["o"] = np.zeros(len(flags), np.float32)
        return samples.Arrays(np.zeros((len(flags), 1)), labels, {"f": np.array(present)})

    parts = [part([1, 0, 1], [True, True, False], [0, 1, 1, 1, 2, 0]), part([0, 0], [True, True], [1, 1, 1, 2])]
    found = balanced_tasks([flag, pixel, plain], parts)
    assert found[0].loss_options.pos_weight == 3.0  # three labels 0, one label 1
    # eight pixels of two classes: six of class 1, two of class 2; class 0 is no label
    assert found[1].loss_options.class_weights == pytest.approx((1.0, 8 / (2 * 6), 8 / (2 * 2)))
    assert found[2] is plain


def test_balanced_weights_that_were_not_counted_are_refused():
    task = Task("t", "binary", loss_options={"pos_weight": "balanced"})
    with pytest.raises(
        ValueError, match="'t': balanced weights follow from the training labels: call .*balanced_tasks"
    ):
        PairLosses([task], [(0, 0)])


# --- values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "regression", "loss_options": {"delta": 1}}, "'t': loss mse .* no option 'delta', it has none"),
        ({"kind": "regression", "loss": "huber", "loss_options": {"gama": 1}}, "no option 'gama', expected delta"),
        ({"kind": "binary", "loss_options": {"class_weights": [1, 2]}}, "expected pos_weight, label_smoothing"),
        ({"kind": "binary", "loss": "focal", "loss_options": {"pos_weight": 2}}, "expected gamma, alpha"),
        ({"kind": "multiclass", "channels": 3, "loss_options": {"class_weights": [1, 2]}}, "needs 3 numbers"),
        ({"kind": "multiclass", "channels": 2, "loss_options": {"class_weights": [0, 0]}}, "not all 0"),
        ({"kind": "multiclass", "channels": 2, "loss_options": {"class_weights": "even"}}, "balanced, got 'even'"),
        ({"kind": "binary", "loss_options": {"pos_weight": 0}}, "pos_weight must be positive, got 0"),
        ({"kind": "binary", "loss_options": {"pos_weight": "1:9"}}, "a number or balanced, got '1:9'"),
        ({"kind": "binary", "loss_options": {"label_smoothing": 1}}, r"in \[0, 1\), got 1"),
        ({"kind": "binary", "loss_options": {"label_smoothing": "much"}}, "must be numbers"),
        ({"kind": "binary", "loss": "focal", "loss_options": {"gamma": -1}}, "gamma must be at least 0, got -1"),
        ({"kind": "binary", "loss": "focal", "loss_options": {"alpha": 2}}, r"alpha must be in \[0, 1\]"),
        ({"kind": "regression", "loss": "huber", "loss_options": {"delta": 0}}, "delta must be positive"),
        ({"kind": "regression", "loss": "quantile", "loss_options": {"quantile": 1}}, r"must be in \(0, 1\)"),
        ({"kind": "regression", "loss": "focal"}, "unknown loss 'focal'"),
        ({"kind": "dense_regression", "loss": "l1_shift", "loss_options": {"delta": 1}}, "it has none"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Task("t", **values)


def test_a_task_keeps_its_options_in_json_and_has_none_there_by_default():
    task = Task("t", "multiclass", 3, loss="focal", loss_options={"class_weights": (1, 2, 3), "gamma": 1.0})
    stored = json.loads(json.dumps(task.to_dict()))
    assert stored["loss_options"] == {"class_weights": [1.0, 2.0, 3.0], "gamma": 1.0}
    assert Task.from_dict(stored) == task
    assert "loss_options" not in Task("t", "binary").to_dict()
    assert len({task, Task.from_dict(stored)}) == 1  # heads are found by their task


# --- validation


def test_the_score_has_the_cross_entropy_whatever_the_loss():
    plain = [Task("a", "binary"), Task("b", "multiclass", 3), Task("c", "regression")]
    changed = [
        replace(plain[0], loss_options={"pos_weight": 30.0}),
        replace(plain[1], loss="ordinal"),
        plain[2],
    ]
    batch = batch_of(plain, 6, 40, 0.2)
    batch.targets["b"][batch.targets["b"] == -1] = 0
    generator = torch.Generator().manual_seed(0)
    outputs = {"a": torch.randn(40, generator=generator), "b": torch.randn(40, 3, generator=generator)}
    outputs["c"] = torch.randn(40, generator=generator)
    found = {}
    for tasks in (plain, changed):
        sums = MetricSums(tasks)
        for part in (slice(0, 15), slice(15, 40)):
            sums.update({n: o[part] for n, o in outputs.items()}, {n: t[part] for n, t in batch.targets.items()})
        found[tasks is changed] = sums.compute()
    for name in ("a", "b"):
        assert found[True][name]["log_loss"] == pytest.approx(found[False][name]["loss"])
        assert found[True][name]["loss"] > 1.1 * found[False][name]["loss"]
        assert "log_loss" not in found[False][name]
    assert "log_loss" not in found[True]["c"]
    assert score_of(changed, found[True]) == pytest.approx(score_of(plain, found[False]))
    total = sample_loss(changed[0], outputs["a"], batch.targets["a"]).sum() / label_count(
        plain[0], batch.targets["a"]
    )
    assert found[True]["a"]["loss"] == pytest.approx(total.item())  # by the number of labels, not by their weights


def test_the_sums_of_all_workers_have_the_cross_entropy_too():
    tasks = [
        Task("a", "binary", loss="focal"),
        Task("b", "regression"),
        Task("c", "multiclass", 3, loss="ordinal"),
    ]
    batch = batch_of(tasks, 6, 30, 0.2)
    batch.targets["c"][batch.targets["c"] == -1] = 2
    outputs = {"a": torch.randn(30), "b": torch.randn(30), "c": torch.randn(30, 3)}
    whole = MetricSums(tasks)
    whole.update(outputs, batch.targets)

    def work(context):
        mine, sums = slice(context.rank * 10, context.rank * 10 + 10), MetricSums(tasks)
        sums.update({n: o[mine] for n, o in outputs.items()}, {n: t[mine] for n, t in batch.targets.items()})
        sums.reduce(context)
        return sums.compute()

    for found in parallel.in_threads(3, work):
        for name, values in whole.compute().items():
            assert found[name] == pytest.approx(values)
