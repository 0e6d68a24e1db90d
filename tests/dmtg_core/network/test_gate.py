"""The gate, a trained distribution over branches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core.network.gate import INITIAL_LOGITS, SAMPLINGS, GroupGate

DRAWING = ("gumbel", "gumbel_per_sample", "straight_through")


def gate_with(logits: list[list[float]], **options) -> GroupGate:
    """A gate with given logits."""
    values = torch.tensor(logits)
    gate = GroupGate(*values.shape, **options)
    with torch.no_grad():
        gate.logits.copy_(values)
    return gate


def draw(gate: GroupGate, temperature: float = 1.0, samples: int = 7, seed: int = 0) -> torch.Tensor:
    """Weights of one step."""
    per_sample = gate.sampling == "gumbel_per_sample"
    noise = gate.noise(torch.Generator().manual_seed(seed), samples if per_sample else 0)
    return gate(temperature, noise)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("initial", INITIAL_LOGITS)
def test_weights_are_a_distribution_over_branches(sampling, initial):
    gate = GroupGate(5, 3, sampling=sampling, initial=initial, scale=2.0)
    weights = draw(gate, 0.7)
    assert weights.shape == ((7, 5, 3) if sampling == "gumbel_per_sample" else (5, 3))
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_initial_values_have_their_structure():
    made = {name: GroupGate(5, 3, initial=name, scale=0.5).logits.detach() for name in INITIAL_LOGITS}
    assert (made["uniform"] == 0).all()
    assert made["uniform_noise"].abs().max() <= 0.25
    assert made["uniform_noise"].unique().numel() == 15
    expected = [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0, 0], [0, 0.5, 0]]
    assert made["diagonal"].tolist() == expected
    assert made["gaussian"].unique().numel() == 15


def test_gaussian_initial_values_have_the_given_scale():
    logits = GroupGate(200, 50, initial="gaussian", scale=3.0).logits
    assert logits.std().item() == pytest.approx(3.0, rel=0.03)
    assert logits.mean().item() == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("initial", ["uniform_noise", "gaussian"])
def test_initial_noise_comes_from_the_generator_alone(initial):
    def logits(seed: int) -> torch.Tensor:
        return GroupGate(4, 3, initial=initial, generator=torch.Generator().manual_seed(seed)).logits

    before = torch.get_rng_state()
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_diagonal_initial_values_give_each_branch_its_task_and_wrap_around():
    assert GroupGate(5, 3, initial="diagonal", scale=1.0).assignment() == [0, 1, 2, 0, 1]
    assert GroupGate(2, 5, initial="diagonal", scale=1.0).assignment() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2, 2), {"sampling": "argmax"}, "unknown sampling 'argmax'.*gumbel"),
        ((2, 2), {"initial": "zeros"}, "unknown initial logits 'zeros'.*uniform"),
        ((0, 2), {}, "at least 1 task and 1 group, got 0 and 2"),
        ((2, 0), {}, "at least 1 task and 1 group, got 2 and 0"),
    ],
)
def test_impossible_gates_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        GroupGate(*arguments, **options)


@pytest.mark.parametrize("sampling", DRAWING)
def test_drawn_branches_follow_the_distribution_of_the_logits(sampling):
    logits = [[1.0, 0.0, -1.0], [0.3, 0.3, 0.3], [-2.0, 2.0, 0.0]]
    gate = gate_with(logits, sampling=sampling)
    draws = 20_000
    generator = torch.Generator().manual_seed(4)
    noise = gate.noise(generator, draws)
    assert noise.shape == (draws, 3, 3)
    chosen = gate(0.7, noise).argmax(-1)
    frequencies = torch.nn.functional.one_hot(chosen, 3).float().mean(0)
    # five standard errors of a frequency are at most 0.018
    torch.testing.assert_close(frequencies, torch.tensor(logits).softmax(1), atol=0.018, rtol=0)


def test_noise_is_standard_gumbel_and_finite():
    noise = GroupGate(100, 10).noise(torch.Generator().manual_seed(0), 100)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(1.64493, abs=0.05)  # π²/6


def test_noise_is_a_function_of_the_generator():
    gate = GroupGate(4, 3)
    first, same, other = (gate.noise(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_noise_of_each_sample_is_its_own():
    weights = draw(GroupGate(4, 3, sampling="gumbel_per_sample"))
    assert weights.unique(dim=0).shape[0] == 7


def test_low_temperature_is_hard_and_high_temperature_is_even():
    gate = GroupGate(6, 4)
    torch.testing.assert_close(draw(gate, 1e-3).amax(1), torch.ones(6))
    torch.testing.assert_close(draw(gate, 1e5), torch.full((6, 4), 0.25), atol=1e-3, rtol=0)


def test_relaxed_weights_are_the_softmax_of_noisy_logits_over_temperature():
    gate = gate_with([[0.0, 1.0]])
    weights = gate(2.0, torch.tensor([[1.0, 0.5]]))
    # (0 + 1) / 2 and (1 + 0.5) / 2 differ by 0.25
    assert weights[0, 1].item() == pytest.approx(1 / (1 + torch.e**-0.25))


def test_plain_softmax_reads_temperature_but_no_noise():
    gate = gate_with([[0.0, 1.0]], sampling="softmax")
    quiet, loud = gate(0.5, torch.zeros(1, 2)), gate(0.5, torch.full((1, 2), 9.0).fill_diagonal_(0))
    assert torch.equal(quiet, loud)
    assert quiet[0, 1].item() == pytest.approx(1 / (1 + torch.e**-2))


def test_straight_through_is_one_hot_forward_with_the_soft_gradient():
    logits = [[0.2, -0.1, 0.4], [1.0, 0.0, 0.0]]
    hard, soft = gate_with(logits, sampling="straight_through"), gate_with(logits, sampling="gumbel")
    noise = hard.noise(torch.Generator().manual_seed(3))
    pull = torch.tensor([[1.0, -2.0, 0.5], [0.1, 3.0, -1.0]])
    weights, relaxed = hard(0.8, noise), soft(0.8, noise)
    one_hot = torch.nn.functional.one_hot(relaxed.argmax(1), 3).float()
    torch.testing.assert_close(weights.detach(), one_hot, atol=1e-6, rtol=0)
    (weights * pull).sum().backward()
    (relaxed * pull).sum().backward()
    assert torch.equal(hard.logits.grad, soft.logits.grad)
    assert hard.logits.grad.abs().min() > 0


def test_fixed_weights_are_the_probabilities_and_are_not_trained():
    gate = gate_with([[0.0, 1.0, 2.0]], sampling="fixed")
    weights = draw(gate, 0.1)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0, 2.0]]).softmax(1))
    assert not weights.requires_grad
    assert not gate.logits.requires_grad


@pytest.mark.parametrize("sampling", [s for s in SAMPLINGS if s != "fixed"])
def test_every_trained_gate_has_a_gradient(sampling):
    gate = GroupGate(3, 4, sampling=sampling)
    (draw(gate) * torch.arange(4.0)).sum().backward()
    assert gate.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_dead_pairs_have_no_weight_no_probability_and_no_gradient(sampling):
    gate = GroupGate(3, 4, sampling=sampling)
    gate.alive[0, 2] = False
    gate.alive[1, :3] = False
    weights = draw(gate)
    dead = ~gate.alive
    assert (weights[..., dead] == 0).all()
    assert (gate.probabilities()[dead] == 0).all()
    assert torch.equal(weights[..., 1, 3], torch.ones_like(weights[..., 1, 3]))
    if sampling != "fixed":
        ((weights * torch.arange(4.0)).sum() + gate.entropy().sum()).backward()
        assert gate.logits.grad.isfinite().all()
        assert (gate.logits.grad[dead] == 0).all()


def test_a_dead_branch_is_never_assigned():
    gate = gate_with([[5.0, 1.0, 2.0]])
    assert gate.assignment() == [0]
    gate.alive[0, 0] = False
    assert gate.assignment() == [2]


def test_entropy_at_fixed_values():
    gate = gate_with([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [400.0, 0.0, 0.0, 0.0]])
    gate.alive[1, 2:] = False
    expected = torch.tensor([4.0, 2.0, 1.0]).log()
    torch.testing.assert_close(gate.entropy(), expected)


@pytest.mark.parametrize("saturation", [50.0, 200.0, 1e6, 1e30])
def test_entropy_of_a_saturated_row_has_a_finite_zero_gradient(saturation):
    gate = gate_with([[saturation, 0.0, 0.0]])
    gate.alive[0, 2] = False
    entropy = gate.entropy().sum()
    entropy.backward()
    assert entropy.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(gate.logits.grad, torch.zeros(1, 3), atol=1e-12, rtol=0)


@given(
    logits=st.lists(st.lists(st.floats(-60, 60), min_size=3, max_size=3), min_size=1, max_size=5),
    dead=st.sets(st.tuples(st.integers(0, 4), st.integers(1, 2))),
    threshold=st.floats(0, 3),
)
def test_survivors_leave_each_task_a_head_and_no_dead_pair(logits, dead, threshold):
    gate = gate_with(logits)
    for n, k in dead:
        if n < len(logits):
            gate.alive[n, k] = False
    stay = gate.survivors(threshold)
    assert stay.any(1).all()
    assert not (stay & ~gate.alive).any()
    gone = gate.alive & ~stay
    assert (gate.probabilities()[gone] < threshold).all()
    if threshold > 1:
        assert stay.sum() == len(logits)


def test_survivors_at_threshold_zero_are_all_live_pairs():
    gate = gate_with([[90.0, -90.0, 0.0], [0.0, 0.0, 0.0]])
    assert gate.probabilities()[0, 1] == 0
    assert torch.equal(gate.survivors(0.0), gate.alive)


def test_the_branch_that_survives_is_the_one_that_is_assigned():
    gate = gate_with([[0.0, 1e-9], [0.0, 1.0], [2e-8, 0.0]])
    kept = gate.survivors(2.0).long().argmax(1).tolist()
    assert kept == gate.assignment()


# --- the hard grouping
