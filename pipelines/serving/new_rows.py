"""`dmtg predict MODEL new.csv`: predictions for new samples, in the order of their files, without shards and Ray.

The model carries the preparation of its input. A block of samples is in memory at a time. The file appears under
its name when it is complete.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task
from pipelines.config.sections import TrackSection
from pipelines.data.new_samples import Sample, Samples, new_samples
from pipelines.errors import UserError
from pipelines.scratch import temporary_folder
from pipelines.serving.columns import arrays_of, check_names, described, schema
from pipelines.serving.fitting import Served, open_model
from pipelines.serving.writers import STREAM, Writer, format_of, opened
from pipelines.storage import Location, locate

BLOCK_ROWS, BLOCK_BYTES = 1024, 16 * 2**20
SHOWN = 5  # bad rows in a message
EVERY = 100_000  # rows between two lines of progress
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What is predicted, and how.

    Args:
        model: Registry address, run folder or folder of a saved model.
        inputs: Files, folders of images, or "-" for stdin.
        out: File of the predictions, or "-" for stdout.
        form: "csv", "parquet" or "jsonl"; empty for that of the name of `out`.
        bad_rows: "refuse" to write nothing if a row cannot be used, or "skip" to leave such rows out.
        id_column: Column that is passed on; empty for that of the model's data set.
        force: Overwrite an existing file.
        trust_code: As `pipelines.registry.models.load_registered`.
    """

    model: str
    inputs: Sequence[str]
    out: str = STREAM
    form: str = ""
    bad_rows: str = "refuse"
    id_column: str = ""
    force: bool = False
    trust_code: bool = False


@dataclass(frozen=True)
class PredictedRows:
    """The result of `predict_rows`: rows that were predicted, rows that were left out, the model, its columns."""

    rows: int
    skipped: int
    address: str
    tasks: Mapping[str, Any]


