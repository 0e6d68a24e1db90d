"""Registers and loads models: one for each group, and their composite."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dmtg_core.addresses import CodeError, recorded
from dmtg_core.names import by_number, quoted
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.training.checkpoint import BASE, FrozenWeightsError, OutdatedNetworkError, load_model
from pipelines.config.loading import Config
from pipelines.config.sections import TrackSection
from pipelines.data.manifest import Manifest
from pipelines.data.new_samples import raw_form
from pipelines.errors import UserError
from pipelines.registry import integrity
from pipelines.registry.aliases import set_challenger
from pipelines.registry.base_versions import register_base
from pipelines.registry.bases import REMEDY, open_base
from pipelines.registry.logged_models import Origin, log_version
from pipelines.registry.records import LONGEST_TAG, PREFIX, registered, tags_of, version_of, versions
from pipelines.registry.tracking import connect
from pipelines.registry.versions import find
from pipelines.runs.files import GROUPING, MODELS
from pipelines.runs.models import branches_of, code_error, outdated
from pipelines.scratch import temporary_folder
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)

MEMBERS = f"{PREFIX}members"
LOGGED = re.compile(r"models:/m-[0-9a-f]{32}")  # address of a logged model, registered or not


@dataclass(frozen=True)
class Registered:
    """A registered model: its name, and the address of this version."""

    name: str
    uri: str

    @property
    def version(self) -> int:
        """The number of the version."""
        return int(self.uri.rpartition("/")[2])


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
        "outcome": result.get("outcome", ""),
    }
    client = connect(config.track)
    form = raw_form(manifest.source)
    origin = Origin(client, run_id, example, manifest.description.preparation, result, facts, form)
    with temporary_folder() as scratch:
        folder = scratch / "groups"
        _fetch_models(run, folder)
        where, trust = str(run / MODELS), config.run.trust_code
        models = _loaded_from(_groups_in(folder), 1, where, trust=trust)  # nothing is registered if one is damaged
        shutil.rmtree(folder / BASE, ignore_errors=True)
        first = next(iter(models.values())).network
        origin = replace(origin, base=register_base(origin, f"{config.name}.base", first, config.track.base))
        members = []
        for group in result["grouping"]:
            single = scratch / group / "groups"
            shutil.copytree(folder / group, single / group)
            members.append(_register(origin, f"{config.name}.{group}", single, {group: models[group]}))
        composite = _register(origin, config.name, folder, models, members)
    set_challenger(config.track, config.name, composite.version)
    return [composite, *members]


def _register(
    origin: Origin,
    name: str,
    groups: Path,
    models: Mapping[str, GroupModel],
    members: Sequence[Registered] = (),
) -> Registered:
    """Register the models of the groups in a folder; with `members`, as their composite."""
    facts = {**origin.facts, **_facts(origin.result, models, members)}
    tags = tags_of(facts)
    for held in versions(origin.client, name) if registered(origin.client, name) else ():
        if held.run_id == origin.run_id:
            for key, value in tags.items():  # a member that was deleted has another number now
                if key not in held.tags or (key == MEMBERS and held.tags[key] != value):
                    origin.client.set_model_version_tag(name, held.version, key, value)
            return Registered(name, f"models:/{name}/{held.version}")
    return Registered(name, f"models:/{name}/{log_version(origin, name, groups, models, facts, tags)}")


def _facts(
    result: Mapping[str, Any], models: Mapping[str, GroupModel], members: Sequence[Registered]
) -> dict[str, Any]:
    """Facts of a model that are not those of its run."""
    groups = {group: [task.name for task in model.tasks] for group, model in models.items()}
    tasks = [task for group in groups.values() for task in group]
    listed = ", ".join(map(quoted, tasks))
    code = dict.fromkeys(pair for model in models.values() for pair in model.spec.code)
    return ({"code": [recorded(*pair).to_dict() for pair in code]} if code else {}) | {
        "kind": "composite" if members else "group",
        "tasks": listed if len(listed) <= LONGEST_TAG else f"{len(tasks)} tasks",
        "groups": groups,
        "members": {member.name: member.version for member in members},
        "metrics": {task: result["metrics"][task] for task in tasks},
        "baseline": {task: v for task, v in result.get("baseline", {}).items() if task in tasks},
        "headline": {task.name: task.metric for model in models.values() for task in model.tasks},
    }


def are_registered(section: TrackSection, models: Sequence[Registered], run_id: str) -> bool:
    """Whether the registry has these versions of a run."""
    client = connect(section)
    held = [version_of(client, model.name, str(model.version)) for model in models]
    return all(found is not None and found.run_id == run_id for found in held)


def load_groups(uri: str, section: TrackSection, *, trust_code: bool = False) -> dict[str, GroupModel]:
    """The group models of a registered model, or of a run folder.

    Args:
        uri: `models:/name/version`, `models:/name@alias`, `models:/name` for the newest version, another address
            that MLflow accepts (`runs:/…`, `models:/m-…`), or a run folder.
        section: The registry.
        trust_code: As `load_registered`.

    Raises:
        UserError: As `load_registered`.
    """
    logger.info("loading %s", uri)
    if not uri.startswith(("models:/", "runs:/")):
        return _groups_of_run(uri, trust_code)
    return load_registered(uri, section, trust_code=trust_code)[0]


@dataclass(frozen=True)
class Loaded:
    """A model of the registry, or a saved one.

    Args:
        groups: Group → model.
        preparation: How its input is prepared; empty for stored input.
        source: `pipelines.data.new_samples.raw_form` of its data; empty for models of earlier versions.
    """

    groups: dict[str, GroupModel]
    preparation: dict[str, Any]
    source: dict[str, Any]


def load_registered(
    uri: str, section: TrackSection, *, trust_code: bool = False
) -> tuple[dict[str, GroupModel], dict[str, Any]]:
    """The group models of a registered model, and the preparation of their input; empty for none.

    Args:
        uri: As `load_groups`.
        section: The registry.
        trust_code: Load files that differ from those that were registered, too, and import the code of other
            packages that the model names.

    Raises:
        UserError: When there is nothing to load, or its files are not those that were registered.
    """
    found = load_whole(uri, section, trust_code=trust_code)
    return found.groups, found.preparation


def load_whole(uri: str, section: TrackSection, *, trust_code: bool = False) -> Loaded:
    """A registered model with what is recorded about its input; see `load_registered`."""
    import mlflow

    client = connect(section, create=False)
    recorded = ""
    if LOGGED.fullmatch(uri):
        recorded = _logged_tags(client, uri).get(integrity.TAG, "")
    elif uri.startswith("models:/"):
        found, _ = find(client, uri)
        uri, recorded = f"models:/{found.name}/{found.version}", found.tags.get(integrity.TAG, "")
    with temporary_folder() as folder:
        try:
            path = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
        except Exception as error:
            raise UserError(
                f"cannot load {uri}: {str(error).splitlines()[0][:200]}",
                where="MLflow registry",
                remedy="dmtg models list shows the registered models",
            ) from error
        integrity.check(path, recorded, uri, trust=trust_code)
        return _read(path, client, uri, trust_code)


def load_saved(folder: Path, *, trust_code: bool = False) -> Loaded:
    """A model that `mlflow.artifacts.download_artifacts` has saved in a local folder; see `load_registered`.

    Raises:
        UserError: When it is damaged, or has to be trained again.
    """
    return _read(folder, None, str(folder), trust_code)


def is_saved(address: str) -> bool:
    """Whether an address is a local folder with a saved model."""
    return "://" not in address and (Path(address) / "MLmodel").is_file()


def _read(path: Path, client: Any, uri: str, trust: bool) -> Loaded:
    from mlflow.models import Model

    described = Model.load(str(path / "MLmodel"))
    artifacts = path / "artifacts"
    preparation = _json_in(artifacts / "preparation.json") or {}
    with open_base(_json_in(artifacts / "base.json")) as base:
        places = artifacts.glob("*/group_*")
        groups = _loaded_from(places, _branches(client, described), uri, base, trust=trust)
    return Loaded(groups, preparation, (described.metadata or {}).get("source", {}))


def _json_in(file: Path) -> Any:
    """The contents of a JSON file; None if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _branches(client: Any, described: Any) -> int:
    """K of the network of a model: that of its run, or else the number of its groups."""
    from mlflow.exceptions import MlflowException

    groups = len((described.metadata or {}).get("grouping", ()))
    if client is None:
        return groups
    try:
        return int(client.get_run(described.run_id).data.params["network.groups"])
    except (MlflowException, KeyError):  # the run has been deleted
        return groups


