"""Dated data sets: a nightly run writes its own one, or uses the newest finished one up to its date."""

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

TODAY = "today"
DATE = re.compile(r"(?:[A-Za-z_]+=)?(\d{4}-\d{2}-\d{2})")  # 2026-11-25 or date=2026-11-25


@dataclass(frozen=True)
class DatedDataset:
    """A data set with its date.

    Args:
        date: Date, YYYY-MM-DD.
        shards: Address of the shards.
    """

    date: str
    shards: str


def checked_date(text: str) -> str:
    """Check a date, YYYY-MM-DD. `today`, and no date, is today in UTC.

    Raises:
        UserError: For another form of date.
    """
    if text in ("", TODAY):
        return dt.datetime.now(dt.UTC).date().isoformat()
    try:
        found = dt.date.fromisoformat(text).isoformat()
    except ValueError:
        found = ""
    if found != text:
        raise UserError(
            f"expected a date, got {text!r}",
            where="--night",
            remedy=f"write it as YYYY-MM-DD, or {TODAY}",
            wrong_use=True,
        )
    return found


def of_date(config: Config, date: str) -> Config:
    """The configuration that writes the data set of a date: its shards are `<regroup.shards>/<date>`.

    Without `data.like` the classes and the preparation are those of the newest finished data set before the date,
    so that champion and challenger can be compared.

    Raises:
        UserError: Without a source, and if `regroup.shards` is not a folder.
    """
    place = config.regroup.shards
    if config.source is None or not place or place.endswith(".json"):
        problem = "a source" if config.source is None else "a folder in regroup.shards"
        raise UserError(
            f"the data set of {date} needs {problem}",
            where=f"source, regroup.shards={place}",
            remedy="set source, and regroup.shards to the folder that holds a data set for each date",
            wrong_use=True,
        )
    others = sorted(_partitions(locate(place), place), key=_date)
    finished = [one.shards for one in others if one.date < date and (locate(one.shards) / FILE).exists()]
    prefix = "date=" if others and "=" in others[-1].shards.rsplit("/", 1)[1] else ""
    data = {"shards": f"{place.rstrip('/')}/{prefix}{date}", "like": config.data.like or "".join(finished[-1:])}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def newest(config: Config, date: str, log: Callable[[str], None]) -> DatedDataset:
    """The data set for a date.

    Without `regroup.shards` it is `data.shards`, with its content at the time.

    Raises:
        UserError: If there is no finished data set, or the listing has another form.
    """
    place = config.regroup.shards
    if not place:
        return DatedDataset(date, config.data.shards)
    folder = locate(place)
    dated = _listed(folder) if place.endswith(".json") else _partitions(folder, place)
    older = sorted((one for one in dated if one.date <= date), key=_date, reverse=True)
    for one in older:
        if (locate(one.shards) / FILE).exists():
            if one.date != date:
                log(f"note: {no_data_set(date, one.date)}")
            return one
        log(f"note: the data set of {one.date} is not finished (no {FILE}); an older one is used")
    folder.check_bucket()
    raise UserError(
        f"no finished data set up to {date} among {len(dated)} dated data sets",
        where=place,
        remedy="write it with dmtg shard --night <date>, or correct regroup.shards",
    )


def _date(one: DatedDataset) -> str:
    return one.date


def no_data_set(date: str, used: str) -> str:
    """The note of a nightly run whose date has no data set."""
    return f"there is no finished data set of {date}: the newest one before it is used, of {used}"


def _partitions(folder: Location, place: str) -> list[DatedDataset]:
    found = []
    for name in folder.folders():
        match = DATE.fullmatch(name)
        if match is not None:
            found.append(DatedDataset(match[1], f"{place.rstrip('/')}/{name}"))
    return found


def _listed(file: Location) -> list[DatedDataset]:
    if not file.exists():
        file.check_bucket()
        raise UserError("the listing does not exist", where=str(file), remedy="correct regroup.shards")
    values: Any = file.read_json()
    try:
        return [DatedDataset(checked_date(entry["date"]), entry["shards"]) for entry in values]
    except (TypeError, KeyError, UserError) as error:
        raise UserError(
            'expected a list of {"date": "YYYY-MM-DD", "shards": address}',
            where=str(file),
            remedy="correct the listing",
        ) from error
