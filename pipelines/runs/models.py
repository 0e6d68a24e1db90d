"""Reads and writes the group models of a run folder."""

from __future__ import annotations

from collections.abc import Sequence

from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.training import checkpoint
from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.runs.configuration import stored_values, unreadable
from pipelines.runs.files import CONFIG, MODELS
from pipelines.scratch import temporary_folder
from pipelines.storage import Location


def write_model(place: Location, model: GroupModel) -> None:
    """Write a group model into a local or remote folder."""
    with temporary_folder() as folder:
        checkpoint.save_model(folder, model)
        for file in sorted(folder.iterdir()):
            (place / file.name).write_bytes(file.read_bytes())


def read_model(place: Location) -> GroupModel:
    """Read a model that `write_model` has written.

    Raises:
        UserError: When a file is missing or damaged, it is not a group model, or it has to be trained again.
    """
    branches = branches_of(place.parent.parent)
    with temporary_folder() as folder:
        for name in place.files(recursive=False):
            (folder / name).write_bytes((place / name).read_bytes())
        try:
            return checkpoint.load_model(folder, branches=branches)
        except checkpoint.OutdatedNetworkError as error:
            raise outdated(error, str(place)) from error
        except ValueError as error:
            raise UserError(
                str(error).replace(str(folder), str(place)),
                where=str(place),
                remedy="give a folder models/group_<k> of a run that dmtg train has finished",
            ) from error


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
        for name in (run / MODELS).folders():
            read_model(run / MODELS / name)


def warm_start(places: Sequence[tuple[str, Location]]) -> WarmStart | None:
    """The models of some places with their names; None without places.

    Raises:
        UserError: When one of them is damaged.
    """
    if not places:
        return None
    return WarmStart([read_model(place) for _, place in places], [name for name, _ in places])
