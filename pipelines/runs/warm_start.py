"""The trained models that a run starts from: finds, checks and copies them into the run folder.

A run reads the given models only once. It resumes from its own copies, on any machine, even if the given models
have been removed or replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dmtg_core.training.warm_start import WarmStart
from pipelines.config.code import allow_named
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.runs.files import MODELS, RESULT
from pipelines.runs.models import warm_start, write_models
from pipelines.storage import Location, locate

START, LISTING = "start", "models.json"  # the listing is written last: it marks all copies as complete
NETWORK = "network.json"
Held = tuple[tuple[str, Location], ...]  # names and places of models


def open_models(config: Config, run: Location) -> WarmStart | None:
    """The models of `network.start_from`; None without any, or if the run has its copies of them.

    Raises:
        UserError: For a folder without a model, and a model that cannot be used with any data.
    """
    if not config.network.start_from or (run / START / LISTING).exists():
        return None
    places = [place for uri in config.network.start_from for place in _models_at(locate(uri))]
    allow_named(config.model_dump())
    models = warm_start([(str(place), place) for place in places], trust_code=config.run.trust_code)
    assert models is not None
    with warm_start_errors():
        models.check_encoder(config.encoder_spec(), config.network.groups)
    return models


def _models_at(place: Location) -> list[Location]:
    """The folders of the models of a place: the place itself, or all group models of a run."""
    if (place / NETWORK).exists():
        return [place]
    place.check_bucket()
    groups = [name for name in (place / MODELS).folders() if (place / MODELS / name / NETWORK).exists()]
    if not groups or not (place / RESULT).exists():
        found = "neither a model nor a finished run" if place.exists() else "there is no such folder"
        raise UserError(
            f"nothing to start from: {found}",
            where=str(place),
            remedy="name run folders that dmtg train has finished, or folders models/group_<k> in them",
            wrong_use=True,
        )
    return [place / MODELS / name for name in groups]


@contextmanager
def warm_start_errors() -> Iterator[None]:
    """Convert a ValueError of `dmtg_core` to the error for the user."""
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
    """Copy the models of `open_models` into the run folder; names and places of all copies there."""
    listing = run / START / LISTING
    if models is not None:
        write_models(run / START, {str(i): model for i, model in enumerate(models.models)})
        listing.write_json(list(models.names))
    names = listing.read_json() if listing.exists() else []
    return tuple((name, run / START / str(i)) for i, name in enumerate(names))


def baseline_notes(config: Config, held: Held) -> list[str]:
    """A note on the gain over naive MTL, for a run that starts from several models."""
    if len(held) < 2 or not config.search.baseline:
        return []
    return [
        f"the groups started from {len(held)} trained models, naive MTL from scratch: this is part of the gain"
    ]
