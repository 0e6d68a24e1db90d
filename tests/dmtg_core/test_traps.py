"""One regression test for each error of published implementations of the method."""

import math
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupGate,
    GroupingNetwork,
    InputSpec,
    LocalContext,
    MetricSums,
    NetworkSpec,
    NonFiniteLossError,
    Task,
    TemperatureSchedule,
    TrainSettings,
    TrainState,
    evaluate,
    fit,
    normalized_gain,
    total_error,
)
from dmtg_core.training.losses import label_counts, sample_loss
from tests.dmtg_core import samples
from tests.dmtg_core.host_syncs import HostSyncs
from tests.dmtg_core.interrupted import Interrupted, interrupt_at
from tests.dmtg_core.parallel import in_threads
from tests.dmtg_core.samples import MIXED, image_spec, mlp_spec
from tests.dmtg_core.training.test_checkpoint import looks_like_a_pickle
from tests.dmtg_core.training.test_metrics import IMAGE, measure
from tests.dmtg_core.training.test_step import run_step


def local(folder=None, **options) -> LocalContext:
    """A context on the CPU."""
    return LocalContext(folder, device="cpu", **options)


@pytest.mark.parametrize("values", [[0, 255, 256, 30000], [32767, 32768, 50000, 65535]])
@pytest.mark.parametrize("kind", ["dense_regression", "regression"])
def test_16_bit_targets_keep_their_variance(kind, values):
    """Depth, keypoints and edges became constant targets in a scaling that clipped them."""
    task = Task("depth", kind, offset=(1500.0,), scale=(1000.0,))
    stored = np.array(values, dtype=np.uint16)
    stored = stored.reshape(1, 2, 2) if kind == "dense_regression" else stored
    arrays = Arrays(np.zeros((len(stored), 3), np.float32), {"depth": stored}, {})
    target = arrays.batch([task], np.arange(len(stored)), torch.device("cpu")).targets["depth"]
    expected = (torch.tensor(values, dtype=torch.float64) - 1500) / 1000
    torch.testing.assert_close(target.flatten().double(), expected, rtol=1e-6, atol=1e-6)
    assert target.flatten().unique().numel() == 4
    torch.testing.assert_close(
        task.decode(target).flatten().double(), expected * 1000 + 1500, rtol=1e-6, atol=1e-2
    )


@pytest.mark.parametrize("ignored", [255, 0])
@pytest.mark.parametrize("classes", [2, 18])
def test_mean_iou_of_a_perfect_segmentation_is_one(classes, ignored):
    """It was divided by 18 with class 0 left out, so perfect was 0.944."""
    task = Task("t", "dense_classification", classes, ignore_index=ignored)
    target = torch.arange(classes).reshape(1, 1, classes)
    output = torch.nn.functional.one_hot(target, classes).float().movedim(-1, 1)
    assert measure(task, output, target)["miou"] == 1.0


def test_mean_iou_counts_class_0_when_it_is_a_class():
    task = Task("t", "dense_classification", 3)
    target = torch.tensor([[[0, 0, 1, 2]]])
    output = torch.nn.functional.one_hot(torch.tensor([[[1, 1, 1, 2]]]), 3).float().movedim(-1, 1)
    assert measure(task, output, target)["miou"] == pytest.approx((0 + 1 / 3 + 1) / 3)


def test_mean_iou_leaves_an_ignored_class_0_out():
    task = Task("t", "dense_classification", 3, ignore_index=0)
    target = torch.tensor([[[0, 0, 1, 2]]])
    output = torch.nn.functional.one_hot(torch.tensor([[[1, 1, 1, 2]]]), 3).float().movedim(-1, 1)
    assert measure(task, output, target)["miou"] == 1.0


