"""Registers and loads models: one for each group, and their composite."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dmtg_core.grouping import Grouping
from dmtg_core.names import by_number
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.training.checkpoint import OutdatedNetworkError, load_model
from pipelines.config.loading import Config
from pipelines.config.sections import TrackSection
from pipelines.data.manifest import Manifest
from pipelines.data.preprocessing import Preparation, load_preparation
from pipelines.errors import UserError
from pipelines.registry.aliases import set_challenger
from pipelines.registry.records import DETAILS, LONGEST_TAG, registered, tags_of, versions
from pipelines.registry.tracking import connect
from pipelines.registry.versions import find
from pipelines.runs.files import GROUPING, MODELS
from pipelines.runs.models import branches_of, outdated
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)

LOGGED = re.compile(r"models:/m-[0-9a-f]{32}")  # address of a logged model, registered or not
CODE = Path(__file__).parent / "pyfunc_model.py"


def _pinned(name: str) -> str:
    # package indexes do not have the local part of a version (torch's +cu130)
    return f"{name}=={version(name).split('+')[0]}"


REQUIREMENTS = [_pinned(name) for name in ("dmtg", "torch", "numpy", "safetensors")]


@dataclass(frozen=True)
class Registered:
    """A registered model: its name, and the address of this version."""

    name: str
    uri: str

    @property
    def version(self) -> int:
        """The number of the version."""
        return int(self.uri.rpartition("/")[2])


@dataclass(frozen=True)
class _Origin:
    """The common inputs of all models of a run.

    Args:
        example: At least two stored input samples.
        preparation: Conversion of raw to stored input; empty if they are the same.
        result: The contents of `result.json`.
        facts: Facts of the run.
    """

    client: Any
    run_id: str
    example: np.ndarray
    preparation: Mapping[str, Any]
    result: Mapping[str, Any]
    facts: Mapping[str, Any]


def register(
    config: Config, run: Location, run_id: str, manifest: Manifest, example: np.ndarray, result: Mapping[str, Any]
) -> list[Registered]:
    """Register a model for each group and the composite, which becomes the challenger.

    It resumes a call that was interrupted: versions that this run has registered are kept, and missing tags are
    set. The composite is registered last, as it names the versions of its groups.

    Args:
        example: At least two stored input samples.

    Returns:
        The composite first.

    Raises:
        UserError: When the server does not answer.
    """
    facts = {
        "grouping": result["grouping_name"],
        "data_digest": manifest.digest(),
        "config_digest": config.digest(),
        "code_version": version("dmtg"),
        "run": str(run),
        "split": result["split"],
        "composite": config.name,
    }
    client = connect(config.track)
    origin = _Origin(client, run_id, example, manifest.description.preparation, result, facts)
    with tempfile.TemporaryDirectory() as folder:
        _fetch_models(run, Path(folder))
        members = []
        for group in result["grouping"]:
            with tempfile.TemporaryDirectory() as single:
                shutil.copytree(Path(folder) / group, Path(single) / group)
                members.append(_register(origin, f"{config.name}.{group}", Path(single)))
        composite = _register(origin, config.name, Path(folder), members)
    set_challenger(config.track, config.name, composite.version)
    return [composite, *members]


def _register(origin: _Origin, name: str, groups: Path, members: Sequence[Registered] = ()) -> Registered:
    """Register the model of the groups in a folder; with `members`, as their composite."""
    models = _loaded(groups.iterdir())
    facts = {**origin.facts, **_facts(origin.result, models, members)}
    tags = tags_of(facts)
    for held in versions(origin.client, name) if registered(origin.client, name) else ():
        if held.run_id == origin.run_id:
            for key in sorted(set(tags) - set(held.tags)):
                origin.client.set_model_version_tag(name, held.version, key, tags[key])
            return Registered(name, f"models:/{name}/{held.version}")
    return Registered(name, f"models:/{name}/{_log(origin, name, groups, models, facts, tags)}")


def _facts(
    result: Mapping[str, Any], models: Mapping[str, GroupModel], members: Sequence[Registered]
) -> dict[str, Any]:
    """Facts of a model that are not those of its run."""
    groups = {group: [task.name for task in model.tasks] for group, model in models.items()}
    tasks = [task for group in groups.values() for task in group]
    listed = ", ".join(tasks)
    return {
        "kind": "composite" if members else "group",
        "tasks": listed if len(listed) <= LONGEST_TAG else f"{len(tasks)} tasks",
        "groups": groups,
        "members": {member.name: member.version for member in members},
        "metrics": {task: result["metrics"][task] for task in tasks},
        "baseline": {task: v for task, v in result.get("baseline", {}).items() if task in tasks},
        "headline": {task.name: task.metric for model in models.values() for task in model.tasks},
    }


def _log(
    origin: _Origin,
    name: str,
    groups: Path,
    models: Mapping[str, GroupModel],
    facts: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """Log a model and create a version with its tags in one request; the number of the version.

    `mlflow.pyfunc.log_model` also loads the saved model, predicts with it, and asks the server for the history of
    each metric of the run. The signature is computed from a prediction already.
    """
    import mlflow
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    run = origin.client.get_run(origin.run_id)
    logged = mlflow.initialize_logged_model(
        name=name.replace(".", "_"),  # the name of a logged model cannot contain a dot
        source_run_id=origin.run_id,
        tags=dict(tags),
        params=dict(run.data.params),
        experiment_id=run.info.experiment_id,
    )
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            _save(origin, Path(folder), groups, models, facts, logged)  # MLflow's own messages are left out
            origin.client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    except BaseException:
        origin.client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    origin.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    origin.client.log_outputs(origin.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return _create_version(origin, name, logged.model_id, tags)


def _save(
    origin: _Origin,
    folder: Path,
    groups: Path,
    models: Mapping[str, GroupModel],
    facts: Mapping[str, Any],
    logged: Any,
) -> None:
    """Save an MLflow model in the sub-folder `model`."""
    import mlflow
    from mlflow.models import Model

    how = load_preparation(origin.preparation) if origin.preparation else None
    metadata = {"grouping": origin.result["grouping"], "groups_served": facts["groups"]}
    described = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        run_id=origin.run_id,
        metadata=metadata,
        model_id=logged.model_id,
    )
    mlflow.pyfunc.save_model(
        folder / "model",
        mlflow_model=described,
        python_model=str(CODE),
        artifacts={"groups": str(groups)} | _artifacts(origin, facts, folder),
        signature=_signature(models, origin.example, how),
        input_example=origin.example if how is None else [how.example()] * 2,
        pip_requirements=REQUIREMENTS + [_pinned(name) for name in (how.libraries if how else ())],
        metadata=metadata,
    )


def _separate_registry() -> bool:
    """Whether the registry is a separate server, which does not have the models of the tracking server."""
    import mlflow

    registry = mlflow.get_registry_uri()
    return registry.startswith("http") and registry != mlflow.get_tracking_uri()


def _create_version(origin: _Origin, name: str, model_id: str, tags: Mapping[str, str]) -> str:
    """Create a version of a logged model; on a separate registry server, with the address of the model's files.

    Raises:
        UserError: When only the tracking server can access the files.
    """
    place, held = f"models:/{model_id}", {"model_id": model_id}
    if _separate_registry():
        place, held = origin.client.get_logged_model(model_id).artifact_location, {}
    if place.startswith("mlflow-artifacts:"):
        raise UserError(
            "a separate registry server cannot access artifacts that are served by the tracking server",
            where=f"track.registry_uri; {place}",
            remedy="leave out the registry's address if it is the same server, or store the artifacts of the "
            "experiment in a bucket (mlflow server --no-serve-artifacts --default-artifact-root s3://…)",
        )
    if registered(origin.client, name) is None:
        origin.client.create_registered_model(name)
    made = origin.client.create_model_version(name, place, run_id=origin.run_id, tags=dict(tags), **held)
    return str(made.version)


def _artifacts(origin: _Origin, facts: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the JSON artifacts: the grouping, the facts of the version, and the preparation if there is one."""
    groups = Grouping.from_dict(origin.result["grouping"])
    texts = {"grouping": groups.to_json(), DETAILS.removesuffix(".json"): json.dumps(facts, indent=2)}
    if origin.preparation:
        texts["preparation"] = json.dumps(origin.preparation, indent=2)
    for key, text in texts.items():
        (folder / f"{key}.json").write_text(text, encoding="utf-8")
    return {key: str(folder / f"{key}.json") for key in texts}


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
        return [ColSpec("string")]  # without a name, so that a list of strings is accepted too
    # MLflow rejects integers in a column of doubles; the preparation checks the cells itself
    return [ColSpec(AnyType(), name) for name in how.columns]


