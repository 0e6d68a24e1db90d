"""The MLflow model registry: one model a group, and a composite that answers every task."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dmtg_core.checkpoint import load_model
from dmtg_core.network import GroupModel
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.preparation import Preparation, load_preparation
from pipelines.sections import TrackSection
from pipelines.storage import Location, locate
from pipelines.tracking import connect
from pipelines.worker import GROUPING, MODELS

os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
CODE = Path(__file__).parent / "pyfunc_model.py"


def _pinned(name: str) -> str:
    # no pip finds the local part of a version (torch's +cu130) on an index
    return f"{name}=={version(name).split('+')[0]}"


REQUIREMENTS = [_pinned(name) for name in ("dmtg", "torch", "numpy", "safetensors")]


@dataclass(frozen=True)
class Registered:
    """A registered model: its name, and the address that loads this very version."""

    name: str
    uri: str


def register(
    config: Config, run: Location, run_id: str, manifest: Manifest, example: np.ndarray, result: Mapping[str, Any]
) -> list[Registered]:
    """Register the composite and one model a group; versions that this run has registered before are taken.

    Args:
        example: At least two stored input samples.

    Raises:
        UserError: When the server does not answer.
    """
    client = connect(config.track)
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder)
        _fetch_models(run, groups)
        raw = manifest.description.preparation
        tags = {
            "dmtg.grouping": result["grouping_name"],
            "dmtg.data_digest": manifest.digest(),
            "dmtg.version": version("dmtg"),
            "dmtg.run": str(run),
        }
        done = [_register(client, config.name, groups, run_id, example, raw, tags, result)]
        for name in result["grouping"]:
            with tempfile.TemporaryDirectory() as single:
                shutil.copytree(groups / name, Path(single) / name)
                done.append(
                    _register(client, f"{config.name}.{name}", Path(single), run_id, example, raw, tags, result)
                )
    return done


def _register(
    client: Any,
    name: str,
    groups: Path,
    run_id: str,
    example: np.ndarray,
    preparation: Mapping[str, Any],
    tags: Mapping[str, str],
    result: Mapping[str, Any],
) -> Registered:
    import mlflow

    for held in client.search_model_versions(f"name='{name}'"):
        if held.run_id == run_id:
            return Registered(name, f"models:/{name}/{held.version}")
    models = {folder.name: load_model(folder) for folder in sorted(groups.iterdir())}
    served = {group: [task.name for task in model.tasks] for group, model in models.items()}
    gathered = [task for tasks in served.values() for task in tasks]
    metrics = {task: result["metrics"][task] for task in gathered}
    how = load_preparation(preparation) if preparation else None
    with (
        tempfile.TemporaryDirectory() as beside,
        mlflow.start_run(run_id=run_id),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # MLflow's own chatter
        logged = mlflow.pyfunc.log_model(
            name=name.replace(".", "_"),  # a logged model may have no dot, a registered one may
            python_model=str(CODE),
            artifacts={"groups": str(groups)} | _saved(preparation, Path(beside)),
            signature=_signature(models, example, how),
            input_example=example if how is None else [how.example()] * 2,
            pip_requirements=REQUIREMENTS + [_pinned(name) for name in (how.libraries if how else ())],
            metadata={"grouping": result["grouping"], "groups_served": served},
            registered_model_name=name,
        )
    number = logged.registered_model_version
    described = {"dmtg.tasks": ", ".join(gathered), "dmtg.groups": json.dumps(served)} | dict(tags)
    described["dmtg.metrics"] = json.dumps(metrics)[:4900]
    for key, value in described.items():
        client.set_model_version_tag(name, str(number), key, value)
    return Registered(name, f"models:/{name}/{number}")


def _saved(preparation: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The preparation as an artifact; none where the stored input is what a user has."""
    if not preparation:
        return {}
    file = folder / "preparation.json"
    file.write_text(json.dumps(preparation, indent=2), encoding="utf-8")
    return {"preparation": str(file)}


