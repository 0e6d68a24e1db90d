"""The trained models that a run starts from: found, checked, and kept in the run folder.

A run reads the places it was given once. It goes on from its own copies, so that it can be taken up again, on any
machine, when those places are gone or hold something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.runs.files import MODELS, RESULT
from pipelines.runs.models import warm_start, write_model
from pipelines.storage import Location, locate

START, LISTING = "start", "models.json"  # the listing comes last and says that all copies are there
NETWORK = "network.json"
Held = tuple[tuple[str, Location], ...]  # names and places of models


def open_models(config: Config, run: Location) -> WarmStart | None:
    """The models of `network.start_from`; None where there are none, or the run has its copies of them.

    Raises:
        UserError: For a place that holds no model, and a model that cannot be used whatever the data is.
    """
    if not config.network.start_from or (run / START / LISTING).exists():
        return None
    places = [place for uri in config.network.start_from for place in _models_at(locate(uri))]
    models = warm_start([(str(place), place) for place in places])
    assert models is not None
    with explained():
        models.check_encoder(config.encoder_spec(), config.network.groups)
    return models


def _models_at(place: Location) -> list[Location]:
    """The folder of a model itself, or those of all group models of a run."""
    if (place / NETWORK).exists():
        return [place]
    place.check_bucket()
    groups = [name for name in (place / MODELS).folders() if (place / MODELS / name / NETWORK).exists()]
    if not groups or not (place / RESULT).exists():
        found = "neither a model nor a finished run" if place.exists() else "there is no such folder"
        raise UserError(
            f"nothing to start from: {found}",
            where=str(place),
            remedy="name run folders that dmtg train has finished, or folders models/group_<k> of them",
            wrong_use=True,
        )
    return [place / MODELS / name for name in groups]


@contextmanager
def explained() -> Iterator[None]:
    """What the core refuses, as the error that the command shows."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            str(error),
            where="network.start_from",
            remedy="correct the network section, or start from other models",
            wrong_use=True,
        ) from error


def keep_models(models: WarmStart | None, run: Location) -> Held:
    """Copy into the run folder what `open_models` gave, and name all that the folder holds."""
    listing = run / START / LISTING
    if models is not None:
        for i, model in enumerate(models.models):
            write_model(run / START / str(i), model)
        listing.write_json(list(models.names))
    names = listing.read_json() if listing.exists() else []
    return tuple((name, run / START / str(i)) for i, name in enumerate(names))


def fairness_notes(config: Config, held: Held) -> list[str]:
    """What has to be known to read the gain over naive MTL of a run that starts from several models."""
    if len(held) < 2 or not config.search.baseline:
        return []
    note = f"the groups started from {len(held)} trained models, naive MTL from scratch: part of the gain is that"
    return [note]
