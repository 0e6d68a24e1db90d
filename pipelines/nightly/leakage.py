"""The leakage check: champion and challenger have the same tasks, and no evaluation sample was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from dmtg_core.names import listed
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.tasks import Task
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.errors import UserError
from pipelines.runs.configuration import stored_values
from pipelines.serving.fitting import input_problem, same_tasks
from pipelines.storage import locate


def check_evaluation(
    manifest: Manifest, shards: str, evaluated: Manifest, evaluation: str, tasks: tuple[Task, ...], split: str
) -> None:
    """Check that both models can be evaluated on the split, and that the challenger is not trained on it.

    Args:
        manifest, shards: Training data of the challenger.
        evaluated, evaluation: Evaluation data.
        tasks: Tasks of the challenger.
        split: Evaluation split.

    Raises:
        UserError: If the split is too small, tasks differ, or samples are in the training data.
    """
    if evaluated.rows(split) < 2:
        raise UserError(
            f"split {split} has {evaluated.rows(split)} samples for the evaluation",
            where=evaluation,
            remedy="set regroup.split=val, or regroup.evaluation to shards that have them",
        )
    same_tasks(tasks, evaluated.tasks([task.name for task in tasks], evaluation), evaluation)
    if evaluation == shards:
        return
    held_out = sample_ids(evaluated, evaluation, (split,))
    trained = held_out & sample_ids(manifest, shards, ("train", "val"))
    if trained:
        raise UserError(
            f"{len(trained)} of {len(held_out)} samples of the evaluation are in the training data, "
            f"such as {min(trained)}",
            where=f"regroup.evaluation={evaluation}, split {split}",
            remedy="leave them out of the splits train and val of the new shards",
        )


def check_champion(
    groups: Mapping[str, GroupModel],
    tasks: tuple[Task, ...],
    uri: str,
    manifest: Manifest,
    preparation: Mapping[str, Any],
) -> None:
    """Check that the champion can read the new data, and that the challenger has all tasks of the champion.

    Args:
        groups: Models of the champion.
        tasks: Tasks of the challenger.
        uri: Address of the champion.
        manifest: Manifest of the new data.
        preparation: Preparation of the champion's input; see `Description.preparation`.

    Raises:
        UserError: If the input differs, or tasks are missing or differ.
    """
    spec, new = next(iter(groups.values())).spec.input, manifest.description
    problem = input_problem(spec, preparation, new.input, new.preparation, strict=True)
    if problem:
        raise UserError(
            f"the new data has another encoding than the data of the champion {uri}: {problem}",
            where="data.like",
            remedy="write the new shards with data.like=<the champion's shards>",
        )
    served = [task for model in groups.values() for task in model.tasks]
    missing = sorted({task.name for task in served} - {task.name for task in tasks})
    if missing:
        raise UserError(
            f"the champion {uri} serves {listed(missing)}, which the challenger does not have",
            where="data.tasks",
            remedy="train these tasks too, or choose another name for models of other tasks",
        )
    same_tasks(served, tasks, uri)


def leakage_notes(champion: Mapping[str, Any], evaluated: Manifest, evaluation: str, split: str) -> list[str]:
    """A note if the champion was trained on evaluation samples, or if its training data is missing."""
    trained = training_data(champion)
    if trained is None:
        return ["the training data of the champion is missing, so the champion may have seen evaluation samples"]
    manifest, shards = trained
    if shards == evaluation and manifest.digest() == evaluated.digest():
        return []
    seen = sample_ids(evaluated, evaluation, (split,)) & sample_ids(manifest, shards, ("train", "val"))
    return [f"the champion was trained on {len(seen)} of the evaluation samples"] if seen else []


def sample_ids(manifest: Manifest, shards: str, splits: tuple[str, ...]) -> set[str]:
    """The sample ids of some splits."""
    folder, found = locate(shards), set()
    for split in splits:
        for shard in manifest.shards.get(split, ()):
            place = folder / shard.file
            try:
                with place.filesystem.open_input_file(place.path) as file:
                    found.update(pq.read_table(file, columns=["id"])["id"].to_pylist())
            except OSError as error:
                raise place.unreachable(error) from error
    return found


def training_data(champion: Mapping[str, Any]) -> tuple[Manifest, str] | None:
    """The training data of a registered model; None if it is missing or has changed."""
    try:
        run = locate(champion["run"])
        shards = stored_values(run)["data"]["shards"]
        manifest = read_manifest(locate(shards))
    except (UserError, OSError, KeyError, TypeError):
        return None
    return (manifest, shards) if manifest.digest() == champion["data_digest"] else None
