"""A small set of images that trains in seconds, its configuration, a finished run, and one Ray session."""

from __future__ import annotations

import copy
import csv
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine, event

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.runs import lease
from tests.pipelines import mlflow_server as mlflow_servers
from tests.pipelines.s3_server import free_port, serving, settings

if TYPE_CHECKING:
    from pipelines.training.driver import Trained


@event.listens_for(Engine, "connect")
def _without_waiting_for_the_disk(connection: object, _record: object) -> None:
    """A test's MLflow database need not survive a loss of power, and MLflow commits after each value."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def write_images(root: Path, rows: int = 96) -> Path:
    """Write patches of one colour with noise; the tasks are colour, bright (binary) and level of brightness."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    colours = {"red": (1.0, 0.2, 0.2), "green": (0.2, 1.0, 0.2), "blue": (0.2, 0.2, 1.0)}
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "colour", "bright", "level", "split"])
        for i in range(rows):
            name, value = list(colours)[i % 3], rng.uniform(0.3, 1.0)
            pixels = 255 * value * np.array(colours[name]) * rng.uniform(0.8, 1.0, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"img{i:03d}.png")
            split = "train" if i < rows * 0.6 else "val" if i < rows * 0.8 else "test"
            table.writerow([f"img{i:03d}", name, value > 0.65, f"{value:.4f}", split])
    return root


@pytest.fixture(autouse=True)
def registry_of_before() -> Iterator[None]:
    """MLflow writes the last registry to the environment, from which other tests and processes would read it."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session", autouse=True)
def settled() -> Iterator[None]:
    """Leases do not wait for other machines: the tests have one job at a time, except for those of leases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "SETTLE_S", 0.01)
        yield


@pytest.fixture(scope="module")
def plain_reports() -> Iterator[None]:
    """Reports of runs without plots, which take longer than the training; report/ tests those.

    A module that uses it cannot use `run`, whose report is read by others.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.report.run.page", lambda run: f"<!doctype html><title>{run}</title>")
        patch.setattr("pipelines.report.figures.grouping_png", lambda _: b"")
        yield


ON_RAY = {"executor": "ray", "workers": 2}  # overrides of the ray section
# without batch normalisation, in which each worker normalises its own share of a batch
VIT = {"encoder": "vit", "options": {"patch": 8, "width": 24, "layers": 2, "heads": 2}}
TASKS = [
    {"column": "colour", "kind": "multiclass"},
    {"column": "bright", "kind": "binary"},
    {"column": "level", "kind": "regression"},
]


def config_values(root: Path, work: Path, **sections: object) -> dict[str, object]:
    """A configuration of the small set with all folders below `work`; sections override it."""
    values: dict[str, object] = {
        "name": "patches",
        "source": {
            "kind": "folder",
            "root": str(root),
            "options": {"suffix": ".png", "size": 16, "tasks": copy.deepcopy(TASKS)},
        },
        "data": {"shards": str(work / "shards"), "rows_per_shard": 16, "min_support": 2},
        "network": {"encoder": "convnet", "groups": 2, "options": {"widths": [8, 16]}},
        "train": {"epochs": 4, "batch_size": 16, "learning_rate": 0.01},
        "search": {"method": "dmtg"},  # the faster method; tests of a run do not depend on it
        "track": {"uri": f"sqlite:///{work / 'mlflow.db'}"},
        "run": {"root": str(work / "runs")},
        "ray": {"executor": "embedded", "object_store_mib": 128},
    }
    for name, section in sections.items():
        held = values.get(name)
        values[name] = held | section if isinstance(held, dict) and isinstance(section, dict) else section
    return values


def make_config(root: Path, work: Path, **sections: object) -> Config:
    return checked(Config, config_values(root, work, **sections))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw images and labels; tests do not change them."""
    return write_images(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of the S3 server; the environment is set before Ray starts, as its workers inherit it."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings(port).items():
            patch.setenv(key, value)
        yield port


@pytest.fixture(scope="session")
def s3(s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a running S3 server with an empty bucket."""
    with serving(s3_port, tmp_path_factory.mktemp("s3")):
        yield s3_port


@pytest.fixture(scope="session")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the database of `mlflow_server`."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="session")
def mlflow_server(s3: int, mlflow_folder: Path) -> Iterator[str]:
    """The address of a running MLflow server that stores its files on the S3 server."""
    with mlflow_servers.serving(free_port(), mlflow_folder, s3) as uri:
        yield uri


@pytest.fixture(scope="session")
def ray_session(s3_port: int):
    """One local Ray cluster for all tests in this process; starting one takes longer than most of them."""
    from pipelines.config.ray_section import RaySection
    from pipelines.execution.session import session

    with session(RaySection(object_store_mib=128, workers=2)):
        yield


@pytest.fixture(scope="session")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Trained, list[str]]:
    """A finished run, its configuration, and its log lines."""
    return finished_run(images, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def vit_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Trained, list[str]]:
    """A finished run whose figures do not depend on the number of workers."""
    return finished_run(images, tmp_path_factory.mktemp("vit_run"), network=VIT)


def finished_run(images: Path, folder: Path, **sections: object) -> tuple[Config, Trained, list[str]]:
    from pipelines.training.driver import train

    logged: list[str] = []
    config = make_config(images, folder, data={"min_support": 8}, **sections)
    return config, train(config, logged.append), logged
