"""Resuming runs: at an epoch, within an epoch, and with a damaged newest checkpoint."""

from dataclasses import replace

import pytest
import torch

from dmtg_core import EncoderSpec, GroupingNetwork, fit
from dmtg_core.training.checkpoint import SEAL, check_seal, load_network, read_json, seal
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted, interrupt_at, without_times
from tests.dmtg_core.samples import MIXED, assert_same_tensors, image_spec, mlp_spec
from tests.dmtg_core.training.test_checkpoint import moments
from tests.dmtg_core.training.test_loop import SEARCHING
from tests.dmtg_core.training.test_step import local

SETTINGS = replace(SEARCHING, epochs=3, search_share=0.6, augment=())
DROPOUT = EncoderSpec("tabm", options={"width": 8, "blocks": 2, "members": 2, "dropout": 0.5})


def stopping_after(context, writes: int):
    """A context that kills the run after a number of checkpoints."""
    plain, count = context.report, iter(range(1, writes + 1))

    def report(record, save):
        plain(record, save)
        if next(count) == writes:
            raise Interrupted

    context.report = report
    return context


def assert_ends_alike(found, expected):
    assert_same_tensors(samples.snapshot(found.network), samples.snapshot(expected.network))
    assert_same_tensors(moments(found), moments(expected))
    assert without_times(found.history) == without_times(expected.history)


# the second one begins with the checkpoint of the last epoch of the search
SOME, ALL = (1, 4), tuple(range(1, 6))
MLP, CONVNET = mlp_spec(stem=1), image_spec(MIXED[:6])


@pytest.mark.parametrize(
    ("spec", "optimizer", "epochs"),
    [
        pytest.param(MLP, "adam", SOME, id="mlp-adam"),
        pytest.param(MLP, "sgd", SOME, id="mlp-sgd"),
        pytest.param(CONVNET, "adam", SOME[1:], id="convnet-adam"),
        *(
            pytest.param(spec, optimizer, ALL, id=f"{spec.encoder.name}-{optimizer}-all", marks=pytest.mark.soak)
            for spec in (MLP, CONVNET)
            for optimizer in ("adam", "sgd")
        ),
    ],
)
def test_a_run_interrupted_at_any_epoch_has_the_same_result(tmp_path, spec, optimizer, epochs):
    settings = replace(SEARCHING, epochs=5, search_share=0.6, optimizer=optimizer, lr_schedule="cosine")
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2)
    expected = fit(GroupingNetwork(spec), data, settings, local())
    assert len({record["heads"] for record in expected.history}) >= 2
    for epoch in epochs:
        folder = tmp_path / str(epoch)
        with pytest.raises(Interrupted):
            fit(GroupingNetwork(spec), data, settings, local(folder, on_record=interrupt_at(epoch)))
        other = GroupingNetwork(replace(spec, seed=99))  # its weights must not matter once there is a checkpoint
        resumed = fit(other if epoch > 1 else GroupingNetwork(spec), data, settings, local(folder))
        assert_same_tensors(samples.snapshot(resumed.network), samples.snapshot(expected.network))
        assert without_times(resumed.history) == without_times(expected.history)
        assert_same_tensors(moments(resumed), moments(expected))


def test_a_run_interrupted_at_each_epoch_has_the_same_result(tmp_path):
    spec, settings = mlp_spec(), replace(SEARCHING, epochs=5)
    data = samples.data(spec.input, spec.tasks)
    expected = fit(GroupingNetwork(spec), data, settings, local())

    for _ in range(settings.epochs):
        with pytest.raises(Interrupted):
            fit(GroupingNetwork(spec), data, settings, stopping_after(local(tmp_path), 1))
    resumed = fit(GroupingNetwork(spec), data, settings, local(tmp_path))
    assert_same_tensors(samples.snapshot(resumed.network), samples.snapshot(expected.network))
    assert without_times(resumed.history) == without_times(expected.history)


def test_a_finished_run_resumes_without_training(tmp_path):
    spec, settings = mlp_spec(), replace(SEARCHING, epochs=3)
    data = samples.data(spec.input, spec.tasks)
    first = fit(GroupingNetwork(spec), data, settings, local(tmp_path))
    again = fit(GroupingNetwork(spec), data, settings, local(tmp_path, on_record=lambda _: pytest.fail("trained")))
    assert_same_tensors(samples.snapshot(again.network), samples.snapshot(first.network))


def test_a_checkpoint_holds_the_network_of_its_epoch(tmp_path):
    spec, settings = mlp_spec(), replace(SEARCHING, epochs=2)
    fit(GroupingNetwork(spec), samples.data(spec.input, spec.tasks), settings, local(tmp_path))
    network = load_network(local(tmp_path).latest())
    record = read_json(local(tmp_path).latest() / "loop.json")["history"][-1]
    assert network.gate.probabilities().tolist() == record["probabilities"]
    assert len(network.pairs) == record["heads"]


