"""How many samples a search evaluates at a time, and that its result does not depend on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dmtg_core import ArrayData, Batch, GroupingNetwork
from dmtg_core.search.options import SearchOptions
from dmtg_core.search.search import search
from dmtg_core.training.loop import EVALUATED, evaluate, rows_evaluated
from dmtg_core.training.settings import TrainSettings
from tests.dmtg_core import samples

SETTINGS = TrainSettings(epochs=4, batch_size=16, learning_rate=3e-3)
TABLE = samples.mlp_spec(samples.SAMPLEWISE)
IMAGES = samples.image_spec(samples.ONE_OF_EACH)


class Recorded(ArrayData):
    """Data that keeps the sizes in which its evaluation is asked for."""

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        self.asked = {*vars(self).get("asked", ()), batch_size}
        return super().evaluate(split, batch_size)


def test_rows_of_features_are_evaluated_in_large_batches_and_images_in_those_of_training():
    assert rows_evaluated(TABLE, SETTINGS) == EVALUATED
    assert rows_evaluated(TABLE, TrainSettings(batch_size=1000)) == 1000
    assert rows_evaluated(TABLE, SETTINGS, compiled=True) == 16
    assert rows_evaluated(IMAGES, SETTINGS) == 16


@pytest.mark.parametrize(("spec", "rows"), [(TABLE, EVALUATED), (IMAGES, 16)], ids=["table", "images"])
def test_a_search_never_evaluates_more_than_that(spec, rows):
    # the images of all evaluations fit into memory if those of a training step do
    found = samples.data(spec.input, spec.tasks, 40)
    data = Recorded(found.splits, spec.tasks)
    search(spec, data, SETTINGS, SearchOptions(budget=6))
    assert data.asked == {rows}


@pytest.mark.parametrize("spec", [TABLE, IMAGES], ids=["table", "images"])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_metrics_do_not_depend_on_the_size(spec, rows):
    data = samples.data(spec.input, spec.tasks, 300, missing=0.2)
    network = GroupingNetwork(spec).eval()
    expected = evaluate(network, data, "val", batch_size=64)
    found = evaluate(network, data, "val", batch_size=rows)
    for task, values in expected.items():
        for name, value in values.items():
            assert found[task][name] == pytest.approx(value, rel=1e-6, nan_ok=True)