def _groups_of_run(uri: str, trust: bool) -> dict[str, GroupModel]:
    run = locate(uri)
    if not (run / GROUPING).exists():
        raise UserError(
            "neither a registered model nor a finished run",
            where=uri,
            remedy="give models:/<name>/<version>, or a run folder that dmtg train has finished",
        )
    with temporary_folder() as folder:
        _fetch_models(run, folder)
        return _loaded_from(_groups_in(folder), branches_of(run), uri, trust=trust)


def _groups_in(folder: Path) -> list[Path]:
    """The folders of group models, without that of their frozen weights."""
    return [place for place in folder.iterdir() if place.name != BASE]


def _logged_tags(client: Any, uri: str) -> Mapping[str, str]:
    """The tags of a logged model; none if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        tags: dict[str, str] = client.get_logged_model(uri.rpartition("/")[2]).tags
    except MlflowException:
        return {}
    return tags


def _loaded_from(
    folders: Iterable[Path], branches: int, where: str, base: Path | None = None, *, trust: bool
) -> dict[str, GroupModel]:
    """The models of groups, in the order of their numbers; `branches`, `base` and `trust` as in `load_model`.

    Raises:
        UserError: When a model is damaged, or has to be trained again, or its frozen weights are others, or it
            needs code of another package that is missing, has changed or is not allowed.
    """
    places = sorted(folders, key=lambda place: by_number(place.name))
    try:
        return {place.name: load_model(place, branches=branches, base=base, trust_code=trust) for place in places}
    except CodeError as error:
        raise code_error(error, where) from error
    except OutdatedNetworkError as error:
        raise outdated(error, where) from error
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        lost = isinstance(error, FrozenWeightsError)
        raise UserError(
            f"a group model is damaged: {Path(name).name}: {problem}" if not lost else problem,
            where=where,
            remedy=REMEDY if lost else "put its files back, or train it again",
        ) from error


def _fetch_models(run: Location, folder: Path) -> None:
    """Copy the group models of a run and their frozen weights to a local folder."""
    for file in (run / MODELS).files():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((run / MODELS / file).read_bytes())
