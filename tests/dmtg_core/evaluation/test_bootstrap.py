"""Paired bootstrap: against standard errors of textbooks, and invariances of the result."""

import math

import pytest
import torch
from torch import Tensor

from dmtg_core import MetricSums, Task
from dmtg_core.evaluation.bootstrap import BlockSums, compare

VALUE, FLAG = Task("value", "regression", metric="mae"), Task("flag", "binary", metric="auroc")
CLASSES = Task("class", "multiclass", channels=3)


def filled(tasks: list[Task], outputs: dict, targets: dict, batch: int = 7, blocks: int = 256) -> BlockSums:
    rows = len(next(iter(targets.values())))
    sums = BlockSums(tasks, rows, blocks)
    for start in range(0, rows, batch):
        cut = slice(start, start + batch)
        sums.update({n: t[cut] for n, t in outputs.items()}, {n: t[cut] for n, t in targets.items()})
    return sums


def errors(tasks: list[Task], off: Tensor, also: Tensor, **options: float):
    """A champion whose absolute errors are `off` beside a challenger whose are `also`."""
    truth = {VALUE.name: torch.zeros(len(off))}
    champion, challenger = (filled(tasks, {VALUE.name: errors}, truth, batch=len(off)) for errors in (off, also))
    return compare(champion, challenger, **options)


@pytest.mark.parametrize("batch", [1, 7, 50, 1000])
@pytest.mark.parametrize("blocks", [2, 64, 1000])
def test_metrics_of_all_blocks_are_those_of_all_samples(batch: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tasks = [VALUE, FLAG, CLASSES]
    outputs = {
        "value": torch.randn(101, generator=generator),
        "flag": torch.randn(101, generator=generator),
        "class": torch.randn(101, 3, generator=generator),
    }
    targets = {
        "value": torch.randn(101, generator=generator),
        "flag": torch.randint(2, (101,), generator=generator).float(),
        "class": torch.randint(-1, 3, (101,), generator=generator),
    }
    targets["value"][::5] = torch.nan
    whole = MetricSums(tasks)
    whole.update(outputs, targets)
    found = filled(tasks, outputs, targets, batch, blocks).metrics()
    for name, expected in whole.compute().items():
        assert found[name] == pytest.approx(expected, rel=1e-6)


def test_interval_has_the_width_of_the_standard_error_of_a_ratio() -> None:
    generator = torch.Generator().manual_seed(2)
    before = torch.rand(3000, generator=generator) + 0.5
    after = before * 0.9 + 0.2 * torch.randn(3000, generator=generator).clamp(-1, 1)
    after = after.abs()
    found = errors([VALUE], before, after, resamples=4000).gain
    ratio = float(after.mean() / before.mean())
    deviation = 100 * float((after - ratio * before).std() / before.mean()) / math.sqrt(3000)  # delta method
    assert found.value == pytest.approx(100 * (1 - ratio), abs=1e-3)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.12)
    assert found.low < found.value < found.high


def test_pairing_removes_the_effect_of_samples_that_are_hard_for_both() -> None:
    hard = torch.distributions.Exponential(1.0).sample((400,)) + 0.1
    found = errors([VALUE], hard, hard * 0.99)
    assert found.gain.value == pytest.approx(1.0, abs=1e-4)
    assert found.gain.high - found.gain.low < 1e-4
    assert found.likely == 1.0


def test_intervals_cover_the_true_value_with_their_confidence() -> None:
    generator = torch.Generator().manual_seed(3)
    held = 0
    for trial in range(60):
        before, after = 1 + torch.rand(2, 120, generator=generator)
        gain = errors([VALUE], before, after, resamples=300, confidence=0.9, seed=trial).gain
        held += gain.low <= 0 <= gain.high
    assert 0.80 <= held / 60 <= 0.98


def test_a_comparison_is_reproducible_and_equal_models_have_no_gain() -> None:
    off = torch.arange(1.0, 60.0)
    first, again = (errors([VALUE], off, off + 1, seed=4) for _ in range(2))
    assert (first.gain, first.by_task, first.likely) == (again.gain, again.by_task, again.likely)
    same = errors([VALUE], off, off).gain
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_gain_over_an_error_of_zero_is_minus_infinity() -> None:
    nothing, some = torch.zeros(50), torch.ones(50)
    assert errors([VALUE], nothing, some).gain.value == -math.inf
    assert errors([VALUE], nothing, nothing).gain.value == 0


def test_resamples_without_a_rare_class_are_omitted_from_the_interval() -> None:
    generator = torch.Generator().manual_seed(5)
    target = torch.zeros(60)
    target[:2] = 1
    outputs = [{"flag": torch.randn(60, generator=generator) + shift * target} for shift in (0.5, 3)]
    found = compare(*(filled([FLAG], output, {"flag": target}) for output in outputs))
    gain = found.by_task["flag"]
    assert math.isfinite(gain.low)
    assert gain.low <= gain.value <= gain.high


def test_incomparable_models_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        BlockSums([VALUE], 1)
    short = BlockSums([VALUE], 10)
    ones = {"value": torch.ones(6)}
    short.update(ones, ones)
    with pytest.raises(ValueError, match="expected 10 samples, got 6"):
        compare(short, short)
    with pytest.raises(ValueError, match="expected 10 samples, got 12"):
        short.update(ones, ones)
    other = filled([VALUE], {"value": torch.ones(11)}, {"value": torch.ones(11)})
    mine = filled([VALUE], {"value": torch.ones(10)}, {"value": torch.ones(10)})
    with pytest.raises(ValueError, match="same tasks and samples"):
        compare(mine, other)
