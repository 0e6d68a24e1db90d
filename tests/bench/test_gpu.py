"""GPU rows of the benchmark run on any machine and count the documented operations."""

import pytest

from bench import gpu
from bench.steps import taskonomy


def test_gpu_rows_measure_both_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CALLS", 1)
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    theirs, mine, notes = gpu.against_published(2, size=32, device="cpu", precision="fp32")
    assert theirs() > 0
    assert mine() > 0
    found = notes()
    assert found["images_per_second"] > 0
    assert 0 <= found["waiting_for_data"] < 1
    assert found["model_flop_utilisation"] is None  # the peak of the device is not known


def test_the_flops_of_a_pruned_step_are_three_forward_passes() -> None:
    two = gpu.step_flops(taskonomy(64), 2)
    # GFLOP of a forward pass at 256 × 256 and 18 channels for every task: stem 7.03, branch 5.96, decoder 2.47
    assert two == pytest.approx(2 * 3 * (7.03e9 + 3 * 5.96e9 + 5 * 2.47e9) / 16, rel=0.1)