@dataclass
class BadRows:
    """Counts rows that cannot be used, and keeps the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Add a row."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{sample.place}: {sample.problem}")

    def __str__(self) -> str:
        more = f"; and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return f"{self.count} rows cannot be used: {'; '.join(self.first)}{more}"


def predict_rows(wanted: Wanted, track: TrackSection, log: Callable[[str], None] = logger.info) -> PredictedRows:
    """Predict new samples and write one file.

    Args:
        wanted: The model, the samples and the file.
        track: The registry.
        log: Called with each line of progress.

    Raises:
        UserError: When the model or a file cannot be read, a column is missing, the file of predictions exists
            already, or rows cannot be used and `bad_rows` is "refuse".
    """
    kind = format_of(wanted.out, wanted.form)
    _check_out(wanted)
    served = open_model(wanted.model, track, trust_code=wanted.trust_code)
    tasks = [task for model in served.groups.values() for task in model.tasks]
    _check_dense(tasks, kind, wanted.out)
    spec = next(iter(served.groups.values())).spec.input
    with _files(wanted.inputs) as files:
        samples = new_samples(files, spec, served.preparation, served.source, wanted.id_column)
        for note in samples.check():
            log(f"note: {note}")
        check_names(tasks, samples.id_name, served.address)
        columns = schema(tasks, samples.id_name, numbered=samples.numbered)
        about = described(served.tasks, spec.shape)
        columns = columns.with_metadata({"dmtg.tasks": json.dumps(about), "dmtg.model": served.address})
        if wanted.out != STREAM:
            locate(wanted.out).parent.check_writable()
        with temporary_folder() as folder:
            made = folder / "predictions"
            with opened(made, kind, columns) as writer:
                rows, bad = _predict(served, samples, columns, writer, wanted.bad_rows == "skip", log)
            _check_bad(bad, rows, wanted)
            _publish(made, wanted.out)
        for remark in samples.remarks():
            log(f"note: {remark}")
    if bad.count:
        log(f"note: {bad}; they are left out")
    return PredictedRows(rows, bad.count, served.address, about)


def _check_out(wanted: Wanted) -> None:
    if wanted.out == STREAM:
        return
    place = locate(wanted.out)
    if any(locate(name) == place for name in wanted.inputs if name != STREAM):
        raise UserError("the predictions would replace their input", where=str(place), remedy="name another file",
                        wrong_use=True)  # fmt: skip
    if place.is_dir():
        raise UserError("--out names a folder", where=str(place), remedy="name a file in it", wrong_use=True)
    if place.exists() and not wanted.force:
        raise UserError(
            "the file exists already", where=str(place),
            remedy="name another file with -o, or overwrite it with --force", wrong_use=True,
        )  # fmt: skip


def _check_dense(tasks: Sequence[Task], kind: str, out: str) -> None:
    dense = [task.name for task in tasks if task.dense]
    if dense and kind != "parquet":
        raise UserError(
            f"the predictions of {dense[0]} are pixels, which a file of text does not hold",
            where=out,
            remedy="write a .parquet file",
            wrong_use=True,
        )


@contextmanager
def _files(inputs: Sequence[str]) -> Iterator[list[Location]]:
    """The input files; stdin is copied to a temporary file, because a table is read twice."""
    with temporary_folder() as folder:
        yield [_stdin(folder) if name == STREAM else locate(name) for name in inputs]


def _stdin(folder: Path) -> Location:
    file = folder / "stdin"
    with file.open("wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target)
    with file.open("rb") as held:
        head = held.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    kind = ".parquet" if head.startswith(b"PAR1") else ".jsonl" if head.startswith(b"{") else ".csv"
    return locate(str(file.rename(file.with_suffix(kind))))


def _predict(
    served: Served, samples: Samples, columns: pa.Schema, writer: Writer, skip: bool, log: Callable[[str], None]
) -> tuple[int, BadRows]:
    """Write the predictions of all samples; after a bad one that is not skipped, only count further bad ones."""
    bad, rows, due = BadRows(), 0, EVERY
    spec = next(iter(served.groups.values())).spec.input
    for block in _blocks(samples, bad, spec):
        if bad.count and not skip:
            continue
        writer.write(predicted(served, block, columns))
        rows += len(block)
        if rows >= due:
            due += EVERY
            log(f"{rows} rows")
    return rows, bad


def _blocks(samples: Iterable[Sample], bad: BadRows, spec: InputSpec) -> Iterator[list[Sample]]:
    """The samples that can be used, in blocks of limited size."""
    most = block_rows(spec)
    block: list[Sample] = []
    for sample in samples:
        if sample.input is None:
            bad.add(sample)
            continue
        block.append(sample)
        if len(block) == most:
            yield block
            block = []
    if block:
        yield block


def block_rows(spec: InputSpec) -> int:
    """How many samples are predicted at a time, so that they need little memory."""
    size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // size))


def predicted(served: Served, block: Sequence[Sample], columns: pa.Schema) -> pa.Table:
    """The predictions of some samples, with the columns of a file."""
    raw = torch.from_numpy(np.stack([sample.input for sample in block if sample.input is not None]))
    arrays = [pa.array([sample.id for sample in block], pa.string()).cast(columns.field(0).type)]
    for model in served.groups.values():
        found = model.predict(raw)
        for task in model.tasks:
            arrays += arrays_of(task, found[task.name].numpy())
    return pa.table(arrays, schema=columns)


def _check_bad(bad: BadRows, rows: int, wanted: Wanted) -> None:
    where = ", ".join(wanted.inputs)
    if bad.count and wanted.bad_rows != "skip":
        raise UserError(
            str(bad),
            where=where,
            remedy="correct them, or leave them out with --bad-rows skip: nothing is written",
        )
    if not rows:
        raise UserError(f"no row is left: {bad}", where=where, remedy="correct the rows")


def _publish(made: Path, out: str) -> None:
    if out != STREAM:
        locate(out).write_file(made)
        return
    sys.stdout.flush()
    with made.open("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.flush()
