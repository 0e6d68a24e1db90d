"""Diagnostics of an epoch: figures of the gate, conflicts of groups, and warnings."""

import math

import pytest
import torch

from dmtg_core import GroupingNetwork, Task, TrainSettings, fit
from dmtg_core.network.grouping_network import pooled
from dmtg_core.training.diagnostics import conflicts, gate_figures, gradient_cosines, warnings
from dmtg_core.training.losses import sample_loss
from tests.dmtg_core import samples
from tests.dmtg_core.samples import assigned, image_spec, mlp_spec
from tests.dmtg_core.training.test_step import local

SETTINGS = TrainSettings(epochs=20, search_share=0.5)


def record(**over) -> dict:
    """An epoch of two tasks on two branches without a problem."""
    plain = {
        "epoch": 5,
        "phase": "search",
        "train_loss": {"a": 1.0, "b": 1.0},
        "gate": {"entropy": 0.8, "confidence": 0.7, "gradient_norm": 0.1, "loss_spread": {"a": 0.1, "b": 0.1}},
        "probabilities": [[0.7, 0.3], [0.4, 0.6]],
        "cosines": [[1.0, None], [None, 1.0]],
    }
    return plain | over


def gate(**over) -> dict:
    return record()["gate"] | over


# --- the gate


def test_the_gate_s_figures_follow_their_definitions():
    network = assigned(GroupingNetwork(mlp_spec(groups=3)), [0] * 10, by=math.log(2))  # π = (1/2, 1/4, 1/4)
    losses = [float(k + 1) for k, _ in network.pairs]
    found = gate_figures(network, losses, 0.25)
    assert found["entropy"] == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert found["confidence"] == pytest.approx(0.5)
    assert found["gradient_norm"] == 0.25
    assert found["loss_spread"] == pytest.approx({task.name: 2 / 2 for task in network.tasks})


def test_a_single_branch_has_no_entropy_and_no_spread():
    network = GroupingNetwork(mlp_spec(groups=1))
    found = gate_figures(network, [1.0] * 10, 0.0)
    assert (found["entropy"], found["confidence"]) == (0.0, 1.0)
    assert set(found["loss_spread"].values()) == {0.0}


def test_training_records_figures_of_every_epoch():
    spec = mlp_spec(groups=2)
    data = samples.data(spec.input, spec.tasks, missing=0.2)
    state = fit(GroupingNetwork(spec), data, TrainSettings(epochs=4, batch_size=16), local())
    searched, tuned = state.history[0]["gate"], state.history[-1]["gate"]
    assert searched["gradient_norm"] > 0
    assert tuned["gradient_norm"] == pytest.approx(0, abs=1e-7)
    assert min(searched["loss_spread"].values()) > 0
    assert set(tuned["loss_spread"].values()) == {0.0}
    assert [record["warnings"] for record in state.history].count([]) >= 2


# --- gradients of tasks that share a group


@pytest.mark.parametrize("spec", [mlp_spec(groups=2), image_spec(groups=2)], ids=["mlp", "convnet"])
def test_cosines_are_those_of_the_gradients_with_respect_to_the_shared_features(spec):
    choice = [n % 2 for n in range(len(spec.tasks))]
    network = assigned(GroupingNetwork(spec), choice)
    batch = samples.batch(spec.input, spec.tasks, missing=0.2)
    before = samples.snapshot(network.train())
    found = gradient_cosines(network, batch, local())
    samples.assert_same_tensors(samples.snapshot(network), before)
    assert network.training
    network.eval()
    rows = []
    for n, task in enumerate(spec.tasks):
        features = {k: f.detach().requires_grad_() for k, f in network.features(batch.inputs).items()}
        held = features[choice[n]]
        if task.dense:
            output = network.decoders[choice[n], n](held, spec.input.shape[:2])
        else:
            output = network.bank.head(choice[n], task, pooled(held))
        loss = sample_loss(task, output, batch.targets[task.name]).sum()
        rows.append(torch.autograd.grad(loss, held)[0].flatten())
    for a in range(len(spec.tasks)):
        for b in range(len(spec.tasks)):
            if choice[a] != choice[b]:
                assert found[a][b] is None
            else:
                expected = torch.nn.functional.cosine_similarity(rows[a], rows[b], 0).item()
                assert found[a][b] == pytest.approx(expected, abs=1e-4)


