"""Details of a run's page, on hand-made shards with known labels."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmtg_core import NetworkSpec, TrainSettings
from dmtg_core.network.cost import inference_cost, naive_flops
from dmtg_core.search.options import SearchOptions
from dmtg_core.search.search import SearchResult, search
from dmtg_core.training.metrics import normalized_gain
from pipelines.data.manifest import read_manifest
from pipelines.data.reader import Reader
from pipelines.data.stream import StreamData
from pipelines.report.contact_sheet import ids_of
from pipelines.runs.results import ALL, NAIVE, SINGLE
from pipelines.storage import locate
from pipelines.training import diagnostics as details
from pipelines.training.diagnostics import SplitAnalysis, details_of, prediction_text
from pipelines.training.measures import latency
from tests.pipelines.report.test_inspect import IMAGES, TASKS, image_samples, write

VAL = 12


def searched(folder: Path) -> tuple[SearchResult, Reader, NetworkSpec]:
    """The groups of a search of two epochs, over tasks of every kind, and its baseline, whichever is better."""
    config = write(folder, IMAGES, image_samples(12, VAL))
    place = locate(config.data.shards)
    manifest = read_manifest(place)
    reader = Reader(place, manifest, manifest.description.tasks)
    spec = config.network_spec(manifest.description.input, reader.tasks)
    data = StreamData(reader, config.data, seed=1, rank=0, world_size=1, device=torch.device("cpu"))
    settings = TrainSettings(epochs=2, batch_size=4, learning_rate=0.01)
    options = SearchOptions(method="dmtg")
    result, with_naive = (
        search(spec, data, settings, options, splits=("val",), baseline=baseline) for baseline in (False, True)
    )
    return replace(result, naive=with_naive.naive, baseline=with_naive.baseline), reader, spec


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchResult, Reader, NetworkSpec]:
    return searched(tmp_path_factory.mktemp("details"))


@pytest.fixture(scope="module")
def found(known: tuple[SearchResult, Reader, NetworkSpec]) -> dict[str, Any]:
    result, reader, spec = known
    return details_of(result, reader, spec, samples=2, batch_size=5, seed=1)


def analyse(known: tuple[SearchResult, Reader, NetworkSpec], **changed: Any) -> SplitAnalysis:
    result, reader, _ = known
    return replace(SplitAnalysis(result.network, result.naive, reader, "val", 5, 1), **changed)


def test_intervals_are_of_the_gain_that_the_run_reports(
    known: tuple[SearchResult, Reader, NetworkSpec], found: dict[str, Any]
) -> None:
    result, *_ = known
    by_task = found["intervals"]["by_task"]
    assert set(by_task) == {task.name for task in TASKS}
    for task in TASKS:
        gain = normalized_gain([task], result.metrics["val"], result.baseline["val"])
        if not math.isnan(gain):  # all normals are equal and are learned at once
            assert by_task[task.name]["value"] == pytest.approx(gain, abs=1e-3)
            assert by_task[task.name]["low"] <= by_task[task.name]["value"] <= by_task[task.name]["high"]
    assert by_task["level"]["low"] < by_task["level"]["high"]
    assert found["intervals"]["samples"] == VAL


def test_naive_mtl_as_the_result_has_no_interval_of_its_gain_over_itself(
    known: tuple[SearchResult, Reader, NetworkSpec],
) -> None:
    result, reader, spec = known
    assert result.naive is not None
    chosen = replace(result, network=result.naive, chosen="naive_mtl", grouping=result.naive.grouping())
    found = details_of(chosen, reader, spec, samples=0, batch_size=5, seed=1)
    assert found["intervals"] is None
    rows = {row["name"]: row for row in found["cost"]["rows"]}
    assert rows["group_0"]["tasks"] == [task.name for task in TASKS]
    assert rows[latency.ALL]["flops"] == rows[latency.NAIVE]["flops"]


def test_there_are_no_intervals_for_a_part_of_the_split_or_without_naive_mtl(
    known: tuple[SearchResult, Reader, NetworkSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert analyse(known, naive=None).intervals() is None
    monkeypatch.setattr(details, "EXAMINED", 5 * known[1].row_bytes())
    assert analyse(known).intervals() is None
    assert analyse(known).samples(1)["examined"] == 8  # two row groups of four hold the five
    assert analyse(known).samples(1)["of"] == VAL


def test_losses_are_relative_to_the_mean_and_undefined_without_a_label(
    known: tuple[SearchResult, Reader, NetworkSpec],
) -> None:
    places, losses = analyse(known).losses()
    assert len(places) == VAL
    assert np.nanmean(losses, 0) == pytest.approx(np.ones(len(TASKS)))
    missing = [(ids_of(known[1], unit.file, unit.group)[row], n)
               for i, (unit, row) in enumerate(places) for n in np.flatnonzero(np.isnan(losses[i]))]  # fmt: skip
    assert sorted(missing) == [("val-11", 1), ("val-3", 1), ("val-7", 1)]  # of "bright"


def test_the_worst_samples_are_those_with_the_highest_loss_and_are_shown_once(
    known: tuple[SearchResult, Reader, NetworkSpec], found: dict[str, Any]
) -> None:
    _, losses = analyse(known).losses()
    dense = [n for n, task in enumerate(TASKS) if task.dense]
    ranked = sorted(np.nanmean(losses[:, dense], 1), reverse=True)
    samples = found["samples"]
    assert [one["loss"] for one in samples["worst"]] == pytest.approx(ranked[:2])
    assert all(one["loss"] <= ranked[1] for one in samples["some"])
    assert len({one["id"] for one in samples["worst"] + samples["some"]}) == 4


def test_a_dense_task_shows_target_and_prediction_beside_each_other(found: dict[str, Any]) -> None:
    one = found["samples"]["worst"][0]
    assert len(one["input"]["pictures"]) == 1
    assert [task["name"] for task in one["tasks"]] == [task.name for task in TASKS if task.dense]
    for task in one["tasks"]:
        sides = [task["target"]["pictures"], task["prediction"]["pictures"]]
        assert len(sides[0]) == len(sides[1]) >= 1
        assert all("predicted" in picture["alt"] for picture in sides[1])
        images = [Image.open(io.BytesIO(base64.b64decode(s[0]["source"].partition(",")[2]))) for s in sides]
        assert images[0].size == images[1].size


def test_the_worst_labels_are_listed_with_their_predictions(found: dict[str, Any]) -> None:
    rows = found["samples"]["labels"]
    assert [row["task"] for row in rows] == [name for name in ("colour", "bright", "level") for _ in range(3)]
    for row in rows:
        number = int(row["id"].rpartition("-")[2])
        assert row["target"] == {
            "colour": ("red", "green", "blue")[number % 3],
            "bright": ("no", "yes")[number % 2],
            "level": f"{5 + 10 * (number % 2)} cd",
        }[row["task"]]  # fmt: skip
    for first, second in pairwise(rows):
        assert first["task"] != second["task"] or first["loss"] >= second["loss"]


def test_predictions_as_text() -> None:
    colour, bright, level = TASKS[:3]
    assert prediction_text(colour, np.array([0.2, 0.5, 0.3])) == "green (50%)"
    assert prediction_text(bright, np.asarray(0.25)) == "no (75%)"
    assert prediction_text(level, np.asarray(12.5)) == "12.5 cd"


def test_costs_are_those_of_the_networks(
    known: tuple[SearchResult, Reader, NetworkSpec], found: dict[str, Any]
) -> None:
    result, _, spec = known
    rows = {row["name"]: row for row in found["cost"]["rows"]}
    assert list(rows) == [*result.grouping.to_dict(), ALL, NAIVE, SINGLE]
    assert rows[ALL]["flops"] == inference_cost(result.network).flops
    assert 3 * rows[NAIVE]["flops"] == naive_flops(spec)
    assert rows[SINGLE]["flops"] > rows[ALL]["flops"]
    assert all(0 < time < math.inf for row in rows.values() for time in row["milliseconds"])


def test_without_samples_no_data_is_stored(
    known: tuple[SearchResult, Reader, NetworkSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, reader, spec = known
    monkeypatch.setattr(latency, "SECONDS", 0)
    assert details_of(result, reader, spec, samples=0, batch_size=5, seed=1)["samples"] is None


def test_the_summary_of_the_data_set(found: dict[str, Any]) -> None:
    data = found["data"]
    assert data["splits"] == {"train": 12, "val": VAL}
    tasks = {task["name"]: task for task in data["tasks"]}
    assert tasks["bright"]["missing"] == 0.25
    assert tasks["colour"]["labels"] == "blue 33%, green 33%, red 33%"
    assert tasks["level"]["labels"] == "mean 10 cd, deviation 5 cd, 5 cd to 15 cd"
    assert {"python", "torch", "ray", "mlflow", "dmtg"} <= set(found["versions"])
