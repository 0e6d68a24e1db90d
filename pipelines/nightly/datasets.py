"""Which data a nightly job takes: the newest finished data set that is not of a later date than the night."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.config.loading import Config
from pipelines.data.manifest import FILE
from pipelines.errors import UserError
from pipelines.storage import Location, locate

DATED = re.compile(r"(?:[A-Za-z_]+=)?(\d{4}-\d{2}-\d{2})")  # 2026-11-25, or a partition date=2026-11-25


@dataclass(frozen=True)
class Dated:
    """A data set and its date, ISO."""

    date: str
    shards: str


def checked_night(text: str) -> str:
    """A date as YYYY-MM-DD; today's in UTC where there is none.

    Raises:
        UserError: For anything else.
    """
    if not text:
        return dt.datetime.now(dt.UTC).date().isoformat()
    try:
        found = dt.date.fromisoformat(text).isoformat()
    except ValueError:
        found = ""
    if found != text:
        raise UserError(
            f"expected a date, got {text!r}",
            where="--night",
            remedy="write it as YYYY-MM-DD",
            wrong_use=True,
        )
    return found


def newest(config: Config, night: str, log: Callable[[str], None]) -> Dated:
    """The data set of a night.

    Without `regroup.shards` it is `data.shards`, whatever it holds then.

    Raises:
        UserError: When there is no finished data set, or the listing is not one.
    """
    place = config.regroup.shards
    if not place:
        return Dated(night, config.data.shards)
    folder = locate(place)
    every = _listed(folder) if place.endswith(".json") else _partitions(folder, place)
    older = sorted((one for one in every if one.date <= night), key=lambda one: one.date, reverse=True)
    for one in older:
        if (locate(one.shards) / FILE).exists():
            if one.date != night:
                log(f"note: the newest data is of {one.date}, the night is {night}")
            return one
        log(f"note: the data set of {one.date} is not finished (no {FILE}); an older one is taken")
    folder.check_bucket()
    raise UserError(
        f"no finished data set up to {night}, of {len(every)} with a date",
        where=place,
        remedy="make one with dmtg shard into a folder <date> or date=<date> there, or correct regroup.shards",
    )


def _partitions(folder: Location, place: str) -> list[Dated]:
    found = []
    for name in folder.folders():
        match = DATED.fullmatch(name)
        if match is not None:
            found.append(Dated(match[1], f"{place.rstrip('/')}/{name}"))
    return found


def _listed(file: Location) -> list[Dated]:
    if not file.exists():
        file.check_bucket()
        raise UserError("there is no such listing", where=str(file), remedy="correct regroup.shards")
    values: Any = file.read_json()
    try:
        return [Dated(checked_night(entry["date"]), entry["shards"]) for entry in values]
    except (TypeError, KeyError, UserError) as error:
        raise UserError(
            'expected a list of {"date": "YYYY-MM-DD", "shards": address}',
            where=str(file),
            remedy="correct the listing",
        ) from error
