"""What results belong to: a configuration, the data that it was used on, and the version of the code.

The folder of a run, a sweep, a comparison or a grouping signal records it. Nothing is continued or shown under
another identity: the same configuration on other data has a folder of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.runs.configuration import stored_values, unreadable
from pipelines.runs.files import CONFIG, IDENTITY, PROFILE, REPORT, RESULT, TRACKING
from pipelines.runs.folders import check_folder
from pipelines.storage import Location, locate

SIGNAL = "signal.json"
FORMAT = 3  # of the code whose results are comparable: raise it when the same data gives other figures
OWN = (TRACKING, PROFILE, REPORT)  # in a folder of an earlier version without a record, or of `train --profile`
FINISHED = (RESULT, "sweep.json", "compare.json", SIGNAL)


def folder_name(config: Config, what: str) -> str:
    """The folder of a comparison or a grouping signal; its name follows from the digest of the configuration."""
    return f"{config.name}-{what}-{config.digest()}"


def earlier_signal(config: Config, data: str) -> dict[str, Any]:
    """The content of `signal.json` with the same configuration and data; empty if it has not been run.

    Args:
        config: The configuration.
        data: Data digest; empty if it is unknown.
    """
    base = locate(config.run.root) / folder_name(config, "signal")
    file = (_own(base, config, data) if data and not _belongs(base, data) else base) / SIGNAL
    # earlier versions drew no conclusion that takes intervals into account
    return {"conclusion": "unclear", **file.read_json()} if file.exists() else {}


def earlier_verdict(config: Config, data: str) -> str:
    """The text of `earlier_signal`; empty if it has not been run."""
    return str(earlier_signal(config, data).get("verdict", ""))


def earlier_conclusion(config: Config, data: str) -> str:
    """The conclusion of `earlier_signal`; empty if it has not been run."""
    return str(earlier_signal(config, data).get("conclusion", ""))


def open_run(config: Config) -> Location:
    """The run folder of a configuration.

    Raises:
        UserError: When it cannot be written to, holds other contents, or belongs to another configuration.
    """
    run = locate(config.run.root) / config.run_name()
    check_folder(run, "run.root, run.name", "a run", lambda: _recorded(run), OWN)
    run.check_writable()
    run = run.retrying()
    if (run / CONFIG).exists() and _stored_digest(run) != config.digest():
        raise UserError(
            "this run folder belongs to another configuration",
            where=str(run / CONFIG),
            remedy="give another run.name, or leave it out: the name then follows from the configuration",
            wrong_use=True,
        )
    return run


def _recorded(run: Location) -> bool:
    return (run / IDENTITY).exists() or (run / CONFIG).exists()


def _stored_digest(run: Location) -> str:
    """Digest of a stored configuration.

    The sections compare and sweep are no part of the digest. They are not read, because their keys and methods had
    other names in earlier versions.
    """
    stored = stored_values(run)
    kept = {name: section for name, section in stored.items() if name not in ("compare", "sweep")}
    try:
        return checked(Config, kept).digest()
    except UserError as error:
        raise unreadable(run, error.what) from error


def results_folder(
    config: Config, base: Location, data: str, log: Callable[[str], None], *, named: bool, reuse: bool = False
) -> Location:
    """The folder of the results of a configuration on a data set.

    It is the folder that the configuration names, or if that belongs to other data, one beside it.

    Args:
        config: The configuration.
        base: Result of `open_run`.
        data: Digest of the data.
        log: Called with a line if the folder is not `base`.
        named: Whether the user has named the folder: another one would be a surprise.
        reuse: Whether finished results of other data are wanted.

    Raises:
        UserError: If the folder belongs to other data and the user has named it.
    """
    if _belongs(base, data):
        return base
    finished = any((base / name).exists() for name in FINISHED)
    was = f"{base.name} was trained on other data ({_held(base).get('data')}; now {data})"
    if reuse and finished:
        log(f"note: {was}: its results are used")
        return base
    if named:
        shown = ", or see its results with --reuse" if finished else ""
        raise UserError(
            was,
            where=str(base),
            remedy=f"give another run.name, or leave it out to train again in a folder of its own{shown}",
            wrong_use=True,
        )
    own = _own(base, config, data)
    log(f"{was}: {'trained again' if finished else 'not continued, but trained from scratch'} in {own}")
    check_folder(own, "run.root", "a run", lambda: _recorded(own), OWN)
    own.check_writable()
    return own


def _own(base: Location, config: Config, data: str) -> Location:
    """The folder of a configuration on data other than those of `base`."""
    text = f"{config.digest()} {data} {FORMAT}"
    return base.parent / f"{base.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _belongs(folder: Location, data: str) -> bool:
    """Whether the results of a folder, if there are any, belong to the data and this version."""
    held = _held(folder)
    return held.get("data") in (None, data) and held.get("format", FORMAT) == FORMAT


def data_of(folder: Location) -> str:
    """The data digest of the results of a folder; empty if it is unknown."""
    return str(_held(folder).get("data") or "")


def _held(folder: Location) -> dict[str, Any]:
    """What a folder belongs to; of folders of earlier versions only the tracking note has the data digest."""
    if (folder / IDENTITY).exists():
        held: dict[str, Any] = (folder / IDENTITY).read_json()
        return held
    note = folder / TRACKING
    return {"data": note.read_json().get("data_digest")} if note.exists() else {}


def record_identity(folder: Location, config: Config, data: str, preparation: Any = None) -> None:
    """Record what the results of a folder belong to, before there are any.

    Args:
        folder: The folder.
        config: The configuration.
        data: Digest of the data.
        preparation: How the input of its models is prepared; see `Description.preparation`.
    """
    values = {"config": config.digest(), "data": data, "format": FORMAT, "preparation": preparation or {}}
    if not (folder / IDENTITY).exists():
        (folder / IDENTITY).write_json(values)


def preparation_of(run: Location) -> dict[str, Any] | None:
    """How the input of the models of a run is prepared; None for a run of an earlier version."""
    held = (run / IDENTITY).read_json() if (run / IDENTITY).exists() else {}
    found: dict[str, Any] | None = held.get("preparation")
    return found


def source_of(run: Location) -> dict[str, Any]:
    """Kind and options of the raw data of a run; empty if its configuration does not name them."""
    values = stored_values(run) if (run / CONFIG).exists() else {}
    found: dict[str, Any] = values.get("source") or {}
    return found
