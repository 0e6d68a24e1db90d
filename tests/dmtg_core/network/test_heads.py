"""Heads: the bank computes the same as separate linear layers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core.network.heads import HeadBank
from tests.dmtg_core.samples import SAMPLEWISE

GROUPS, WIDTH, ROWS = 3, 5, 4


def make_bank(groups: int = GROUPS) -> HeadBank:
    """A bank with biases that are not zero."""
    torch.manual_seed(0)
    bank = HeadBank(SAMPLEWISE, WIDTH, groups)
    with torch.no_grad():
        for bias in bank.biases.values():
            bias.normal_()
    return bank


def features(groups: int = GROUPS) -> dict[int, torch.Tensor]:
    """Features of all branches."""
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(ROWS, WIDTH, generator=generator) for k in range(groups)}


def separate(bank: HeadBank, x: dict[int, torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """Each head separately: (branch, task name) → `(B, C)`."""
    out = {}
    for k, kept in bank.kept.items():
        row = 0
        for task in kept:
            weight = bank.weights[k][row : row + task.channels]
            bias = bank.biases[k][row : row + task.channels]
            out[k, task.name] = x[k] @ weight.T + bias
            row += task.channels
    return out


def test_one_row_for_each_channel_of_each_head():
    bank = make_bank()
    rows = sum(task.channels for task in SAMPLEWISE)
    assert {name: tuple(p.shape) for name, p in bank.named_parameters()} == {
        f"{what}.{k}": shape
        for what, shape in (("weights", (rows, WIDTH)), ("biases", (rows,)))
        for k in range(GROUPS)
    }
    assert bank(features()).shape == (GROUPS * rows, ROWS)


def some_kept(choices: list[list[bool]]) -> dict[int, list]:
    return {k: [t for t, stays in zip(SAMPLEWISE, row, strict=True) if stays] for k, row in enumerate(choices)}


choices = st.lists(
    st.lists(st.booleans(), min_size=len(SAMPLEWISE), max_size=len(SAMPLEWISE)), min_size=GROUPS, max_size=GROUPS
).filter(lambda rows: any(map(any, rows)))


@given(choices=choices)
def test_the_batched_product_equals_separate_heads_in_any_pruned_shape(choices):
    bank, x = make_bank(), features()
    alone = separate(bank, x)
    kept = some_kept(choices)
    bank.keep(kept)
    wanted = torch.cat([alone[k, task.name].T for k in kept for task in kept[k]])
    for training in (True, False):
        torch.testing.assert_close(bank.train(training)(x), wanted)


@given(choices=choices)
def test_in_evaluation_a_head_is_bit_identical_whatever_other_heads_exist(choices):
    bank, x = make_bank().eval(), features()
    before = {(k, t.name): bank.head(k, t, x[k]) for k in range(GROUPS) for t in SAMPLEWISE}
    kept = some_kept(choices)
    bank.keep(kept)
    rows = iter(bank(x))
    for k, tasks in kept.items():
        for task in tasks:
            head = bank.head(k, task, x[k])
            assert torch.equal(head, before[k, task.name])
            together = torch.stack([next(rows) for _ in range(task.channels)], 1)
            assert torch.equal(together.squeeze(1) if task.channels == 1 else together, head)


@given(choices=choices)
def test_keep_returns_the_origin_of_each_pruned_parameter(choices):
    bank = make_bank()
    before = dict(bank.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    kept = some_kept(choices)
    followed = bank.keep(kept)
    for name, parameter in bank.named_parameters():
        if parameter in followed:
            old, rows = followed[parameter]
            assert old is before[name]
            assert torch.equal(parameter, values[name][rows])
            assert len(parameter) == sum(t.channels for t in kept[int(name.split(".")[1])])
        else:
            assert parameter is before[name]
    assert set(bank.kept) == {k for k, tasks in kept.items() if tasks}


def test_keeping_twice_equals_keeping_once():
    once, twice, x = make_bank(), make_bank(), features()
    last = {0: list(SAMPLEWISE[2:4]), 1: [], 2: [SAMPLEWISE[5], SAMPLEWISE[9]]}
    once.keep(last)
    twice.keep({0: list(SAMPLEWISE[1:8]), 1: [SAMPLEWISE[0]], 2: list(SAMPLEWISE[5:])})
    twice.keep(last)
    assert torch.equal(once(x), twice(x))


def test_single_channel_heads_have_no_channel_axis():
    bank, x = make_bank(), features()
    for task in SAMPLEWISE:
        wanted = (ROWS,) if task.channels == 1 else (ROWS, task.channels)
        assert bank.head(1, task, x[1]).shape == wanted


def test_gradients_reach_every_head_through_the_padded_product():
    bank, x = make_bank(), features()
    bank.keep({0: list(SAMPLEWISE[:3]), 2: list(SAMPLEWISE)})
    bank(x).square().sum().backward()
    assert all(p.grad.abs().amax(-1).min() > 0 for p in bank.weights.values())
    assert all(p.grad.abs().min() > 0 for p in bank.biases.values())


def test_a_bank_without_tasks_is_empty():
    bank = HeadBank([], WIDTH, GROUPS)
    assert list(bank.parameters()) == []
    assert bank.kept == {}