def test_an_all_background_segmentation_gives_a_number():
    task = Task("t", "dense_classification", 3)
    found = measure(task, torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("task", MIXED, ids=lambda t: t.name)
def test_a_target_without_any_label_gives_no_loss_and_no_crash(task):
    batch = samples.batch(IMAGE, [task], missing=1.0)
    target = batch.targets[task.name]
    shape = (len(target), task.channels, *target.shape[1:]) if task.classes else target.shape
    output = torch.randn(shape, requires_grad=True)
    loss = sample_loss(task, output, target).sum()
    loss.backward()
    assert loss == 0
    assert (output.grad == 0).all()
    assert label_counts([task], batch.targets) == 0
    assert all(math.isnan(value) for value in measure(task, output.detach(), target).values())


def test_a_batch_without_labels_changes_no_weights():
    spec, settings = mlp_spec(), TrainSettings(optimizer="sgd")
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    before = samples.snapshot(state.network)
    figures = run_step(state, settings, samples.batch(spec.input, spec.tasks, missing=1.0))
    assert figures.refused == 0
    assert (figures.by_task == 0).all()
    samples.assert_same_tensors(samples.snapshot(state.network), before)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_validation_sees_no_sample_twice_and_depends_on_no_batch_size(workers, batch_size):
    """Samplers padded with duplicates, and means of batches ignored their size."""
    spec = image_spec(MIXED[:6])
    network = GroupingNetwork(spec).eval()
    whole = samples.data(spec.input, spec.tasks, 19, missing=0.3)
    expected = evaluate(network, whole, "val", batch_size=19, context=local())

    def measured(context) -> dict:
        data = samples.data(
            spec.input, spec.tasks, 19, missing=0.3, rank=context.rank, world_size=context.world_size
        )
        sums = MetricSums(spec.tasks)
        with torch.no_grad():
            for batch in data.evaluate("val", batch_size):
                sums.update(network(batch.inputs), batch.targets)
        sums.reduce(context)
        return sums.compute()

    found, *others = in_threads(workers, measured)
    assert all(repr(other) == repr(found) for other in others)
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics, rel=1e-5, abs=1e-6, nan_ok=True)


def test_the_entropy_of_a_saturated_gate_gives_no_nan_gradient():
    gate = GroupGate(2, 3)
    with torch.no_grad():
        gate.logits[0, 0] = 1e4
    gate.alive[1, 1:] = False
    gate.entropy().mean().backward()
    assert gate.logits.grad.isfinite().all()


STRING_OPTIONS = [
    (Task, {"name": "t", "kind": "binary"}, ("kind", "loss", "metric")),
    (InputSpec, {"kind": "features", "shape": (3,)}, ("kind", "dtype")),
    (TemperatureSchedule, {}, ("family",)),
    (TrainSettings, {}, ("optimizer", "lr_schedule", "precision", "aggregator", "batch_branches")),
    (
        NetworkSpec,
        {"input": samples.FEATURES, "tasks": samples.SAMPLEWISE, "encoder": EncoderSpec("mlp"), "groups": 2},
        ("sampling", "initial", "decoder", "task_weighting", "rescale_gradients"),
    ),
    (EncoderSpec, {"name": "mlp"}, ("name", "branch")),
]


@pytest.mark.parametrize(
    ("made", "valid", "option"),
    [(made, valid, option) for made, valid, options in STRING_OPTIONS for option in options],
    ids=lambda value: value.__name__ if isinstance(value, type) else (value if isinstance(value, str) else ""),
)
def test_an_unknown_option_value_is_refused(made, valid, option):
    """They were handled by the last `else`."""

    def build():
        built = made(**{**valid, option: "nonsense"})
        if isinstance(built, EncoderSpec):
            built.stages(samples.FEATURES)
        if isinstance(built, NetworkSpec):
            GroupingNetwork(built)

    with pytest.raises(ValueError, match="'nonsense'"):
        build()


def test_every_string_option_is_tested():
    free_text = {(Task, "name"), (Task, "unit")}
    for made, _, options in STRING_OPTIONS:
        assert is_dataclass(made)
        strings = {f.name for f in fields(made) if f.type == "str" and (made, f.name) not in free_text}
        assert strings == set(options), made


@pytest.mark.parametrize("made", [made for made, _, _ in STRING_OPTIONS], ids=lambda made: made.__name__)
def test_an_unknown_option_name_is_refused(made):
    valid = next(valid for other, valid, _ in STRING_OPTIONS if other is made)
    with pytest.raises(TypeError, match="nonsense"):
        made(**valid, nonsense=1)


def test_a_loss_that_became_nan_does_not_end_silently():
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks)
    data.splits["train"].inputs[:] = np.nan
    with pytest.raises(NonFiniteLossError, match="the weights are those of the last good step"):
        fit(GroupingNetwork(spec), data, TrainSettings(epochs=1), local())


