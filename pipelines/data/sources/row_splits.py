"""The split of a row: a column names it, or it follows from the hash of the id or of another column."""

from __future__ import annotations

import hashlib
from typing import Self

from pydantic import model_validator

from pipelines.config.validation import Section
from pipelines.data.sources.tables.folders import SPLIT_COLUMN, split_name
from pipelines.data.sources.tables.row import AnyRow
from pipelines.errors import UserError


class SplitOptions(Section):
    """How rows are split into train, val and test.

    `split_column` names the split of each row. Without such a column, the split follows from the hash of the id,
    or of the column `split_by`. All rows with one value of `split_by` are in one split. For several rows of a
    person, a patient or a device, the test split then has only new ones, as in use.
    """

    split_column: str | None = SPLIT_COLUMN
    split_by: str | None = None

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        """Refuse two rules for the split."""
        if self.split_by is not None and self.named_split is not None:
            raise ValueError("give either split_column or split_by")
        return self

    @property
    def named_split(self) -> str | None:
        """The column of splits if the options name it, so that it is required."""
        return self.split_column if "split_column" in self.model_fields_set else None

    @property
    def split_columns(self) -> list[str]:
        """The columns that are required for the split."""
        return [name for name in (self.named_split, self.split_by) if name is not None]

    def split_key(self, row: AnyRow, row_id: str, where: str) -> str:
        """The value whose hash decides on a row without a column of splits.

        Raises:
            UserError: For an empty cell in `split_by`.
        """
        if self.split_by is None:
            return row_id
        if not row.cells[self.split_by]:
            raise UserError(
                f"no {self.split_by}, which decides on the split, {row.place}",
                where=where,
                remedy=f"fill the column {self.split_by}, or remove these rows",
            )
        return row.cells[self.split_by]

    def split_of(self, row: AnyRow, row_id: str, where: str) -> str:
        """The split of a row.

        Raises:
            UserError: For a cell that names no split, for an empty cell in `split_by`, and for a table that has
                the default column of splits beside `split_by`.
        """
        column = self.split_column
        if column is None or column not in row.cells:
            return hash_split(self.split_key(row, row_id, where))
        if self.split_by is not None:
            raise UserError(
                f"the samples have splits (column {column}), and split_by: {self.split_by} is set",
                where=where,
                remedy="remove source.options.split_by, or set source.options.split_column=null",
            )
        split = split_name(row.cells[column])
        if split is None:
            raise UserError(
                f"unknown split {row.cells[column]!r} in column {column}, {row.place}",
                where=where,
                remedy="use train, val (valid, validation, dev) or test",
            )
        return split


def hash_split(key: str) -> str:
    """70 % train, 15 % val, 15 % test, by the hash of a value alone: new samples do not move others."""
    u = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if u < 0.70 else "val" if u < 0.85 else "test"
