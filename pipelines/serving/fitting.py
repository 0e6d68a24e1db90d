"""Whether data fits a model: what the model was trained on, compared with what it is given.

`dmtg evaluate`, `dmtg predict` and the nightly run share it. Shards of equal shape can have other columns, another
order of columns, other categories or another tokenizer: the model would read one value as another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmtg_core.input_spec import InputSpec
from dmtg_core.names import listed
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.tasks import Task
from pipelines.config.sections import TrackSection
from pipelines.data.new_samples import raw_form
from pipelines.data.preprocessing import MARKS
from pipelines.data.renewal import columns_of
from pipelines.data.sources.encoding import shown, unnamed
from pipelines.errors import UserError
from pipelines.registry.models import is_saved, load_groups, load_registered, load_saved, load_whole
from pipelines.registry.tracking import connect
from pipelines.registry.versions import find
from pipelines.runs.identity import preparation_of, source_of
from pipelines.storage import locate

REGISTERED = ("models:/", "runs:/")  # addresses of MLflow
INPUT_KEYS = ("kind", "shape", "dtype", "vocabulary")
# offset and scale may differ: outputs are converted to the same units
TASK_KEYS = ("kind", "channels", "labels", "metric", "valid_below", "threshold", "unit")


@dataclass(frozen=True)
class Served:
    """A model to predict with.

    Args:
        groups: Group → model.
        address: The address with the number of the version, or the run folder.
        digest: Digest of weights, tasks and groups.
        preparation: How its input is prepared; None if it is unknown.
        source: `pipelines.data.new_samples.raw_form` of its data; empty if it is unknown.
    """

    groups: Mapping[str, GroupModel]
    address: str
    digest: str
    preparation: Mapping[str, Any] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, tuple[Task, str]]:
        """Task name → task, and its group."""
        return {task.name: (task, name) for name, model in self.groups.items() for task in model.tasks}


def input_problem(
    spec: InputSpec,
    preparation: Mapping[str, Any] | None,
    given: InputSpec,
    prepared: Mapping[str, Any],
    *,
    strict: bool = False,
) -> str:
    """What differs between the input of a model and that of data; empty if nothing does.

    Args:
        spec, preparation: Of the model; None for an unknown preparation.
        given, prepared: Of the data.
        strict: Compare the mean of a number also where no gap is filled with it.
    """
    if any(getattr(spec, key) != getattr(given, key) for key in INPUT_KEYS):
        return f"the model reads {_input(spec)}, the data has {_input(given)}"
    if preparation is None or dict(preparation) == dict(prepared):
        return ""
    mine, theirs = columns_of(dict(preparation)), columns_of(dict(prepared))
    if mine == theirs:
        return _encoding_problem(preparation, prepared, strict)
    missing = [name for name in mine if name not in theirs]
    new = [name for name in theirs if name not in mine]
    if missing or new:
        return f"the model reads the columns {listed(mine)}, the data has {listed(theirs)}"
    return f"the model reads the columns in the order {listed(mine)}, the data has them as {listed(theirs)}"


def _encoding_problem(mine: Mapping[str, Any], theirs: Mapping[str, Any], strict: bool) -> str:
    """What differs between two preparations of the same columns; the mean matters only where it fills gaps."""
    for key in sorted({*mine, *theirs} - {"features", *MARKS}):  # the marks of numbers are not in the input
        if mine.get(key) != theirs.get(key):
            return f"the data has another {key} than the data of the model"
    if not isinstance(mine.get("features"), list):
        return "" if mine.get("features") == theirs.get("features") else "the data has other features"
    changed = [
        one["column"]
        for one, other in zip(mine["features"], theirs["features"], strict=True)
        if _compared(one, strict) != _compared(other, strict)
    ]
    return f"the columns {listed(changed)} have other categories, gaps or means" if changed else ""


def _compared(feature: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    fills = strict or feature.get("gaps", True)
    return {key: value for key, value in feature.items() if key != "mean" or fills}


def _input(spec: InputSpec) -> str:
    return f"{spec.kind} of {spec.dtype} {spec.shape}" + (f", ids to {spec.vocabulary}" if spec.vocabulary else "")


def open_model(model: str, track: TrackSection, *, trust_code: bool = False) -> Served:
    """A model, with the number of its version in the address, as aliases change.

    Raises:
        UserError: As `pipelines.registry.models.load_registered`.
    """
    address = model
    if model.startswith("models:/") and not model.startswith("models:/m-"):
        found, _ = find(connect(track, create=False), model)
        address = f"models:/{found.name}/{found.version}"
    if address.startswith(REGISTERED):
        found = load_whole(address, track, trust_code=trust_code)
    elif is_saved(address):
        found = load_saved(Path(address), trust_code=trust_code)
    else:
        groups = load_groups(address, track, trust_code=trust_code)
        run = locate(address)
        return Served(groups, address, _digest(groups), preparation_of(run), raw_form(source_of(run)))
    return Served(found.groups, address, _digest(found.groups), found.preparation or None, found.source)


def _digest(groups: Mapping[str, GroupModel]) -> str:
    every = hashlib.sha256()
    for name, model in sorted(groups.items()):
        every.update(json.dumps([name, model.spec.to_dict()], sort_keys=True).encode())
        for key, value in model.state_dict().items():
            every.update(key.encode() + value.contiguous().numpy().tobytes())
    return every.hexdigest()[:12]


def load_with_preparation(
    address: str, track: TrackSection, *, trust_code: bool = False
) -> tuple[dict[str, GroupModel], Mapping[str, Any] | None]:
    """The group models of a registered model or a run folder, and the preparation of their input; None if unknown.

    Raises:
        UserError: As `pipelines.registry.models.load_registered`.
    """
    if address.startswith(REGISTERED):
        groups, preparation = load_registered(address, track, trust_code=trust_code)
        return groups, preparation or None
    return load_groups(address, track, trust_code=trust_code), preparation_of(locate(address))


def check_input(
    spec: InputSpec,
    preparation: Mapping[str, Any] | None,
    given: InputSpec,
    prepared: Mapping[str, Any],
    where: str,
) -> None:
    """Check that data has the input of a model; see `input_problem`.

    Raises:
        UserError: With what differs.
    """
    problem = input_problem(spec, preparation, given, prepared)
    if problem:
        raise UserError(
            problem,
            where=where,
            remedy="write the shards with data.like=<the shards of the model>, or use another model",
        )


def same_tasks(some: Sequence[Task], others: Sequence[Task], where: str) -> None:
    """Check that tasks with the same name are the same task.

    Raises:
        UserError: With the tasks that differ.
    """
    known = {task.name: task for task in others}
    differing = [
        f"{task.name} ({key}: {shown(mine, theirs)}, {shown(theirs, mine)})"
        for task in some
        if task.name in known
        for key in TASK_KEYS
        for mine, theirs in [(getattr(task, key), getattr(known[task.name], key))]
        if mine != theirs and not unnamed(task, key, mine, theirs)
    ]
    if differing:
        raise UserError(
            f"tasks with the same name differ: {'; '.join(differing[:3])}",
            where=where,
            remedy="give another name to a task that has changed",
        )