def test_the_best_epoch_depends_on_validation_only():
    """A checkpoint was "best" only when the training loss had improved as well."""
    spec = mlp_spec(samples.SAMPLEWISE[:2])
    data = samples.data(spec.input, spec.tasks)
    settings = TrainSettings(
        epochs=9, search_share=0.2, learning_rate=0.3, optimizer="sgd", lr_schedule="constant"
    )
    state = fit(GroupingNetwork(spec), data, settings, local())
    tuned = [record for record in state.history if record["phase"] == "finetune"]
    best = min(tuned, key=lambda record: record["val_score"])
    assert best is not tuned[-1]
    assert min(tuned, key=lambda record: sum(record["train_loss"].values())) is not best
    assert state.best_score == best["val_score"]
    found = evaluate(state.network, data, "val", context=local())
    assert {n: m["loss"] for n, m in found.items()} == pytest.approx(
        {n: m["loss"] for n, m in best["val"].items()}
    )


@pytest.mark.parametrize("schedule", ["cosine", "halving"])
def test_the_learning_rate_schedule_is_not_replayed_by_a_resumed_run(tmp_path, schedule):
    spec = mlp_spec(samples.SAMPLEWISE[:2])
    data = samples.data(spec.input, spec.tasks)
    settings = TrainSettings(epochs=6, lr_schedule=schedule, lr_every=2)
    with pytest.raises(Interrupted):
        fit(GroupingNetwork(spec), data, settings, local(tmp_path, on_record=interrupt_at(4)))
    resumed = []
    fit(GroupingNetwork(spec), data, settings, local(tmp_path, on_record=resumed.append))
    whole = fit(GroupingNetwork(spec), data, settings, local()).history
    assert [r["epoch"] for r in resumed] == [4, 5, 6]
    assert [r["learning_rate"] for r in resumed] == [r["learning_rate"] for r in whole[3:]]


def test_accuracies_are_paired_by_name():
    """The order of a dictionary decided which accuracy was compared with which."""
    tasks = [Task(name, "binary") for name in ("b", "a")]
    reference = {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.9}}
    metrics = {"b": {"accuracy": 0.9}, "a": {"accuracy": 0.5}}
    assert normalized_gain(tasks, metrics, reference) == 0
    assert total_error(tasks, metrics) == pytest.approx(60)


@pytest.mark.parametrize("spec", [mlp_spec(), image_spec()], ids=["mlp", "convnet"])
def test_no_layer_zeroes_whole_samples(spec):
    """Dropout over channels takes `(B, F)` for `(C, L)` and zeroes samples."""
    network = GroupingNetwork(spec)
    assert not any(isinstance(module, torch.nn.modules.dropout._DropoutNd) for module in network.modules())


def test_the_host_does_not_wait_in_a_step_whatever_the_number_of_heads():
    """There were K·N + 2 synchronisations a step."""
    spec, settings = mlp_spec(groups=4), TrainSettings(clip_norm=1.0)
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    batch = samples.batch(spec.input, spec.tasks)
    with HostSyncs() as counter:
        run_step(state, settings, batch)
    assert not counter.found
    assert counter.seen


def test_a_checkpoint_holds_no_pickled_module(tmp_path):
    spec = image_spec(MIXED[:4])
    fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks, 8), TrainSettings(epochs=1), local(tmp_path))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".json", ".safetensors"}
    assert not any(looks_like_a_pickle(path.read_bytes()) for path in written)


def test_a_second_network_changes_nothing_in_the_first():
    """Module globals had the options of the last network."""
    spec = mlp_spec()
    inputs = samples.batch(spec.input, spec.tasks).inputs
    first = GroupingNetwork(spec).eval()
    before = first(inputs)
    other = replace(image_spec(), rescale_gradients="tasks", sampling="straight_through", groups=5)
    GroupingNetwork(other).train()
    assert all(torch.equal(value, before[name]) for name, value in first(inputs).items())


def test_labels_of_one_split_do_not_leak_into_the_order_of_another():
    """Validation is read in the order of the split, whatever the epoch of training."""
    values = np.arange(20, dtype=np.float32)
    split = Arrays(values[:, None], {"t": values}, {})
    data = ArrayData({"train": split, "val": split}, [Task("t", "regression")])
    list(data.train(3, 4))
    (batch,) = data.evaluate("val", 100)
    assert batch.targets["t"].tolist() == values.tolist()