def _signature(models: Mapping[str, GroupModel], example: np.ndarray, how: Preparation | None) -> Any:
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    outputs = []
    for model in models.values():
        for task, value in model.predict(torch.from_numpy(np.array(example))).items():
            found = value.numpy()
            outputs.append(TensorSpec(found.dtype, (-1, *found.shape[1:]), task))
    inputs = [TensorSpec(example.dtype, (-1, *example.shape[1:]))] if how is None else _raw_columns(how)
    return ModelSignature(Schema(inputs), Schema(outputs))


def _raw_columns(how: Preparation) -> list[Any]:
    from mlflow.types import ColSpec
    from mlflow.types.schema import AnyType

    if how.kind != "table":
        return [ColSpec("string")]  # without a name, so that a plain list of strings is taken too
    # MLflow takes no column of integers for one of doubles; our preparation checks the cells itself
    return [ColSpec(AnyType(), name) for name in how.columns]


def list_models(section: TrackSection, name: str = "") -> list[dict[str, Any]]:
    """Newest version of every registered model whose name starts with `name`."""
    client = connect(section)
    found = []
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name='{model.name}'")
        if not versions or not model.name.startswith(name):
            continue
        newest = max(versions, key=lambda v: int(v.version))
        found.append(_shown(newest, dict(model.aliases)))
    return sorted(found, key=lambda entry: str(entry["name"]))


def _shown(model: Any, aliases: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": model.name,
        "version": int(model.version),
        "aliases": sorted(a for a, v in aliases.items() if str(v) == str(model.version)),
        "tasks": model.tags.get("dmtg.tasks", ""),
        "grouping": model.tags.get("dmtg.grouping", ""),
        "run_id": model.run_id,
        "uri": f"models:/{model.name}/{model.version}",
    }


def show_model(section: TrackSection, name: str) -> dict[str, Any]:
    """One registered model (`name`, or `name/version`) with its tags and metrics.

    Raises:
        UserError: When there is no such model.
    """
    client = connect(section)
    wanted, _, number = name.removeprefix("models:/").partition("/")
    versions = client.search_model_versions(f"name='{wanted}'")
    chosen = [v for v in versions if number in ("", str(v.version))]
    if not chosen:
        names = sorted(m.name for m in client.search_registered_models())
        raise UserError(
            f"no registered model {name!r}",
            where="MLflow registry",
            remedy=f"use one of {', '.join(names)}" if names else "train a model first",
        )
    newest = max(chosen, key=lambda v: int(v.version))
    aliases = dict(client.get_registered_model(wanted).aliases)
    groups = json.loads(newest.tags.get("dmtg.groups", "{}"))
    metrics = newest.tags.get("dmtg.metrics", "{}")
    return _shown(newest, aliases) | {
        "groups": groups,
        "data_digest": newest.tags.get("dmtg.data_digest", ""),
        "run": newest.tags.get("dmtg.run", ""),
        "metrics": json.loads(metrics) if len(metrics) < 4900 else {},
    }


def load_groups(uri: str, section: TrackSection) -> dict[str, GroupModel]:
    """The group models behind a registered model's address, or behind a run folder.

    Raises:
        UserError: When there is nothing to load.
    """
    if uri.startswith(("models:/", "runs:/")):
        import mlflow

        connect(section)
        try:
            path = Path(mlflow.artifacts.download_artifacts(uri))
        except Exception as error:
            raise UserError(
                f"cannot load {uri}: {str(error).splitlines()[0][:200]}",
                where="MLflow registry",
                remedy="dmtg models list shows what there is",
            ) from error
        folders = sorted((path / "artifacts").glob("*/group_*"))
        return {folder.name: load_model(folder) for folder in folders}
    return _groups_of_run(uri)


def _groups_of_run(uri: str) -> dict[str, GroupModel]:
    run = locate(uri)
    if not (run / GROUPING).exists():
        raise UserError(
            "neither a registered model nor a finished run",
            where=uri,
            remedy="give models:/<name>/<version>, or a run folder that dmtg train has finished",
        )
    with tempfile.TemporaryDirectory() as folder:
        _fetch_models(run, Path(folder))
        return {path.name: load_model(path) for path in sorted(Path(folder).iterdir())}


def _fetch_models(run: Location, folder: Path) -> None:
    """Copy the group models of a run to the local disk."""
    for file in (run / MODELS).files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((run / MODELS / file).read_bytes())
