"""Operators of a step: the counts do not grow, and every operator is counted in one part."""

from functools import cache

import pytest
import torch

from bench import operators, steps
from dmtg_core import Task
from dmtg_core.training.losses import sample_loss
from tests.soak import others_in_soak

# operators of a step of five dense tasks, K = 3. A change may lower these counts, not raise them
MOST = {True: 2436, False: 4249}
MOST_OF_PUBLISHED = {True: 0.25, False: 0.5}


@cache
def mine(pruned):
    """Operators of our step."""
    return operators.against_published(pruned=pruned)[0]()


@cache
def theirs():
    """Operators of the published step, which knows no pruning."""
    return operators.against_published(pruned=True)[1]()


@pytest.mark.parametrize("pruned", others_in_soak([True, False], True))
def test_a_step_dispatches_no_more_operators(pruned):
    assert mine(pruned) <= MOST[pruned]
    assert mine(pruned) <= MOST_OF_PUBLISHED[pruned] * theirs()


def test_the_parts_of_a_step_have_all_its_operators():
    parts = operators.count_by_part(pruned=True)
    whole = mine(True)
    # the tracker of modules adds operators of its own hooks at most
    assert sum(parts.values()) == pytest.approx(whole, rel=0.02)
    assert set(operators.MODULES) - {"bank"} <= set(parts)  # dense tasks have no bank
    assert parts["heads"] > parts["gate"]


def test_operators_are_counted_by_name_and_by_profiled_section():
    with operators.Operators() as found:
        x = torch.ones(2) + 1
        with torch.profiler.record_function("inner"):
            x.mul_(2)
            x.mul_(3)
        x.sum()
    assert found.by_name == {"ones.default": 1, "add.Tensor": 1, "mul_.Tensor": 2, "sum.default": 1}
    assert found.by_part == {"step": 3, "inner": 2}


def test_the_published_loss_of_shifts_has_the_values_of_ours():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 2, 7, 6, generator=generator)
    target = torch.randn(3, 2, 7, 6, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = torch.nan
    task = Task("normals", "dense_regression", 2, loss="l1_shift")
    torch.testing.assert_close(steps._separate_loss(task, output, target), sample_loss(task, output, target))
