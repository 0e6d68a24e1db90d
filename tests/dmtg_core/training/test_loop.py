"""The training loop: pruning, learning rates, refused steps, and several processes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    NonFiniteLossError,
    Task,
    TemperatureSchedule,
    TrainSettings,
    evaluate,
    fit,
)
from dmtg_core.training.checkpoint import load_network, read_json
from dmtg_core.training.loop import score_of
from dmtg_core.training.settings import LR_SCHEDULES
from tests.dmtg_core import parallel, samples
from tests.dmtg_core.interrupted import without_times
from tests.dmtg_core.samples import MIXED, SAMPLEWISE, assert_same_tensors, image_spec, mlp_spec
from tests.dmtg_core.training.test_checkpoint import moments
from tests.dmtg_core.training.test_step import OPTIMIZERS, fresh, local, run_step

# --- refused steps


def broken_data(spec: NetworkSpec, where: str, *, rows: int = 40) -> ArrayData:
    """Training data with one sample that is not finite."""
    data = samples.data(spec.input, spec.tasks, rows)
    train = data.splits["train"]
    target = train.inputs if where == "input" else train.labels[where]
    target[7] = np.nan if where == "input" else np.inf
    return data


@pytest.mark.parametrize("where", ["age", "position", "mass"])
def test_fit_names_the_task_whose_target_is_infinite(where):
    spec = mlp_spec()
    with pytest.raises(NonFiniteLossError) as caught:
        fit(GroupingNetwork(spec), broken_data(spec, where), TrainSettings(epochs=2, batch_size=8), local())
    assert f"epoch 1 ({where});" in str(caught.value)
    assert "1 steps were refused" in str(caught.value)


@pytest.mark.parametrize("where", ["input", "age"])
def test_fit_stops_with_the_weights_of_the_good_steps_and_its_last_checkpoint(tmp_path, where):
    spec = mlp_spec()
    network = GroupingNetwork(spec)
    good = samples.data(spec.input, spec.tasks, 40)
    settings = TrainSettings(epochs=4, batch_size=8)
    broken = broken_data(spec, where)

    class LaterBroken(ArrayData):
        def train(self, epoch, batch_size, start=0):
            return (broken if epoch == 2 else good).train(epoch, batch_size, start)

    data = LaterBroken(good.splits, spec.tasks)
    with pytest.raises(NonFiniteLossError, match="epoch 3"):
        fit(network, data, settings, local(tmp_path))
    assert all(p.isfinite().all() for p in network.parameters())
    assert read_json(local(tmp_path).latest() / "loop.json")["epoch"] == 2
    state = fit(GroupingNetwork(spec), good, settings, local(tmp_path))
    assert state.epoch == 4


def test_an_epoch_of_refused_steps_ends_early():
    spec = mlp_spec(SAMPLEWISE[:1])
    drawn = []

    class MonitoredData(ArrayData):
        def train(self, epoch, batch_size, start=0):
            for batch in super().train(epoch, batch_size, start):
                drawn.append(epoch)
                yield batch

    arrays = samples.arrays(spec.input, spec.tasks, 900)
    data = MonitoredData({"train": arrays, "val": arrays}, spec.tasks)
    arrays.inputs[:] = np.nan  # after the check
    with pytest.raises(NonFiniteLossError):
        fit(GroupingNetwork(spec), data, TrainSettings(epochs=1, batch_size=2), local())
    assert len(drawn) == 100


# --- pruning


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("spec", [mlp_spec(stem=1), image_spec(MIXED[:8])], ids=["mlp", "convnet"])
def test_moments_of_kept_heads_survive_pruning_and_training_continues(spec, optimizer):
    settings = TrainSettings(optimizer=optimizer, learning_rate=1e-2)
    state = fresh(spec, settings)
    batch = samples.batch(spec.input, spec.tasks)
    for step in range(2):
        run_step(state, settings, batch, step=step)
    network, before = state.network, moments(state)
    rows_before = {(k, t.name): network.bank.rows(k, t) for k, kept in network.bank.kept.items() for t in kept}
    alive = torch.ones_like(network.gate.alive)
    alive[0, 1:] = False
    alive[2, 0] = False
    alive[:, 2] = False
    state.keep(alive, settings)
    after = moments(state)
    assert after.keys() == {
        name for name in before
        if not name.startswith(("branches.2.", "bank.weights.2/", "bank.biases.2/", "decoders.2_"))
        and name.split("/")[0] in dict(network.named_parameters())
    }  # fmt: skip
    for name, value in after.items():
        if not name.startswith("bank") or value.dim() == 0:
            assert torch.equal(value, before[name]), name
            continue
        k = int(name.split("/")[0].split(".")[-1])
        kept = torch.cat([before[name][rows_before[k, task.name]] for task in network.bank.kept[k]])
        assert torch.equal(value, kept), name
    weights = samples.snapshot(network)
    assert run_step(state, settings, batch, step=2).refused == 0
    trained = [name for name, p in network.named_parameters() if not torch.equal(p, weights[name])]
    assert "bank.weights.0" in trained
    assert "gate.logits" in trained


def test_a_pruning_that_removes_nothing_changes_nothing_in_the_next_step():
    spec, settings = mlp_spec(), TrainSettings()
    kept, plain = fresh(spec, settings), fresh(spec, settings)
    batch = samples.batch(spec.input, spec.tasks)
    for state in (kept, plain):
        run_step(state, settings, batch)
    kept.keep(torch.ones_like(kept.network.gate.alive), settings)
    for state in (kept, plain):
        run_step(state, settings, batch, step=1)
    assert_same_tensors(samples.snapshot(kept.network), samples.snapshot(plain.network))
    assert_same_tensors(moments(kept), moments(plain))


SEARCHING = TrainSettings(
    epochs=6, search_share=0.67, batch_size=16, learning_rate=1e-2, gate_learning_rate=0.3, prune_threshold=0.25,
    temperature=TemperatureSchedule("linear", 2.5, 0.5),
)  # fmt: skip


def test_heads_are_pruned_by_the_gate_and_only_the_likeliest_stay_after_the_search():
    spec = mlp_spec()
    state = fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks), SEARCHING, local())
    heads = [record["heads"] for record in state.history]
    assert heads[0] == 30
    assert heads == sorted(heads, reverse=True)
    assert 10 < heads[3] < 30
    assert heads[4:] == [10, 10]
    assert [record["phase"] for record in state.history] == ["search"] * 4 + ["finetune"] * 2
    final = torch.tensor(state.history[-1]["probabilities"])
    assert (final.amax(1) == 1).all()
    assert not state.network.training


def test_the_grouping_at_the_end_of_the_search_is_the_grouping_of_the_result():
    spec = mlp_spec()
    state = fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks), SEARCHING, local())
    chosen = torch.tensor(state.history[3]["probabilities"]).argmax(1).tolist()
    assert state.network.gate.assignment() == chosen


@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_a_search_to_the_end_returns_its_best_epoch_despite_later_pruning(threshold):
    """With the labels of the validation turned around the first epoch is the best one."""
    tasks = [task for task in SAMPLEWISE if task.kind == "binary"]
    train = samples.arrays(samples.FEATURES, tasks, 48)
    turned = replace(train, labels={name: 1 - label for name, label in train.labels.items()})
    data = ArrayData({"train": train, "val": turned}, tasks)
    settings = replace(
        SEARCHING, search_share=1.0, epochs=8, prune_threshold=threshold, learning_rate=0.2, gate_learning_rate=0.1
    )
    state = fit(GroupingNetwork(mlp_spec(tasks)), data, settings, local())
    assert {record["phase"] for record in state.history} == {"search"}
    scores = [record["val_score"] for record in state.history]
    assert scores[0] == min(scores)
    assert (state.history[-1]["heads"] < state.history[0]["heads"]) == (threshold > 0)
    found = evaluate(state.network, data, "val", context=local())
    assert score_of(tasks, found) == pytest.approx(scores[0], rel=1e-6)
    assert len(state.network.pairs) == len(tasks)


# --- schedules and settings


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("cosine", [1.0, 0.933013, 0.75, 0.5, 0.25, 0.066987]),  # (1 + cos(π e / 6)) / 2
        ("halving", [1, 1, 0.5, 0.5, 0.25, 0.25]),
    ],
)
def test_learning_rates_follow_their_schedule(name, factors):
    spec = mlp_spec(SAMPLEWISE[:2])
    settings = TrainSettings(epochs=6, lr_schedule=name, lr_every=2, learning_rate=0.01, batch_size=32)
    state = fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks), settings, local())
    assert [r["learning_rate"] / 0.01 for r in state.history] == pytest.approx(factors, abs=1e-6)
    assert state.optimizer.param_groups[0]["lr"] == state.history[-1]["learning_rate"]


def test_every_learning_rate_schedule_starts_at_one_and_never_rises():
    settings = TrainSettings(epochs=40)
    for schedule in LR_SCHEDULES.values():
        factors = [schedule(epoch, settings, [1.0] * epoch) for epoch in range(40)]
        assert factors[0] == 1
        assert factors == sorted(factors, reverse=True)
        assert min(factors) > 0


def test_plateau_halves_after_epochs_without_progress():
    plateau, settings = LR_SCHEDULES["plateau"], TrainSettings(lr_patience=2)
    falling = [0.8**epoch for epoch in range(10)]
    assert plateau(10, settings, falling) == 1
    stuck = [*falling, *[falling[-1] * 0.95] * 9]  # five per cent is no progress
    assert [plateau(0, settings, stuck[: 10 + n]) for n in range(10)] == [1, 1, 1, *[0.5] * 3, *[0.25] * 3, 0.125]
    assert plateau(0, settings, [*stuck, falling[-1] / 2, 1.0, 1.0]) == 0.125  # progress resets the counter


def test_plateau_is_used_in_training_and_the_rate_stays_above_its_minimum():
    spec = mlp_spec(SAMPLEWISE[:2])
    settings = replace(
        SEARCHING,
        epochs=5,
        lr_schedule="plateau",
        lr_patience=0,
        learning_rate=1e-9,
        lr_min=2e-10,
        search_share=1.0,
    )  # a rate without progress
    state = fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks), settings, local())
    assert [r["learning_rate"] for r in state.history] == pytest.approx([1e-9, 1e-9, 5e-10, 2.5e-10, 2e-10])


def test_temperature_runs_over_the_search_and_not_over_the_epochs():
    spec = mlp_spec(SAMPLEWISE[:2])
    settings = replace(SEARCHING, epochs=4, search_share=0.5)  # two epochs of three steps
    state = fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks), settings, local())
    # the last step of each epoch has 2 and 5 of the 6 steps behind it; then the search is over
    expected = [2.5 - 2 * 2 / 6, 2.5 - 2 * 5 / 6, 0.5, 0.5]
    assert [r["temperature"] for r in state.history] == pytest.approx(expected)


@pytest.mark.parametrize(("epochs", "share", "expected"), [(20, 0.5, 10), (1, 0.1, 1), (3, 1.0, 3), (10, 0.04, 1)])
def test_the_search_has_its_share_of_the_epochs_and_at_least_one(epochs, share, expected):
    assert TrainSettings(epochs=epochs, search_share=share).search_epochs == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr_every": 0}, "lr_every must be at least 1, got 0"),
        ({"search_share": 0.0}, "search_share"),
        ({"search_share": 1.1}, "search_share"),
        ({"search_share": math.nan}, "search_share"),
        ({"prune_threshold": 1.0}, "prune_threshold"),
        ({"prune_threshold": -0.1}, "prune_threshold"),
        ({"clip_norm": -1.0}, "clip_norm"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**values)


@pytest.mark.parametrize(
    ("tasks", "metrics", "score"),
    [
        # log(0.5 + 0.01) = -0.67334, log(1 - 0.745 + 0.01) = -1.32803
        ([Task("a", "binary", metric="auroc")], [{"loss": 0.5, "auroc": 0.745}], -1.00069),
        # an error in the unit of the task is divided by its scale; log(2 / 4 + 0.01) = -0.67334
        ([Task("a", "regression", scale=(4.0,), metric="rmse")], [{"loss": 1.0, "rmse": 2.0}], -0.33170),
        # the mean over tasks; a metric that is not defined is left out
        (
            [Task("a", "binary", metric="accuracy"), Task("b", "binary", metric="auroc")],
            [{"loss": 1.0, "accuracy": 1.0}, {"loss": math.e, "auroc": math.nan}],
            ((math.log(1.01) + math.log(0.01)) / 2 + math.log(math.e + 0.01)) / 2,
        ),
        ([Task("a", "binary"), Task("b", "binary")], [{"loss": 1.0}, {"loss": math.nan}], math.inf),
        ([Task("a", "binary")], [{"loss": 0.0}], math.log(0.01)),
    ],
)
def test_the_score_is_the_mean_logarithm_of_losses_and_headline_errors(tasks, metrics, score):
    named = {task.name: found for task, found in zip(tasks, metrics, strict=True)}
    assert score_of(tasks, named) == pytest.approx(score, abs=1e-3)


def test_a_task_without_errors_does_not_outweigh_the_others():
    """From loss 0.0026 to 0.00013 is a factor of 20, and as little as nothing for who uses the task."""
    tasks = [Task("solved", "binary", metric="auroc"), *(Task(name, "regression") for name in "abcd")]
    before = {"solved": {"loss": 0.0026, "auroc": 1.0}, **{name: {"loss": 0.8, "rmse": 0.9} for name in "abcd"}}
    after = {"solved": {"loss": 0.00013, "auroc": 1.0}, **{name: {"loss": 0.86, "rmse": 0.93} for name in "abcd"}}
    assert score_of(tasks, before) < score_of(tasks, after)


def test_evaluation_does_not_change_the_network():
    spec = image_spec(MIXED[:5])
    network = GroupingNetwork(spec).train()
    data = samples.data(spec.input, spec.tasks, 8)
    before = samples.snapshot(network)
    first = evaluate(network, data, "val", batch_size=3, context=local())
    assert network.training
    assert_same_tensors(samples.snapshot(network), before)
    assert evaluate(network.eval(), data, "val", batch_size=3, context=local()) == first
    assert not network.training


def test_bf16_trains_and_stays_near_fp32():
    spec = image_spec(MIXED[:6])
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = TrainSettings(epochs=2, batch_size=16, precision=precision)
        state = fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks, 32), settings, local())
        losses[precision] = sum(state.history[-1]["train_loss"].values())
    assert math.isfinite(losses["bf16"])
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_a_run_is_reproducible_and_independent_of_global_random_state():
    spec = image_spec(MIXED[:6])
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        runs.append(fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks, 24), SEARCHING, local()))
        assert torch.equal(torch.get_rng_state(), before)
    assert without_times(runs[0].history) == without_times(runs[1].history)
    assert_same_tensors(samples.snapshot(runs[0].network), samples.snapshot(runs[1].network))


# --- two processes


@pytest.mark.parametrize("sampling", ["gumbel"])
def test_two_processes_have_the_weights_of_one_on_the_same_global_batches(two_processes, tmp_path, sampling):
    spec = parallel.spec_for(sampling)
    data = samples.data(spec.input, spec.tasks, parallel.ROWS, missing=parallel.MISSING)
    single = fit(GroupingNetwork(spec), data, parallel.SETTINGS, local())
    assert len({record["heads"] for record in single.history}) >= 2
    two_processes(parallel.train, tmp_path, sampling)
    histories = [json.loads((tmp_path / f"rank_{rank}" / "history.json").read_text()) for rank in range(2)]
    networks = [load_network(tmp_path / f"rank_{rank}") for rank in range(2)]
    assert_same_tensors(samples.snapshot(networks[0]), samples.snapshot(networks[1]))
    expected = samples.snapshot(single.network)
    found = samples.snapshot(networks[0])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5, msg=name)
    for here, there, alone in zip(*histories, single.history, strict=True):
        assert here["val"] == there["val"]
        assert here["heads"] == alone["heads"]
        assert here["val_score"] == pytest.approx(alone["val_score"], abs=1e-5)
        assert here["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)


# --- the method


def test_a_gate_moves_a_task_to_its_better_branch():
    """Two tasks of opposite labels on one branch of a single feature: the gate must separate them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 2)).astype(np.float32)
    labels = {"left": (x[:, 0] > 0).astype(np.uint8), "right": (x[:, 1] > 0).astype(np.uint8)}
    tasks = tuple(Task(name, "binary") for name in labels)
    split = Arrays(x, labels, {})
    spec = NetworkSpec(
        InputSpec("features", (2,)),
        tasks,
        EncoderSpec("mlp", options={"widths": [1]}),
        2,
        initial="diagonal",
        seed=3,
    )
    settings = TrainSettings(epochs=30, learning_rate=0.05, temperature=TemperatureSchedule("cosine", 2.5, 0.3))
    data = ArrayData({"train": split, "val": split}, tasks)
    state = fit(GroupingNetwork(spec), data, settings, local())
    assert len(state.network.grouping().groups) == 2
    found = evaluate(state.network, data, "val")
    assert min(metrics["accuracy"] for metrics in found.values()) > 0.9
