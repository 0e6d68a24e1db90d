"""Finished runs of untrained networks, created without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.training.checkpoint import save_model
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.manifest import Manifest
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, Source
from pipelines.registry.models import Registered, register
from pipelines.registry.tracking import connect
from pipelines.runs.outcome import groups_text
from pipelines.storage import locate

EXPERIMENT = "untrained"


@dataclass
class Finished:
    """A run folder, and the arguments of `register` for it."""

    config: Config
    run: Path
    run_id: str
    manifest: Manifest
    example: np.ndarray
    result: dict[str, Any]
    models: dict[str, GroupModel]

    def register(self) -> list[Registered]:
        """Register the run as training does at its end."""
        run = locate(str(self.run))
        return register(self.config, run, self.run_id, self.manifest, self.example, self.result)


def small_table(root: Path) -> Source:
    """A table of three rows with tasks of two kinds."""
    (root / "t.csv").write_text(
        "id,age,sick,cost,days,split\na,20,1,3,1,train\nb,40,0,5,2,train\nc,30,1,4,4,val\n"
    )
    kinds = {"sick": "binary", "cost": "regression", "days": "regression"}
    tasks = [{"column": name, "kind": kind} for name, kind in kinds.items()]
    return build_source(
        "table", str(root), {"file": "t.csv", "id_column": "id", "features": ["age"], "tasks": tasks}
    )


def finish(
    source: Source,
    encoder: EncoderSpec,
    root: Path,
    track: dict[str, str],
    *,
    name: str,
    groups: int = 1,
    files: str = "",
    raw: dict[str, Any] | None = None,
) -> Finished:
    """A run whose task n is in group n mod `groups`, and an MLflow run for it.

    Args:
        root: Folder of the run folder, and of MLflow's files if `track` is an SQLite file.
        files: Another place for MLflow's files, if it is the first run of the experiment.
        raw: Kind and options of the source, for the manifest and the configuration.
    """
    description = source.describe()
    spec = NetworkSpec(description.input, description.tasks, encoder, groups=groups, initial="diagonal",
                       initial_scale=1.0)  # fmt: skip
    network = GroupingNetwork(spec)
    grouping, manifest = network.grouping(), Manifest(description, {}, {}, source=raw or {})
    run = root / f"{name}-{groups}"
    models = network.specialise()
    for group, model in models.items():
        save_model(run / "models" / group, model)
    config = checked(
        Config,
        {"name": name, "data": {"shards": str(run)}, "network": {"groups": groups},
         "track": {"experiment": EXPERIMENT} | track},
    )  # fmt: skip
    result = {
        "outcome": groups_text({"grouping": grouping.to_dict()}),
        "grouping": grouping.to_dict(),
        "grouping_name": grouping.name,
        "split": "test",
        "metrics": {task.name: {task.metric: 0.5, "loss": 1.0} for task in description.tasks},
        "baseline": {task.name: {task.metric: 0.25} for task in description.tasks},
    }
    example = np.stack([source.read(entry)[INPUT] for entry in list(source.entries())[:4]])
    return Finished(config, run, _run_id(config, root, files), manifest, example, result, models)


def _run_id(config: Config, root: Path, files: str) -> str:
    client = connect(config.track)
    experiment = client.get_experiment_by_name(config.track.experiment)
    # an SQLite store would put its files into the current folder
    place = files or (str(root / "artifacts") if config.track.uri.startswith("sqlite") else None)
    number = experiment.experiment_id if experiment else client.create_experiment(config.track.experiment, place)
    run_id: str = client.create_run(number).info.run_id
    return run_id
