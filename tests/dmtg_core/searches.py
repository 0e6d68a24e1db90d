"""Helpers of tests of a search: a small problem, and the comparison of two results."""

from dmtg_core import LocalContext, TemperatureSchedule, TrainSettings
from tests.dmtg_core import samples
from tests.dmtg_core.samples import assert_same_tensors, mlp_spec

SETTINGS = TrainSettings(
    epochs=4, search_share=0.5, batch_size=16, learning_rate=2e-2, gate_learning_rate=0.3, prune_threshold=0.3,
    temperature=TemperatureSchedule("linear", 2.5, 0.5),
)  # fmt: skip
SPEC = mlp_spec(initial="gaussian", initial_scale=1.0)


def local(folder=None, **options) -> LocalContext:
    """A context on the CPU."""
    return LocalContext(folder, device="cpu", **options)


def assert_same_result(found, expected) -> None:
    assert_same_tensors(samples.snapshot(found.network), samples.snapshot(expected.network))
    assert found.grouping == expected.grouping
    assert found.metrics == expected.metrics
    assert found.baseline == expected.baseline
    assert found.candidates == expected.candidates
    assert (found.affinity, found.cost, found.chosen) == (expected.affinity, expected.cost, expected.chosen)
    assert found.distilled == expected.distilled
