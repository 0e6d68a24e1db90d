"""Reader of tables with images in a column: Parquet, Delta, and folders of Hugging Face's `datasets`.

`pipelines.data.sources.tables.folders` lists the forms of a table, `tables.images` those of a column of images.
The samples of a row group of Parquet stay together in the shards, because a row group is read as a whole: each
reading process holds up to two. Rows that are sorted, such as by class, should be shuffled before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from pipelines.config.validation import checked
from pipelines.data.sources.base import Entry
from pipelines.data.sources.labelled_images.base import LabelledImages, LabelledOptions
from pipelines.data.sources.labelled_images.options import with_validation
from pipelines.data.sources.labels import LabelTask, kept_rows, label_markers, without_markers
from pipelines.data.sources.row_splits import SplitOptions
from pipelines.data.sources.rows import with_ids
from pipelines.data.sources.tables.features import classes_of
from pipelines.data.sources.tables.folders import Part, table_parts
from pipelines.data.sources.tables.images import TableImages, image_rows
from pipelines.data.sources.tables.parquet import file_schema, table_columns
from pipelines.data.sources.tables.row import ImageRow, Row
from pipelines.errors import UserError
from pipelines.storage import Location


class ImageTableOptions(LabelledOptions, SplitOptions):
    """The table, its columns and the tasks.

    `file` is below the root; empty if the root is the table: a Parquet or Arrow file, a folder of Parquet files, a
    Delta table, or a folder that `save_to_disk` of `datasets` wrote. `image_column` holds bytes, structs with
    `bytes` and `path`, or paths of files from the folder of the table. Without `id_column`, the id of a row is its
    file and number. Without a split column, the split is the one that folders or names of files have, else it
    follows from the hash of the id, or of the column `split_by`: all rows with the same value of it are in one
    split. Class labels of `datasets` are classes by name: a task of kind multiclass has
    their order, and a column `tags` of lists of them has the columns `tags.<class>`. `val_share` of the training
    rows are for validation, by the hash of their ids or of `split_by`.

    Images are stored `size` × `size`, as by the reader `folder`.
    """

    file: str = ""
    image_column: str = "image"
    id_column: str | None = None


class ImageTableSource(LabelledImages):
    """Reads a table with images. See `ImageTableOptions` for the options.

    Raises:
        UserError: For a wrong option, and a table that does not exist.
    """

    _options: ImageTableOptions

    def __init__(self, root: Location, options: Mapping[str, Any]) -> None:
        self._options = checked(ImageTableOptions, options, "source.options")
        self._where = root / self._options.file if self._options.file else root
        if not self._where.exists():
            self._where.check_bucket()
            raise UserError(
                "the table does not exist",
                where=str(self._where),
                remedy="correct source.root and source.options.file: Parquet, Delta, or a folder of save_to_disk",
            )
        self._images = TableImages(self._where, self._options.image_column)

    def raw(self) -> Sequence[Location]:
        """See `Source.raw`."""
        return (self._where,)

    @cached_property
    def _parts(self) -> list[Part]:
        return table_parts(self._where) if self._where.is_dir() else [Part("")]

    def _listed(self, first: bool) -> Iterator[Entry]:
        options, where = self._options, str(self._where)
        columns = [task.column for task in options.tasks]
        rows = without_markers(self._rows(), label_markers(self._label_tasks))
        named = with_ids(rows, options.id_column, "", where) if options.id_column else _numbered(rows)
        for row, name in kept_rows(named, self._label_tasks, where, log=first):
            key = options.split_key(row, name, where)
            split = with_validation(options.split_of(row, name, where), key, options.val_share)
            cells = {column: row.cells[column] for column in columns}
            block = f"{row.image['file']} {row.image['group']}" if "group" in row.image else ""
            yield Entry(name, split, {"row": Row(row.line, cells, row.unit), "image": row.image}, block)

    def _rows(self) -> Iterator[ImageRow]:
        options = self._options
        needed = [task.column for task in options.tasks]
        needed += [name for name in (options.id_column, *options.split_columns) if name]
        needed += [name for name in self._columns if name == options.split_column]
        for part in self._parts:
            yield from image_rows(self._where, part, list(dict.fromkeys(needed)), options.image_column)

    @property
    def _first(self) -> Location:
        """The first file."""
        return self._where / self._parts[0].file if self._parts[0].file else self._where

    @cached_property
    def _columns(self) -> list[str]:
        return table_columns(self._first, self._parts[0])

    @cached_property
    def _label_tasks(self) -> tuple[LabelTask, ...]:
        """The tasks, with the classes that `datasets` records in their order."""
        found = classes_of(file_schema(self._first))
        return tuple(_with_classes(task, found.single.get(task.column, ())) for task in self._options.tasks)

    def _image(self, entry: Entry) -> tuple[bytes | None, str]:
        row = entry.fields["row"]
        return self._images.read(entry.fields["image"]), f"column {self._options.image_column}, {row.place}"


def _with_classes(task: LabelTask, names: Sequence[str]) -> LabelTask:
    """The task with the names of its classes, if it does not have them: the second of two is the positive one."""
    if task.reads_classes and names:
        return task.model_copy(update={"classes": tuple(names)})
    if task.reads_words and task.positive is None and len(names) == 2:
        return task.model_copy(update={"positive": (names[1],)})
    return task


def _numbered(rows: Iterable[ImageRow]) -> Iterator[tuple[ImageRow, str]]:
    """Each row with its file and number as id."""
    return ((row, f"{row.image['file']}:{row.line}".removeprefix(":")) for row in rows)
