"""Taskonomy from raw files in a bucket to a trained network: shards and run are in the bucket, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.shards import shard
from pipelines.storage import locate
from pipelines.training.driver import train
from tests.pipelines.data.test_s3 import upload
from tests.pipelines.raw_data import write_taskonomy
from tests.pipelines.s3_server import BUCKET

BUILDINGS = [f"building{number}" for number in range(10)]
TASKS = ["depth_zbuffer", "normal", "segment_semantic", "keypoints2d", "edge_texture"]


def config_of(raw: str, work: str, side: int) -> Config:
    options = {"tasks": TASKS, "size": side}
    network = {"encoder": "vit", "options": {"patch": 8, "width": 24, "layers": 2, "heads": 2}}
    return checked(
        Config,
        {
            "name": "taskonomy",
            "source": {"kind": "taskonomy", "root": raw, "options": options},
            "data": {"shards": f"{work}/shards", "rows_per_shard": 4, "min_support": 1},
            "network": {**network, "groups": 2, "decoder_width": 8},
            "train": {"epochs": 1, "batch_size": 4},
            "search": {"method": "dmtg", "baseline": False},
            "track": {"uri": "none"},
            "run": {"root": f"{work}/runs", "samples": 0},
            "ray": {"executor": "embedded"},
        },
    )


@pytest.mark.usefixtures("s3")
def test_raw_files_shards_and_run_in_a_bucket_give_the_result_of_local_ones(tmp_path: Path) -> None:
    raw = write_taskonomy(tmp_path / "raw", buildings=BUILDINGS, points=1)
    upload(raw, locate(f"s3://{BUCKET}/taskonomy/raw"))
    side = 32
    remote = config_of(f"s3://{BUCKET}/taskonomy/raw", f"s3://{BUCKET}/taskonomy", side)
    local = config_of(str(raw), str(tmp_path), side)
    made, expected = shard(remote).manifest, shard(local).manifest
    assert made.sums == expected.sums
    assert sum(made.rows(split) for split in made.shards) == 10
    found, held = train(remote).result, train(local).result
    assert found["grouping"] == held["grouping"]
    assert set(found["metrics"]) == set(TASKS)
    for task, metrics in held["metrics"].items():
        assert found["metrics"][task] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