def load_groups(uri: str, section: TrackSection) -> dict[str, GroupModel]:
    """The group models of a registered model, or of a run folder.

    Args:
        uri: `models:/name/version`, `models:/name@alias`, `models:/name` for the newest version, another address
            that MLflow accepts (`runs:/…`, `models:/m-…`), or a run folder.

    Raises:
        UserError: When there is nothing to load.
    """
    logger.info("loading %s", uri)
    if not uri.startswith(("models:/", "runs:/")):
        return _groups_of_run(uri)
    return load_registered(uri, section)[0]


def load_registered(uri: str, section: TrackSection) -> tuple[dict[str, GroupModel], dict[str, Any]]:
    """The group models of a registered model, and the preparation of their input; empty for none.

    Raises:
        UserError: When there is nothing to load.
    """
    import mlflow

    client = connect(section)
    if uri.startswith("models:/") and not LOGGED.fullmatch(uri):
        found, _ = find(client, uri)
        uri = f"models:/{found.name}/{found.version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
        except Exception as error:
            raise UserError(
                f"cannot load {uri}: {str(error).splitlines()[0][:200]}",
                where="MLflow registry",
                remedy="dmtg models list shows the registered models",
            ) from error
        file = path / "artifacts" / "preparation.json"
        preparation = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        branches = _branches(client, path)
        try:
            return _loaded((path / "artifacts").glob("*/group_*"), branches), preparation
        except OutdatedNetworkError as error:
            raise outdated(error, uri) from error


def _branches(client: Any, model: Path) -> int:
    """K of the network of a registered model: that of its run, or else the number of its groups."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    described = Model.load(str(model / "MLmodel"))
    groups = len((described.metadata or {}).get("grouping", ()))
    try:
        return int(client.get_run(described.run_id).data.params["network.groups"])
    except (MlflowException, KeyError):  # the run has been deleted
        return groups


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
        try:
            return _loaded(Path(folder).iterdir(), branches_of(run))
        except OutdatedNetworkError as error:
            raise outdated(error, uri) from error


def _loaded(folders: Iterable[Path], branches: int = 1) -> dict[str, GroupModel]:
    """The models of groups, in the order of their numbers; `branches` as in `load_model`."""
    places = sorted(folders, key=lambda place: by_number(place.name))
    return {place.name: load_model(place, branches=branches) for place in places}


def _fetch_models(run: Location, folder: Path) -> None:
    """Copy the group models of a run to a local folder."""
    for file in (run / MODELS).files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((run / MODELS / file).read_bytes())
