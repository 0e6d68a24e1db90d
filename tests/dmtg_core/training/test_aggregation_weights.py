"""Weights of aggregators: a function of Gramian and seed, and errors of loading."""

import os
import subprocess
import sys

import pytest
import torch

from dmtg_core.training.aggregation import AGGREGATORS, load_aggregator
from tests.paths import ROOT

CONFLICT = torch.tensor([[1.0, -0.9, 0.2], [-0.9, 4.0, -1.5], [0.2, -1.5, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_weights_are_a_function_of_gramian_and_seed(name):
    weigh = load_aggregator(name)
    first = weigh(CONFLICT, 3)
    assert first.shape == (3,)
    assert first.dtype == torch.float64
    weigh(torch.diag(torch.tensor([1.0, 9.0, 4.0])), 3)
    weigh(CONFLICT[:2, :2], 5)
    state = torch.get_rng_state()
    torch.rand(7)
    assert torch.equal(weigh(CONFLICT, 3), first)
    assert torch.equal(load_aggregator(name)(CONFLICT, 3), first)
    torch.set_rng_state(state)
    weigh(CONFLICT, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_orders_come_from_the_seed():
    weigh = load_aggregator("pcgrad")
    assert len({tuple(weigh(CONFLICT, seed).tolist()) for seed in range(20)}) > 1


@pytest.mark.parametrize("name", sorted(set(AGGREGATORS) - {"nash_mtl"}))
@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_weights_do_not_depend_on_the_size_of_the_losses(name, scale):
    weigh = load_aggregator(name)
    torch.testing.assert_close(weigh(CONFLICT * scale, 3), weigh(CONFLICT, 3), rtol=1e-3, atol=1e-4)


def test_the_bargaining_solution_is_the_one_of_its_formula():
    """`G α = 1 / α`; for orthogonal gradients each is divided by its length. The combined norm is 1 at most."""
    weights = load_aggregator("nash_mtl")(torch.diag(torch.tensor([1.0, 4.0, 16.0])), 0)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1, 0.5, 0.25]).double(), rtol=1e-3, atol=1e-3)
    assert float(weights[0]) == pytest.approx(3**-0.5, rel=1e-3)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_task_without_a_gradient_does_not_count(name):
    weigh = load_aggregator(name)
    padded = torch.zeros(5, 5, dtype=torch.float64)
    place = torch.tensor([0, 2, 3])
    padded[place.unsqueeze(1), place] = CONFLICT
    found = weigh(padded, 3)
    assert torch.equal(found[place], weigh(CONFLICT, 3))
    assert found[[1, 4]].tolist() == [0.0, 0.0]
    alone = torch.zeros(3, 3)
    alone[1, 1] = 1e-9
    assert weigh(alone, 3).tolist() == [0.0, 1.0, 0.0]
    assert weigh(torch.zeros(3, 3), 3).tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_name_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="unknown aggregator 'upgrade', expected one of mean, upgrad, dualproj"):
        load_aggregator("upgrade")


WITHOUT = """
import sys
import torch
from dmtg_core.training.aggregation import AGGREGATORS, load_aggregator

def message(name):
    try:
        load_aggregator(name)
    except ValueError as error:
        return str(error)
    return "works"

assert not any(name.startswith("torchjd") for name in sys.modules), "imported before it was asked for"
sys.modules["torchjd"] = None
print("torchjd", {message(name) for name in AGGREGATORS})
del sys.modules["torchjd"]
sys.modules.update(cvxpy=None, quadprog=None)
for name in AGGREGATORS:
    print(name, message(name))
"""


def test_a_missing_library_is_reported_with_the_command_that_installs_it():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logged = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for name in AGGREGATORS:
        hint = f"aggregator {name!r} needs a library that is not installed: pip install '"
        assert hint in logged["torchjd"].replace('\\"', '"').replace("\\'", "'")
        missing = {"cagrad": "cvxpy", "nash_mtl": "cvxpy", "upgrad": "quadprog", "dualproj": "quadprog"}.get(name)
        if missing is None:
            assert logged[name] == "works"
        else:
            extra = "torchjd[nash-mtl]" if name == "nash_mtl" else "dmtg[aggregators]"
            assert logged[name].startswith(hint + extra + "'")
            assert f"'{missing}'" in logged[name]
