"""The same run on every executor, and a run that is killed on one of them and resumed on the other.

In `make test`, ray/test_lost_workers.py compares a run of two workers on Ray with the embedded one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.execution.resources import cores
from pipelines.training.driver import train
from tests.pipelines.conftest import ON_RAY, VIT, config_values
from tests.pipelines.driver import Driver, Undisturbed, disturbed, same

EMBEDDED = {"executor": "embedded"}
ONE_ON_RAY = {"executor": "ray", "workers": 1, "object_store_mib": 128}
TWO_ON_RAY = {**ON_RAY, "object_store_mib": 128}
SOAK = pytest.mark.soak


def table(root: Path) -> dict[str, Any]:
    """Configuration of a table of 400 rows with two tasks."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 4)).round(4)
    split = ["train"] * 256 + ["val"] * 72 + ["test"] * 72
    rows = {"id": range(400), **{f"x{i}": values[:, i] for i in range(4)}, "split": split}
    rows |= {"sum": (values.sum(axis=1) > 0).astype(int), "product": values[:, 0] * values[:, 1]}
    root.mkdir()
    pd.DataFrame(rows).to_csv(root / "t.csv", index=False)
    tasks = [{"column": "sum", "kind": "binary"}, {"column": "product", "kind": "regression"}]
    return {
        "source": {"kind": "table", "root": str(root / "t.csv"), "options": {"tasks": tasks, "id_column": "id"}},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [16, 16]}},
    }


def dense(root: Path) -> dict[str, Any]:
    """Configuration of five dense tasks on rendered rooms."""
    options = {"buildings": 8, "points": 8, "resolution": 32, "size": 32}
    return {
        "source": {"kind": "rooms", "root": str(root), "options": options},
        "network": VIT | {"decoder_width": 8},
        "data": {"shards": str(root) + "-shards", "rows_per_shard": 16, "min_support": 1, "max_bad_fraction": 0.1},
    }


def finished(root: Path, own: Mapping[str, Any], raw: Path = Path("unused")) -> Undisturbed:
    """An embedded run; the sections of `own` replace those of the small set of images."""
    values = config_values(raw, root) | {"ray": EMBEDDED} | own
    values["data"] = config_values(raw, root)["data"] | own.get("data", {})
    config = checked(Config, values)
    return config, train(config), []


@pytest.fixture(params=["images", "table", "dense"])
def embedded(request: pytest.FixtureRequest, vit_run: Undisturbed, tmp_path: Path) -> Undisturbed:
    if request.param == "images":
        return vit_run
    own = {"table": table, "dense": dense}[request.param](tmp_path / "raw")
    before = torch.get_num_threads()
    torch.set_num_threads(cores())  # as one worker on Ray: sums over other threads have other rounding errors
    try:
        # the decoders of dense tasks normalise over batches, by default over those of each worker
        train = {"epochs": 2, "batch_size": 16, "sync_batchnorm": True}
        return finished(tmp_path / "first", own | {"train": train})
    finally:
        torch.set_num_threads(before)


@SOAK
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("place", [pytest.param(ONE_ON_RAY, id="one worker"), pytest.param(TWO_ON_RAY, id="two")])
def test_every_executor_has_the_same_result(embedded, place: dict[str, Any], tmp_path: Path) -> None:
    values = embedded[0].model_dump(mode="json") | {"ray": place, "track": {"uri": "none"}}
    values["run"] = {"root": str(tmp_path / "again")}
    logged: list[str] = []
    found = train(checked(Config, values), logged.append).result
    same(found, embedded[1].result, shares=1e-3)
    assert any("training on Ray with" in line for line in logged)


def resumed(driver: Driver, ray: Mapping[str, Any]) -> dict:
    """The outcome of the same command on another executor."""
    return Driver(driver.root, driver.values | {"ray": ray}).finish()


@SOAK
@pytest.mark.ray
@pytest.mark.parametrize(("first", "second"), [(EMBEDDED, TWO_ON_RAY), (TWO_ON_RAY, EMBEDDED)])
def test_a_run_killed_on_one_executor_goes_on_on_the_other(
    vit_run: Undisturbed, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    driver = disturbed(vit_run, tmp_path)
    driver.values = {**driver.values, "ray": first}
    driver.start()
    driver.wait_for(lambda: len(driver.epochs()) >= 5)
    driver.lose()
    found = resumed(driver, second)
    assert "resuming from the last checkpoint" in driver.log
    assert len(driver.epochs()) == len(set(driver.epochs())) == 8
    same(found, vit_run[1].result)


def test_an_embedded_command_imports_no_ray(run: Undisturbed, tmp_path: Path) -> None:
    driver = disturbed(run, tmp_path, track={"uri": f"sqlite:///{tmp_path}/m.db"}, train={"epochs": 1})
    code = "import sys, pipelines.cli.app as cli\ntry:\n    cli.main()\nfinally:\n    print('ray' in sys.modules)"
    arguments = driver.command()
    assert driver.start_command([arguments[0], "-c", code, *arguments[3:]]).wait() == 0, driver.log
    assert driver.log.splitlines()[-1] == "False"
