"""Logs a model in MLflow, and creates a version of it in the registry."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dmtg_core.addresses import recorded
from dmtg_core.grouping import Grouping
from dmtg_core.network.encoders import LIBRARIES
from dmtg_core.network.grouping_network import GroupModel
from pipelines.data.preprocessing import Preparation, load_preparation
from pipelines.errors import UserError
from pipelines.registry import integrity
from pipelines.registry.records import DETAILS, model_card, registered
from pipelines.scratch import temporary_folder

CODE = Path(__file__).parent / "pyfunc_model.py"


def _pinned(name: str) -> str:
    # package indexes do not have the local part of a version (torch's +cu130)
    return f"{name}=={version(name).split('+')[0]}"


REQUIREMENTS = [_pinned(name) for name in ("dmtg", "torch", "numpy", "safetensors")]


@dataclass(frozen=True)
class Origin:
    """The common inputs of all models of a run.

    Args:
        example: At least two stored input samples.
        preparation: Conversion of raw to stored input; empty if they are the same.
        result: The contents of `result.json`.
        facts: Facts of the run.
        source: `pipelines.data.new_samples.raw_form` of the data set.
        base: See `pipelines.registry.bases`; None if the models have all of their weights.
    """

    client: Any
    run_id: str
    example: np.ndarray
    preparation: Mapping[str, Any]
    result: Mapping[str, Any]
    facts: Mapping[str, Any]
    source: Mapping[str, Any]
    base: Mapping[str, Any] | None = None


def log_version(
    origin: Origin,
    name: str,
    groups: Path,
    models: Mapping[str, GroupModel],
    facts: Mapping[str, Any],
    tags: Mapping[str, str],
) -> str:
    """Log a model of groups and create a version of it; the number of the version.

    `mlflow.pyfunc.log_model` also loads the saved model, predicts with it, and asks the server for the history of
    each metric of the run. The signature is computed from a prediction already.
    """
    with temporary_folder() as folder:

        def save(logged: Any) -> Path:
            _save(origin, folder, groups, models, facts, logged)
            return folder / "model"

        return log_files(origin, name, save, tags, model_card(facts, origin.result.get("notes", ())))


def log_files(
    origin: Origin, name: str, save: Callable[[Any], Path], tags: Mapping[str, str], description: str
) -> str:
    """Log a model and create a version with its tags in one request; the number of the version.

    Args:
        origin: The run.
        name: Name of the registered model.
        save: Writes the files of a logged model; their folder.
        tags: Tags of the version.
        description: Text of the version.
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
    discard_unfinished(origin, logged)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # MLflow's own messages are left out
            folder = save(logged)
            recorded = {integrity.TAG: integrity.record(folder)}
            origin.client.set_logged_model_tags(logged.model_id, recorded)
            origin.client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        origin.client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    origin.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    origin.client.log_outputs(origin.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return _create_version(origin, name, logged.model_id, {**tags, **recorded}, description)


def described_model(origin: Origin, logged: Any, metadata: Mapping[str, Any]) -> Any:
    """The contents of the file `MLmodel` of a logged model."""
    from mlflow.models import Model

    return Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        run_id=origin.run_id,
        metadata=dict(metadata),
        model_id=logged.model_id,
    )


def discard_unfinished(origin: Origin, logged: Any) -> None:
    """Delete logged models of this run and name that a killed registration has not finished.

    Args:
        origin: The run.
        logged: The logged model that is being written.
    """
    found = origin.client.search_logged_models(
        [logged.experiment_id],
        filter_string=f"source_run_id = '{origin.run_id}' AND name = '{logged.name}' AND status != 'READY'",
    )
    for other in found:
        if other.model_id != logged.model_id:
            origin.client.delete_logged_model(other.model_id)


def _save(
    origin: Origin,
    folder: Path,
    groups: Path,
    models: Mapping[str, GroupModel],
    facts: Mapping[str, Any],
    logged: Any,
) -> None:
    """Save an MLflow model in the sub-folder `model`."""
    import mlflow

    how = load_preparation(origin.preparation) if origin.preparation else None
    metadata = {"grouping": origin.result["grouping"], "groups_served": facts["groups"]}
    metadata |= {"source": dict(origin.source)}
    mlflow.pyfunc.save_model(
        folder / "model",
        mlflow_model=described_model(origin, logged, metadata),
        python_model=str(CODE),
        artifacts={"groups": str(groups)} | _artifacts(origin, facts, folder),
        signature=_signature(models, origin.example, how),
        input_example=origin.example if how is None else [how.example()] * 2,
        pip_requirements=[*REQUIREMENTS, *map(_pinned, _libraries(models, how))],
        metadata=metadata,
    )


def _libraries(models: Mapping[str, GroupModel], how: Preparation | None) -> list[str]:
    """Packages that the encoders, the preparation, and code by address need in addition."""
    needed = [name for model in models.values() for name in LIBRARIES.get(model.spec.encoder.name, ())]
    code = [recorded(*pair).distribution for model in models.values() for pair in model.spec.code]
    return list(dict.fromkeys([*needed, *(how.libraries if how else ()), *filter(None, code)]))


def _separate_registry() -> bool:
    """Whether the registry is a separate server, which does not have the models of the tracking server."""
    import mlflow

    registry = mlflow.get_registry_uri()
    return registry.startswith("http") and registry != mlflow.get_tracking_uri()


def _create_version(origin: Origin, name: str, model_id: str, tags: Mapping[str, str], description: str) -> str:
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
    made = origin.client.create_model_version(
        name, place, run_id=origin.run_id, tags=dict(tags), description=description, **held
    )
    return str(made.version)


def _artifacts(origin: Origin, facts: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the JSON artifacts: grouping, facts, and if there are any, preparation and frozen weights."""
    groups = Grouping.from_dict(origin.result["grouping"])
    values = {DETAILS.removesuffix(".json"): facts}
    if origin.preparation:
        values["preparation"] = origin.preparation
    if origin.base is not None:
        values["base"] = origin.base
    texts = {key: json.dumps(value, indent=2, ensure_ascii=False) for key, value in values.items()}
    texts["grouping"] = groups.to_json()
    for key, text in texts.items():
        (folder / f"{key}.json").write_text(text, encoding="utf-8")
    return {key: str(folder / f"{key}.json") for key in texts}


def _signature(models: Mapping[str, GroupModel], example: np.ndarray, how: Preparation | None) -> Any:
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    found: dict[str, np.ndarray] = {}
    for model in models.values():
        decoded = model.predict(torch.from_numpy(np.array(example)))
        found |= {name: value.numpy() for name, value in decoded.items()}
    tasks = [task for model in models.values() for task in model.tasks]
    shares = [task.named_shares(found[task.name]) for task in tasks]
    answers = found | {name: share for one in shares for name, share in one.items() if name not in found}
    outputs = [TensorSpec(value.dtype, (-1, *value.shape[1:]), name) for name, value in answers.items()]
    inputs = [TensorSpec(example.dtype, (-1, *example.shape[1:]))] if how is None else _raw_columns(how)
    return ModelSignature(Schema(inputs), Schema(outputs))


def _raw_columns(how: Preparation) -> list[Any]:
    from mlflow.types import ColSpec
    from mlflow.types.schema import AnyType

    if how.kind != "table":
        return [ColSpec("string")]  # without a name, so that a list of strings is accepted too
    # MLflow rejects integers in a column of doubles; the preparation checks the cells itself
    return [ColSpec(AnyType(), name) for name in how.columns]
