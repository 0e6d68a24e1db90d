"""Reader of texts with several labels: one file for each split, or one file with a split column.

```
root/train.tsv, root/dev.tsv, root/test.tsv     text <tab> label ids, separated by commas <tab> id
root/labels.txt                                 one name on each line, from label 0: one binary task each
```

In place of label ids, label columns can be tasks, as in a table. A tokenizer is trained on the texts of the
training split, or read from a file. More than `columns.HELD_ROWS` texts are not held in memory: the files are read
again for each pass.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task, check_names
from pipelines.config.validation import checked
from pipelines.data.sources.base import BadSampleError, Column, Entry
from pipelines.data.sources.columns import Replayed, RowsOf
from pipelines.data.sources.labels import (
    LabelTask,
    kept_rows,
    label_markers,
    label_targets,
    without_markers,
)
from pipelines.data.sources.preprocessed import PreparedSource, RowTarget, train_cells
from pipelines.data.sources.row_splits import SplitOptions
from pipelines.data.sources.rows import (
    Dialect,
    DialectOptions,
    Row,
    check_root,
    read_rows,
    table_dialect,
    with_ids,
)
from pipelines.data.sources.tokens import load_tokenizer, train_tokenizer
from pipelines.errors import UserError
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)

ENCODED = 1000  # texts that are encoded at a time


class TextOptions(SplitOptions):
    """The texts, the labels and the tokenizer.

    Either `files` names a file for each split, or `file` names one file, with the splits in `split_column` or by
    the hash of the id, or of the column `split_by`: all rows with the same value of it are in one split. Names
    that end with `.tsv` are read with tabs and without quotes, others as CSV or Parquet; `dialect` says how they
    are written. `columns` names the columns of a file without a header line. Without `id_column`, the id of a row
    is its file and number.

    Labels are columns (`tasks`), or ids in `labels_column` with one binary task each; `labels_file` has the names
    of the labels, and all tasks have one `metric`, `loss` and `loss_options`. An empty cell is a missing label.

    `tokenizer` is "bpe" (byte pairs), trained with up to `vocabulary` tokens, on lower-cased text if `lowercase`
    is set; or the path of a tokenizer.json, below the root or absolute. A text is truncated to `length` tokens.
    """

    files: dict[Literal["train", "val", "test"], str] | None = None
    file: str = ""
    columns: tuple[str, ...] | None = Field(None, min_length=1)
    text_column: str = "text"
    id_column: str | None = None
    dialect: DialectOptions = DialectOptions()
    tasks: tuple[LabelTask, ...] = ()
    labels_column: str | None = None
    labels_file: str = "labels.txt"
    metric: str = ""
    loss: str = ""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    tokenizer: str = Field("bpe", pattern=r"^(bpe|.+\.json)$")
    vocabulary: int = Field(8000, ge=300)
    lowercase: bool = True
    length: int = Field(48, ge=1)

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        """Refuse several sources of the texts or of the labels, and options that would be ignored."""
        if (self.files is None) == (not self.file):
            raise ValueError("give either files (one for each split) or file")
        if (self.labels_column is None) == (not self.tasks):
            raise ValueError("give either labels_column or tasks")
        unused = {"split_column", "split_by"} if self.files else set()
        unused |= set() if self.labels_column else {"labels_file", "metric", "loss", "loss_options"}
        unused |= {"vocabulary", "lowercase"} if self.tokenizer.endswith(".json") else set()
        for option in sorted(unused & self.model_fields_set):
            raise ValueError(f"{option} has no meaning beside the other options")
        return self


@dataclass(frozen=True)
class LabelId:
    """The binary task of one label id: 1 if the ids of a row include it."""

    task: Task
    column: str
    number: int
    count: int

    @property
    def stored(self) -> Column:
        """Storage of a flag."""
        return Column("uint8")

    def value(self, row: Row) -> np.ndarray | None:
        """Whether the row has the label; None if its cell of ids is empty.

        Raises:
            BadSampleError: For a value that is not a label id.
        """
        cell = row.cells[self.column]
        if not cell:
            return None
        ids = [part.strip() for part in cell.split(",")]
        for part in ids:
            if not (part.isascii() and part.isdigit() and int(part) < self.count):
                raise BadSampleError(
                    f"{part!r} is not a label id from 0 to {self.count - 1} in column {self.column}, {row.place}"
                )
        return np.asarray(self.number in map(int, ids), np.uint8)


class TextSource(PreparedSource):
    """Reads texts. See `TextOptions` for the options.

    Raises:
        UserError: For a wrong option, and for a root that does not exist.
    """

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(TextOptions, options, "source.options")
        self._root = root
        files = list((self._options.files or {}).values()) or [self._options.file]
        check_root(root, ", ".join(files))

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        options = self._options
        files = [self._root / name for name in list((options.files or {}).values()) or [options.file]]
        files += [self._root / options.labels_file] if options.labels_column else []
        return files + ([self._tokenizer_file] if options.tokenizer.endswith(".json") else [])

    @property
    def _tokenizer_file(self) -> Location:
        name = self._options.tokenizer
        return locate(name) if name.startswith("/") or "://" in name else self._root / name

    @cached_property
    def _entries(self) -> Replayed[Entry]:
        return Replayed(self._listed)

    def _listed(self, first: bool) -> Iterator[Entry]:
        options = self._options
        if options.files is None:
            yield from self._entries_of(options.file, None, first)
        for split, file in (options.files or {}).items():
            yield from self._entries_of(file, split, first)

    def _entries_of(self, file: str, split: str | None, first: bool) -> Iterator[Entry]:
        """The samples of one file; `split` is that of the whole file, or None."""
        options, location = self._options, self._root / file
        labels = [options.labels_column] if options.labels_column else [task.column for task in options.tasks]
        needed = list(dict.fromkeys([options.text_column, *labels]))
        extra = [options.id_column, *options.split_columns]
        columns = [*needed, *(name for name in extra if name and name not in needed)]
        kept = (options.text_column, options.id_column, options.labels_column, options.split_by)
        rows = read_rows(
            location,
            columns,
            dialect=self._dialect_of(file, columns),
            header=options.columns,
            words=[name for name in kept if name is not None],
        )
        rows = without_markers(rows, label_markers(options.tasks))
        named_rows = with_ids(rows, options.id_column, f"{file}:", str(location))
        for row, name in kept_rows(named_rows, options.tasks, str(location), log=first):
            cells = {column: row.cells[column] for column in needed}
            place = split or options.split_of(row, name, str(location))
            yield Entry(name, place, {"row": Row(row.line, cells, f"{file}, {row.unit}")})

    @cached_property
    def _dialects(self) -> dict[str, Dialect]:
        return {}

    def _dialect_of(self, file: str, columns: Sequence[str]) -> Dialect:
        """How a file is written: cells of a `.tsv` file have no quotes around them, unless the options say so."""
        given, named = self._options.dialect, self._options.columns is None
        if file.lower().endswith(".tsv"):
            given = DialectOptions(delimiter="\t", quotes="").model_copy(
                update=given.model_dump(exclude_unset=True)
            )
        if file not in self._dialects:
            found = table_dialect(self._root / file, given, columns=columns, named=named, log=True)
            self._dialects[file] = found
        return self._dialects[file]

    @cached_property
    def _targets(self) -> Sequence[RowTarget]:
        options = self._options
        if options.labels_column is None:
            return label_targets(options.tasks, RowsOf(self._entries), str(self._root))
        names = self._label_names()
        try:
            chosen: dict[str, Any] = options.model_dump(include={"metric", "loss", "loss_options"})
            tasks = [Task(name, "binary", **chosen) for name in names]
            check_names(tasks)
        except ValueError as error:
            raise UserError(
                str(error),
                where=str(self._root / options.labels_file),
                remedy="correct the labels, the metric or the loss",
            ) from error
        return [LabelId(task, options.labels_column, i, len(names)) for i, task in enumerate(tasks)]

    def _label_names(self) -> list[str]:
        location = self._root / self._options.labels_file
        try:
            names = location.read_text().splitlines()
        except FileNotFoundError as error:
            raise UserError(
                "the file of label names does not exist",
                where=str(location),
                remedy="set source.options.labels_file: one name on each line, from label 0",
            ) from error
        empty = [str(number) for number, name in enumerate(names, start=1) if not name.strip()]
        if empty or not names:
            raise UserError(
                f"no label name in line {', '.join(empty[:5]) or '1'}",
                where=str(location),
                remedy="write one name on each line, from label 0",
            )
        return [name.strip() for name in names]

    @cached_property
    def _input(self) -> tuple[InputSpec, Mapping[str, Any]]:
        options = self._options
        if options.tokenizer.endswith(".json"):
            tokenizer = load_tokenizer(self._tokenizer_file, options.length)
        else:
            texts = train_cells(self._entries, options.text_column)
            tokenizer = train_tokenizer(texts, options.vocabulary, options.length, lowercase=options.lowercase)
        # the highest id determines the size: a tokenizer from a file may omit ids
        vocabulary = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        dtype = "uint16" if vocabulary <= 65536 else "int32"
        self._log_tokens(tokenizer, vocabulary)
        preparation = {
            "kind": "text",
            "column": options.text_column,
            "dtype": dtype,
            "tokenizer": json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")),
        }
        padding = tokenizer.padding["pad_id"]
        return InputSpec("tokens", (options.length,), dtype, vocabulary=vocabulary, padding=padding), preparation

    def _log_tokens(self, tokenizer: Any, vocabulary: int) -> None:
        """Log how many training texts are truncated."""
        texts, count, cut = train_cells(self._entries, self._options.text_column), 0, 0
        while some := list(islice(texts, ENCODED)):
            count += len(some)
            cut += sum(bool(found.overflowing) for found in tokenizer.encode_batch(some))
        logger.info(
            "%s: %d tokens in the vocabulary; %d of %d training texts are longer than length=%d and are truncated",
            self._root, vocabulary, cut, count, self._options.length,
        )  # fmt: skip
