"""Splits of buildings: from a file of the authors or of the user, or by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pipelines.data.sources.rows import SPLITS, Row, read_rows, split_name
from pipelines.errors import UserError
from pipelines.storage import Location


def split_buildings(buildings: Sequence[str]) -> dict[str, str]:
    """About 70 % of the buildings to train, 15 % to val and to test, at least one each.

    The order is that of the sha256 of the names, so it does not depend on the listing. Whole buildings are split,
    because two points of one building can show the same room.

    Args:
        buildings: At least three.
    """
    order = sorted(buildings, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held = max(1, round(0.15 * len(order)))
    names = ["val"] * held + ["test"] * held + ["train"] * (len(order) - 2 * held)
    return dict(zip(order, names, strict=True))


def read_splits(table: Location) -> dict[str, str]:
    """The split of each building in a CSV file; "" for one whose flags are all 0.

    Raises:
        UserError: For a file of neither format, or a building in two splits.
    """
    rows = list(read_rows(table, ()))
    columns = set(rows[0].cells)
    if {"building", "split"} <= columns:
        pairs = [(row.cells["building"], split_name(row.cells["split"]), row) for row in rows]
    elif {"id", *SPLITS} <= columns:
        pairs = [(row.cells["id"], _flagged(row), row) for row in rows]
    else:
        raise UserError(
            f"not a split file: its columns are {', '.join(rows[0].cells)}",
            where=str(table),
            remedy="use the columns building,split or id,train,val,test",
        )
    splits: dict[str, str] = {}
    for building, split, row in pairs:
        if split is None or splits.get(building, split) != split:
            raise UserError(
                f"building {building!r} in line {row.line} has no one split",
                where=str(table),
                remedy="give each building one of train, val, test",
            )
        splits[building] = split
    return splits


def _flagged(row: Row) -> str | None:
    flags = [row.cells[split] for split in SPLITS]
    if set(flags) - {"0", "1"} or flags.count("1") > 1:
        return None
    return SPLITS[flags.index("1")] if "1" in flags else ""