def test_gradients_of_opposite_labels_conflict_and_of_equal_labels_agree():
    tasks = [Task(name, "regression") for name in ("x", "same", "opposite")]
    network = GroupingNetwork(mlp_spec(tasks, 1))
    with torch.no_grad():
        network.bank.weights[0][:] = network.bank.weights[0][0]  # equal heads
    batch = samples.batch(network.spec.input, tasks, 8)
    x = torch.full_like(batch.targets["x"], 100.0)
    batch.targets.update(x=x, same=x.clone(), opposite=-x)
    found = gradient_cosines(network, batch, local())
    assert found[0][1] == pytest.approx(1, abs=1e-5)
    assert found[0][2] == pytest.approx(-1, abs=1e-2)


# --- warnings


def test_there_is_no_warning_without_a_problem():
    assert warnings([record()], ["a", "b"], SETTINGS) == []
    assert (
        warnings([record(probabilities=[[1.0], [1.0]], gate=gate(gradient_norm=0.0))], ["a", "b"], SETTINGS) == []
    )


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"gate": gate(gradient_norm=1e-7)}, "the gate has no gradient"),
        ({"epoch": 2, "gate": gate(entropy=0.01)}, "converged after 2 of 10 epochs"),
        (
            {"epoch": 10, "probabilities": [[0.7, 0.3, 0], [0.4, 0.3, 0.3]]},
            "before the gate converged for b (probability",
        ),
    ],
)
def test_problems_of_a_search_are_warned_of(over, message):
    (found,) = warnings([record(**over)], ["a", "b"], SETTINGS)
    assert message in found


@pytest.mark.parametrize(
    "over",
    [
        {"epoch": 8, "gate": gate(entropy=0.01)},
        {"gate": gate(gradient_norm=0.0), "probabilities": [[1.0, 0.0], [0.0, 1.0]]},
        {"epoch": 12, "phase": "finetune", "gate": gate(gradient_norm=0.0, entropy=0.0)},
    ],
)
def test_a_converged_gate_is_not_warned_of(over):
    assert warnings([record(**over)], ["a", "b"], SETTINGS) == []


def test_an_early_gate_is_warned_of_once_and_not_if_groups_were_proposed():
    first, second = (record(epoch=epoch, gate=gate(entropy=0.01)) for epoch in (1, 2))
    (found,) = warnings([first], ["a", "b"], SETTINGS)
    assert "converged after 1 of 10 epochs" in found
    assert warnings([first, second], ["a", "b"], SETTINGS) == []
    assert warnings([first], ["a", "b"], SETTINGS, proposed=True) == []
    lost = record(gate=gate(gradient_norm=1e-7))
    assert len(warnings([lost], ["a", "b"], SETTINGS, proposed=True)) == 1


def test_fixed_groups_are_not_warned_of():
    hard = {"probabilities": [[1.0, 0.0], [0.0, 1.0]], "gate": gate(entropy=0.0)}
    assert warnings([record(epoch=1, **hard)], ["a", "b"], SETTINGS) == []
    assert warnings([record(epoch=1, **hard), record(epoch=2, **hard)], ["a", "b"], SETTINGS) == []
    # a gate with several heads has converged
    assert warnings([record(epoch=1), record(epoch=2, **hard)], ["a", "b"], SETTINGS)


def test_conflicting_tasks_are_named_by_the_mean_of_the_epochs_with_hard_groups():
    def tuned(epoch, cosine):
        return record(epoch=epoch, phase="finetune", cosines=[[1.0, cosine], [cosine, 1.0]])

    history = [
        record(cosines=[[1.0, -1.0], [-1.0, 1.0]]),
        *(tuned(e, -0.3) for e in range(11, 20)),
        tuned(20, -0.1),
    ]
    ((a, b, cosine),) = conflicts(history, ["a", "b"])
    assert (a, b, cosine) == ("a", "b", pytest.approx(-0.28))
    assert conflicts([tuned(20, -0.1)], ["a", "b"]) == []
    assert conflicts([tuned(20, None)], ["a", "b"]) == []
    assert conflicts(history[:1], ["a", "b"]) == []


def test_identical_branches_are_warned_of():
    spec = mlp_spec(groups=2)
    network = GroupingNetwork(spec)
    network.branches[1].load_state_dict(network.branches[0].state_dict())
    for store in (network.bank.weights, network.bank.biases):
        store[1].data.copy_(store[0].data)
    data = samples.data(spec.input, spec.tasks, 16)
    settings = TrainSettings(epochs=2, search_share=1.0, batch_size=16, learning_rate=1e-12)
    state = fit(network, data, settings, local())
    assert "the gate has no gradient" in state.history[0]["warnings"][0]
