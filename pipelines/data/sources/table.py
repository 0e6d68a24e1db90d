"""Reader of tables with several targets: a CSV file, a Parquet file or a folder of Parquet files.

Columns that are neither target, id nor split are features: numbers, and categories with one feature for each
value. One column can hold molecules instead, written as SMILES. An empty cell (in Parquet also null and NaN) is
missing, both in a label and in a feature. A table of more than `columns.HELD_ROWS` rows is not held in memory: it
is read once for the samples and once or twice each for the labels and the features.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dmtg_core.input_spec import InputSpec
from dmtg_core.names import listed
from dmtg_core.tables.categories import ColumnError
from dmtg_core.tables.cells import MISSING
from dmtg_core.tables.features import TableInput, TableRules, table_input
from pipelines.config.validation import checked
from pipelines.data.preprocessing import load_preparation
from pipelines.data.sources.base import Entry
from pipelines.data.sources.columns import Replayed, RowsOf, TrainingCells
from pipelines.data.sources.labels import (
    LabelTask,
    Target,
    kept_rows,
    label_markers,
    label_targets,
    without_markers,
)
from pipelines.data.sources.preprocessed import PreparedSource
from pipelines.data.sources.row_splits import SplitOptions
from pipelines.data.sources.rows import (
    MOST_NAMES,
    Dialect,
    DialectOptions,
    Row,
    read_rows,
    table_dialect,
    with_ids,
)
from pipelines.errors import UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)

WIDE = 10_000  # features of a sample above which a warning is logged
REMEDIES = {  # option of a `ColumnError` → what the options of the reader can do
    "features": " in the table, or remove it from features",
    "categorical": " from features, or add it to categorical",
    "max_values": " from features, or set a larger source.options.max_values",
}


class TableOptions(SplitOptions):
    """The table, the targets and the features.

    `file` is below the root; empty if the root is the table itself. Without `id_column`, the number of a row is
    its id. Without a split column, the split follows from the hash of the id, or of the column `split_by`: all
    rows with the same value of it are in one split. `dialect` says how a table of text is written; what it does
    not say is found in the file. `features` are "all" remaining columns, or a list; the column `split_by` is one
    only in a list. A column of dates becomes numbers: days since the first one, year, month, day, weekday, day of
    the year and, with times, hour. Without `categorical`, another feature is a category if less than half of its
    training cells are numbers, or if they are digits with leading zeros, such as postcodes; with it, the features
    that it does not name are numbers. `missing` are markers of an empty cell.

    A category of more than 100 values is hashed to 256 features, unless most of its rows have values of one or two
    rows. With `max_values`, no category is hashed, and one of more values is refused. `scaling` is that of
    numbers: "standard" (zero mean, unit deviation), "robust" (zero median, unit interquartile range) or "quantile"
    (to a normal distribution, by quantiles of the training rows).

    `smiles` names a column of molecules. `molecule_features`: "descriptors" (rdkit's, such as mass, polar surface
    and number of rings, which are numbers), "morgan" (rdkit's fingerprint of `radius` and `bits`) or "ngrams"
    (counts of 1 to `longest` neighbouring characters, hashed to `bits` features). Descriptors stand beside the
    other `features`, whether or not these name the column. Fingerprints and n-grams are the only input.
    """

    file: str = ""
    id_column: str | None = None
    dialect: DialectOptions = DialectOptions()
    tasks: tuple[LabelTask, ...] = Field(min_length=1)
    features: Literal["all"] | tuple[str, ...] = "all"
    categorical: tuple[str, ...] | None = None
    missing: tuple[str, ...] = MISSING
    max_values: int | None = Field(None, ge=2)
    scaling: Literal["standard", "quantile", "robust"] = "standard"
    smiles: str | None = None
    molecule_features: Literal["ngrams", "morgan", "descriptors"] = "ngrams"
    bits: int = Field(2048, ge=16)
    longest: int = Field(4, ge=1)
    radius: int = Field(2, ge=0)

    @property
    def vectors(self) -> bool:
        """Whether fingerprints or n-grams of molecules are the only input."""
        return self.smiles is not None and self.molecule_features != "descriptors"

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        """Refuse options that would be ignored."""
        unused = {"molecule_features", "bits", "longest", "radius"}
        if self.vectors:
            unused = {"features", "categorical", "max_values", "scaling"}
            unused |= {"radius"} if self.molecule_features == "ngrams" else {"longest"}
        elif self.smiles is not None:
            unused = {"bits", "longest", "radius"}
        for option in sorted(unused & self.model_fields_set):
            raise ValueError(f"{option} has no meaning {'with' if self.smiles else 'without'} these molecules")
        return self


class TableSource(PreparedSource):
    """Reads a table. See `TableOptions` for the options.

    Raises:
        UserError: For a wrong option, a table that does not exist, and a library that is not installed.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(TableOptions, options, "source.options")
        self._table = root / self._options.file if self._options.file else root
        if not self._table.exists():
            raise UserError(
                "the table does not exist",
                where=str(self._table),
                remedy="correct source.root and source.options.file: CSV, Parquet or a folder of Parquet",
            )
        if self._options.molecule_features != "ngrams" and importlib.util.find_spec("rdkit") is None:
            raise UserError(
                f"molecule_features={self._options.molecule_features} needs rdkit, which is not installed",
                where="source.options.molecule_features",
                remedy="pip install 'dmtg[molecules]', or use ngrams",
            )

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        return (self._table,)

    @cached_property
    def _entries(self) -> Replayed[Entry]:
        return Replayed(self._listed)

    def _listed(self, first: bool) -> Iterator[Entry]:
        options, where = self._options, str(self._table)
        words = [name for name in (options.id_column, options.split_by, options.smiles) if name is not None]
        rows = read_rows(self._table, self._named_columns(), dialect=self._dialect, words=words)
        rows = without_markers(rows, self._markers, frozenset(options.missing))
        needed: list[str] = []
        for row, name in kept_rows(with_ids(rows, options.id_column, "", where), options.tasks, where, log=first):
            needed = needed or [*(task.column for task in options.tasks), *self._feature_columns(row)]
            cells = {column: row.cells[column] for column in needed}
            split = options.split_of(row, name, where)
            yield Entry(name, split, {"row": Row(row.line, cells, row.unit)})

    @cached_property
    def _dialect(self) -> Dialect:
        return table_dialect(self._table, self._options.dialect, columns=self._named_columns(), log=True)

    @property
    def _markers(self) -> dict[str, frozenset[str]]:
        """Column → markers of missing values, for columns whose markers are not those of the features."""
        options = self._options
        kept = dict.fromkeys((options.id_column, options.split_column, options.split_by), frozenset[str]())
        given = options.missing if "missing" in options.model_fields_set else None
        return {name: marks for name, marks in kept.items() if name} | label_markers(options.tasks, given)

    def _named_columns(self) -> list[str]:
        """The columns that the options name; they are required."""
        options = self._options
        listed = () if options.features == "all" else options.features
        single = [name for name in (options.id_column, options.smiles) if name is not None]
        targets = (task.column for task in options.tasks)
        every = [*single, *options.split_columns, *targets, *listed, *(options.categorical or ())]
        return list(dict.fromkeys(every))

    def _feature_columns(self, row: Row) -> list[str]:
        """The columns of the input, in the order of the file or of the list."""
        options = self._options
        taken = {task.column for task in options.tasks} | {options.id_column, options.split_column}
        if options.vectors:
            chosen = [str(options.smiles)]
        elif options.features == "all":
            chosen = [name for name in row.cells if name not in taken | {options.split_by}]
        else:
            chosen = list(options.features)
            if options.smiles is not None and options.smiles not in chosen:
                chosen = [options.smiles, *chosen]
        problem = _problem(chosen, taken, options)
        if problem:
            raise UserError(
                problem, where="source.options", remedy="correct the columns of the input", wrong_use=True
            )
        return chosen

    @cached_property
    def _targets(self) -> tuple[Target, ...]:
        return label_targets(self._options.tasks, RowsOf(self._entries), str(self._table))

    @cached_property
    def _input(self) -> tuple[InputSpec, Mapping[str, Any]]:
        options = self._options
        if options.vectors:
            return self._vectors()
        cells = next(iter(self._entries)).fields["row"].cells
        columns = [column for column in cells if column not in self._target_columns]
        rules = TableRules(
            categorical=options.categorical, molecules=(options.smiles,) if options.smiles else (),
            missing=options.missing, marks=self._dialect.marks, max_values=options.max_values,
            scaling=options.scaling,
        )  # fmt: skip
        try:
            found = table_input(TrainingCells(RowsOf(self._entries)), columns, rules)
        except ColumnError as error:
            remedy = f"{error.remedy}{REMEDIES.get(error.option, '')}"
            raise UserError(error.what, where=str(self._table), remedy=remedy) from error
        self._outliers = found.outliers
        _log_features(str(self._table), found)
        return found.spec, found.preparation

    @property
    def _remarks(self) -> Sequence[str]:
        return vars(self).get("_outliers", ())

    @property
    def _target_columns(self) -> set[str]:
        return {task.column for task in self._options.tasks}

    def _vectors(self) -> tuple[InputSpec, Mapping[str, Any]]:
        options = self._options
        preparation: dict[str, Any] = {"kind": "smiles", "column": options.smiles, "bits": options.bits}
        preparation |= {"features": options.molecule_features}
        if options.molecule_features == "morgan":
            preparation |= {"radius": options.radius, "library": f"rdkit {version('rdkit')}"}
        else:
            preparation |= {"longest": options.longest}
        how = load_preparation(preparation)
        return InputSpec("features", (options.bits,), str(how.row(how.example()).dtype)), preparation


def _problem(chosen: Sequence[str], taken: set[str | None], options: TableOptions) -> str:
    """The problem of the input columns; empty if there is none."""
    if not chosen:
        return "no column is left for the input"
    twice = sorted(name for name, count in Counter(chosen).items() if count > 1)
    if twice:
        return f"features names {listed(twice)} more than once"
    both = [name for name in chosen if name in taken]
    if both:
        return f"{listed(both)} cannot be a feature: it is a target, the id or the split"
    categorical = options.categorical or ()
    if options.smiles in categorical:
        return f"categorical names {options.smiles}, the molecules"
    lost = [name for name in categorical if name not in chosen]
    return f"categorical names {listed(lost)}, which is not a feature" if lost else ""


def _log_features(where: str, found: TableInput) -> None:
    for column, formats in found.ambiguous.items():
        logger.warning(
            "%s: the dates of column %s can be read in several ways (%s): write them as yyyy-mm-dd",
            where, column, ", ".join(formats),
        )  # fmt: skip
    for sentence in found.hashed:
        logger.info("%s: %s; for a feature for each value, set source.options.max_values", where, sentence)
    if found.constants:
        logger.warning("%s: left out, constant in training: %s", where, listed(found.constants, MOST_NAMES))
    features = found.preparation["features"]
    for kind, plural, types in (
        ("number", "numbers", ("number",)),
        ("date", "dates", ("date",)),
        ("category", "categories", ("category", "hashed")),
        ("molecule", "molecules", ("molecule",)),
    ):
        names = [feature["column"] for feature in features if feature["type"] in types]
        if names:
            what = f"1 feature is a {kind}" if len(names) == 1 else f"{len(names)} features are {plural}"
            logger.info("%s: %s: %s", where, what, listed(names, MOST_NAMES))
    if (size := found.spec.shape[0]) > WIDE:
        memory = size * 4 // 1024
        logger.warning("%s: %d features, %d KiB for each sample: set data.compression=lz4", where, size, memory)
