"""Reads and writes the group models of a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dmtg_core.addresses import CodeError
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
from dmtg_core.training import checkpoint
from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.runs.configuration import stored_values, unreadable
from pipelines.runs.files import CONFIG, MODELS
from pipelines.scratch import temporary_folder
from pipelines.storage import Location

RESTORE = "put the frozen weights back as they were, or train again"


def write_models(place: Location, models: Mapping[str, GroupModel]) -> None:
    """Write group models into sub-folders, and the frozen weights that they share into the sub-folder `BASE`."""
    with_base = [model.network for model in models.values() if checkpoint.keeps_base(model.network)]
    for network in with_base[:1]:
        write_base(place / checkpoint.BASE, network)
    for name, model in models.items():
        write_model(place / name, model)


def write_base(place: Location, network: GroupingNetwork) -> None:
    """Write the frozen weights of a network, unless the folder has them."""
    described = place / checkpoint.BASE_FILE
    if described.exists() and described.read_json().get("digest") == network.frozen_digest:
        return
    with temporary_folder() as folder:
        checkpoint.save_base(folder, network)
        _copy_files(folder, place)


def write_model(place: Location, model: GroupModel) -> None:
    """Write a group model into a local or remote folder, without frozen weights that came from files."""
    with temporary_folder() as folder:
        checkpoint.save_model(folder, model)
        _copy_files(folder, place)


def _copy_files(folder: Path, place: Location) -> None:
    for file in sorted(folder.iterdir(), reverse=True):  # the description of frozen weights comes after them
        (place / file.name).write_bytes(file.read_bytes())


def group_names(place: Location) -> list[str]:
    """The names of the group models of a folder."""
    return [name for name in place.folders() if name != checkpoint.BASE]


def read_model(place: Location, *, trust_code: bool = False) -> GroupModel:
    """Read a model that `write_model` has written, with the frozen weights beside it.

    Args:
        place: Folder of the model.
        trust_code: As `dmtg_core.training.checkpoint.load_network`.

    Raises:
        UserError: When a file is missing or damaged, it is not a group model, it has to be trained again, or its
            frozen weights are missing or have changed.
    """
    branches = branches_of(place.parent.parent)
    with temporary_folder() as scratch:
        folder = scratch / place.name
        folder.mkdir()
        for name in place.files(recursive=False):
            (folder / name).write_bytes((place / name).read_bytes())
        try:
            base = _base_beside(place, scratch)
            return checkpoint.load_model(folder, branches=branches, base=base, trust_code=trust_code)
        except CodeError as error:
            raise code_error(error, str(place)) from error
        except checkpoint.OutdatedNetworkError as error:
            raise outdated(error, str(place)) from error
        except ValueError as error:
            lost = isinstance(error, checkpoint.FrozenWeightsError)
            raise UserError(
                str(error).replace(str(scratch), str(place.parent)),
                where=str(place),
                remedy=RESTORE if lost else "give a folder models/group_<k> of a run that dmtg train has finished",
            ) from error


def _base_beside(place: Location, scratch: Path) -> Path | None:
    """The frozen weights beside a model, on this machine; None without any."""
    base = place.parent / checkpoint.BASE
    if base.local is not None:
        return base.local if base.exists() else None
    for name in base.files(recursive=False):
        target = scratch / checkpoint.BASE / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((base / name).read_bytes())
    return None  # it is beside the local copy of the model


def branches_of(run: Location) -> int:
    """K of the network of a run; 1 without a configuration in its folder.

    Raises:
        UserError: If its configuration is damaged.
    """
    values = stored_values(run) if (run / CONFIG).exists() else {}
    try:
        return int(values.get("network", {}).get("groups", 1))
    except (AttributeError, TypeError, ValueError) as error:
        raise unreadable(run, "network.groups is no number") from error


def code_error(error: CodeError, where: str) -> UserError:
    """The error for the user of a network that needs code of another package."""
    return UserError(error.problem, where=where, remedy=error.remedy)


def outdated(error: checkpoint.OutdatedNetworkError, where: str) -> UserError:
    """The error for the user of a network that an earlier version trained wrongly."""
    return UserError(
        str(error).partition(": ")[2], where=where, remedy="train it again with dmtg train and another run.name"
    )


def check_models(config: Config, run: Location) -> None:
    """Check that no group model of a run folder is one that an earlier version trained wrongly.

    Raises:
        UserError: For the first such model.
    """
    if config.network.groups > checkpoint.CORRECT_UP_TO:
        for name in group_names(run / MODELS):
            read_model(run / MODELS / name, trust_code=config.run.trust_code)


def warm_start(places: Sequence[tuple[str, Location]], *, trust_code: bool = False) -> WarmStart | None:
    """The models of some places with their names; None without places. `trust_code` as for `read_model`.

    Raises:
        UserError: When one of them is damaged.
    """
    if not places:
        return None
    models = [read_model(place, trust_code=trust_code) for _, place in places]
    return WarmStart(models, [name for name, _ in places])
