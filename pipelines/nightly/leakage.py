"""Whether champion and challenger can be judged on the same samples, and neither has been trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq
import yaml

from dmtg_core.names import listed
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.tasks import Task
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.data.sources.encoding import shown
from pipelines.errors import UserError
from pipelines.storage import locate


def check_evaluation(
    manifest: Manifest, shards: str, judged: Manifest, evaluation: str, tasks: tuple[Task, ...], split: str
) -> None:
    """Whether both can be judged on the evaluation split, and the challenger does not see it in training.

    Raises:
        UserError: When they cannot, or it does.
    """
    if judged.rows(split) < 2:
        raise UserError(
            f"split {split} has {judged.rows(split)} samples to judge on",
            where=evaluation,
            remedy="set regroup.split=val, or regroup.evaluation to shards that have them",
        )
    same_tasks(tasks, judged.tasks([task.name for task in tasks], evaluation), evaluation)
    if evaluation == shards:
        return
    held_out = ids(judged, evaluation, (split,))
    trained = held_out & ids(manifest, shards, ("train", "val"))
    if trained:
        raise UserError(
            f"{len(trained)} of {len(held_out)} samples of the evaluation are in the data to train on, "
            f"such as {min(trained)}",
            where=f"regroup.evaluation={evaluation}, split {split}",
            remedy="leave them out of the new shards' train and val splits",
        )


def check_champion(
    groups: Mapping[str, GroupModel],
    tasks: tuple[Task, ...],
    uri: str,
    manifest: Manifest,
    preparation: Mapping[str, Any],
) -> None:
    """Whether the champion can read the new data, and the challenger will serve what it serves.

    Args:
        groups: The champion's models.
        tasks: Of the challenger.
        uri: The champion's address.
        manifest: Of the new data.
        preparation: How the champion's input was made; see `Description.preparation`.

    Raises:
        UserError: When it cannot, or will not.
    """
    spec, new = next(iter(groups.values())).spec.input, manifest.description.input
    keys = ("kind", "shape", "dtype", "vocabulary")
    same = all(getattr(spec, key) == getattr(new, key) for key in keys)
    if not same or dict(preparation) != dict(manifest.description.preparation):
        raise UserError(
            f"the new data is encoded otherwise than that of the champion {uri}, which would read noise in it",
            where="data.like",
            remedy="make the new shards with data.like=<the champion's shards>",
        )
    served = [task for model in groups.values() for task in model.tasks]
    missing = sorted({task.name for task in served} - {task.name for task in tasks})
    if missing:
        raise UserError(
            f"the champion {uri} serves {listed(missing)}, which the challenger would not",
            where="data.tasks",
            remedy="train on these tasks too, or give the models of other tasks another name",
        )
    same_tasks(served, tasks, uri)


def seen_by(champion: Mapping[str, Any], judged: Manifest, evaluation: str, split: str) -> list[str]:
    """A note where the champion was trained on samples it is judged on, or that cannot be known."""
    trained = training_data(champion)
    if trained is None:
        return ["what the champion was trained on is gone, so it may have seen samples that it is judged on"]
    manifest, shards = trained
    if shards == evaluation and manifest.digest() == judged.digest():
        return []
    seen = ids(judged, evaluation, (split,)) & ids(manifest, shards, ("train", "val"))
    return [f"the champion was trained on {len(seen)} of the samples that it is judged on"] if seen else []


def same_tasks(some: Sequence[Task], others: Sequence[Task], where: str) -> None:
    """Whether tasks of one name are the same task.

    Raises:
        UserError: Naming those that are not.
    """
    # offset and scale may differ: outputs are brought into the same units
    keys = ("kind", "channels", "labels", "metric", "valid_below", "threshold")
    known = {task.name: task for task in others}
    differing = [
        f"{task.name} ({key}: {shown(mine, theirs)}, {shown(theirs, mine)})"
        for task in some
        if task.name in known
        for key in keys
        for mine, theirs in [(getattr(task, key), getattr(known[task.name], key))]
        if mine != theirs
    ]
    if differing:
        raise UserError(
            f"tasks of one name differ, so that they cannot be compared: {'; '.join(differing[:3])}",
            where=where,
            remedy="give a task that has changed another name",
        )


def ids(manifest: Manifest, shards: str, splits: tuple[str, ...]) -> set[str]:
    """The ids of some splits."""
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
    """The shards that a registered model was trained on, while they are still what they were."""
    try:
        run = locate(champion["run"])
        shards = yaml.safe_load((run / "config.yaml").read_text())["data"]["shards"]
        manifest = read_manifest(locate(shards))
    except (UserError, OSError, KeyError, TypeError):
        return None
    return (manifest, shards) if manifest.digest() == champion["data_digest"] else None