@pytest.mark.parametrize(
    ("spec", "every"),
    [
        pytest.param(MLP, 1, id="mlp"),
        pytest.param(CONVNET, 4, id="convnet"),
        pytest.param(CONVNET, 1, id="convnet-all", marks=pytest.mark.soak),
        pytest.param(replace(mlp_spec(), encoder=DROPOUT), 5, id="dropout"),
        pytest.param(replace(mlp_spec(), encoder=DROPOUT), 1, id="dropout-all", marks=pytest.mark.soak),
    ],
)
def test_a_run_interrupted_at_any_step_has_the_same_result(tmp_path, spec, every):
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2)
    every_step = replace(SETTINGS, checkpoint_every=1)
    expected = fit(GroupingNetwork(spec), data, SETTINGS, local())
    steps = data.steps(SETTINGS.batch_size)
    assert steps > 1
    for writes in range(every, SETTINGS.epochs * steps, every):
        folder = tmp_path / str(writes)
        with pytest.raises(Interrupted):
            fit(GroupingNetwork(spec), data, every_step, stopping_after(local(folder), writes))
        other = GroupingNetwork(replace(spec, seed=99))
        assert_ends_alike(fit(other, data, every_step, local(folder)), expected)


@pytest.mark.parametrize("aggregator", ["pcgrad", "upgrad"])
def test_an_interrupted_run_with_an_aggregator_has_the_same_result(tmp_path, aggregator):
    spec = mlp_spec(groups=2, stem=1)
    data = samples.data(spec.input, spec.tasks, 32, missing=0.2)
    settings = replace(SETTINGS, search_share=0.3, checkpoint_every=1, aggregator=aggregator)
    expected = fit(GroupingNetwork(spec), data, settings, local())
    with pytest.raises(Interrupted):
        fit(GroupingNetwork(spec), data, settings, stopping_after(local(tmp_path), 4))
    assert_ends_alike(fit(GroupingNetwork(spec), data, settings, local(tmp_path)), expected)
    summed = fit(GroupingNetwork(spec), data, replace(settings, aggregator="sum"), local())
    assert summed.history[0]["train_loss"] == expected.history[0]["train_loss"]
    assert summed.history[-1]["train_loss"] != expected.history[-1]["train_loss"]


@pytest.mark.parametrize(("every", "within"), [(0, 0), (1, 6), (2, 3), (4, 2), (100, 0)])
def test_checkpoints_within_an_epoch_have_the_requested_number(tmp_path, every, within):
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks, 48)
    settings = replace(SETTINGS, checkpoint_every=every, batch_size=16)
    assert data.steps(16) == 3
    context, written = local(tmp_path), []
    plain = context.report
    context.report = lambda record, save: (written.append(record), plain(record, save))
    fit(GroupingNetwork(spec), data, settings, context)
    # an epoch's last step has the checkpoint of the epoch itself
    assert written.count(None) == within
    assert len(written) == within + settings.epochs


@pytest.mark.parametrize("due", [1, 2, 4])
def test_a_checkpoint_that_is_due_is_written_after_the_same_step(tmp_path, due):
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks, 48)
    settings = replace(SETTINGS, batch_size=16)
    expected = fit(GroupingNetwork(spec), data, settings, local())
    context, calls = stopping_after(local(tmp_path), 1 if due < 3 else 2), iter(range(1, 100))
    context.checkpoint_due = lambda: next(calls) == due
    with pytest.raises(Interrupted):
        fit(GroupingNetwork(spec), data, settings, context)
    # an epoch has three steps; after the last one it is not asked, because the epoch ends with a checkpoint
    saved = read_json(max(tmp_path.iterdir()) / "loop.json", "step")["step"]
    assert saved == {1: 1, 2: 2, 4: 5}[due]
    assert_ends_alike(fit(GroupingNetwork(spec), data, settings, local(tmp_path)), expected)


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, caplog):
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks)
    settings = replace(SETTINGS, checkpoint_every=1)
    expected = fit(GroupingNetwork(spec), data, settings, local())
    with pytest.raises(Interrupted):
        fit(GroupingNetwork(spec), data, settings, stopping_after(local(tmp_path), 4))
    before, newest = sorted(tmp_path.iterdir())
    weights = newest / "network.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1  # a changed weight, which only a checksum detects
    weights.write_bytes(bytes(damaged))
    assert local(tmp_path).latest() == before
    assert "network.safetensors" in caplog.text
    assert_ends_alike(fit(GroupingNetwork(spec), data, settings, local(tmp_path)), expected)


def test_a_run_with_only_damaged_checkpoints_does_not_start_from_scratch(tmp_path):
    context = local(tmp_path)
    for name in ("first", "second"):
        context.report({}, lambda folder, name=name: (folder / "content").write_text(name))
    for folder in tmp_path.iterdir():
        (folder / "content").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole: .*content"):
        context.latest()


@pytest.mark.parametrize("damage", ["change", "lose", "unseal"])
def test_a_seal_names_the_damaged_file(tmp_path, damage):
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "a"
    file.write_text("a")
    (tmp_path / "b").write_text("b")
    seal(tmp_path)
    check_seal(tmp_path)
    if damage == "change":
        file.write_text("x")
    elif damage == "lose":
        file.unlink()
    else:
        (tmp_path / SEAL).unlink()
    with pytest.raises(ValueError, match=SEAL if damage == "unseal" else "inner/a"):
        check_seal(tmp_path)


def test_dropout_depends_on_the_seed_alone_and_leaves_the_random_state_of_the_caller() -> None:
    spec = replace(mlp_spec(), encoder=DROPOUT)
    data = samples.data(spec.input, spec.tasks, 32)
    found = []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        found.append(fit(GroupingNetwork(spec), data, replace(SETTINGS, seed=seed), local()))
        after = torch.rand(3)
        torch.manual_seed(state)
        assert torch.equal(after, torch.rand(3))
    assert_ends_alike(found[0], found[1])
    losses = [one.history[0]["train_loss"] for one in found]
    assert losses[2] != losses[1]
