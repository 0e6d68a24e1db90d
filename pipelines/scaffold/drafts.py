"""Parts of a new configuration that drafts of all kinds of data share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dmtg_core.training.settings import default_schedule, table_schedule
from pipelines.data.sources.rows import table_dialect
from pipelines.scaffold.comments import Written
from pipelines.scaffold.inference import ColumnSummary, Use, chosen_targets, id_use, split_use, target, unit_use
from pipelines.storage import Location

DROPOUT = 0.1


def tasks_and_rest(
    columns: Mapping[str, ColumnSummary], given: Sequence[str], place: Location, more: bool
) -> tuple[list[Use], dict[str, ColumnSummary]]:
    """The targets, and the columns that are not targets."""
    names = chosen_targets(given, list(columns), str(place))
    tasks = [target(columns[name], str(place), more) for name in names]
    return tasks, {name: column for name, column in columns.items() if name not in names}


def row_uses(columns: Mapping[str, ColumnSummary]) -> list[Use]:
    """The split, or the column that decides on it, and the id, of those that there are; a text is no id."""
    short = {name: column for name, column in columns.items() if not column.is_text}
    split = split_use(columns)
    return [use for use in (split, None if split else unit_use(short), id_use(short)) if use is not None]


def row_options(uses: Sequence[Use], table: Location) -> tuple[Written, dict[str, str]]:
    """The options of the reader for the dialect, the id and the split, and the reason for each."""
    dialect = table_dialect(table)
    options: Written = {"dialect": dialect.options} if dialect.options else {}
    why = {"dialect": f"how the file is written: {dialect}"} if options else {}
    for use in uses:
        if use.use == "id":
            options["id_column"], why["id_column"] = use.column, use.why
        elif use.use == "split by":
            options["split_by"], why["split_by"] = use.column, use.why
        else:
            options["split_column"] = use.column if use.use == "split" else None
            why["split_column"] = use.why
    return options, why


def training_sections(
    encoder: str, stem: int, options: Written, tasks: int, rows: int, rate: float | None
) -> dict[str, Written]:
    """Settings for the size of the data: `table_schedule`, or `default_schedule` with a learning rate."""
    schedule = table_schedule(rows) if rate is None else {**default_schedule(rows), "learning_rate": rate}
    rate = schedule.pop("learning_rate")
    groups = min(max((tasks + 1) // 2, 2), 4)
    return {
        "network": {"encoder": encoder, "stem": stem, "groups": groups, "options": options},
        "gate": {"learning_rate": 0.02},
        "train": {
            **schedule,
            "optimizer": "adamw",
            "learning_rate": rate,
            "weight_decay": 0.1,
        },
    }


def of_options(why: Mapping[str, str]) -> dict[str, str]:
    """Comments of options of the reader, by the keys of the configuration."""
    return {f"source.options.{key}": text for key, text in why.items()}


def inferred_from(about: str, rows: int, more: bool) -> str:
    """The first comment of a file: its content, and the rows from which it was inferred."""
    return f"{about}. Inferred from {'the first' if more else 'all'} {rows:,} rows"
