"""Outputs of a frozen stem, computed once for each shard and kept beside the shards.

They are a data set of the same samples in `_outputs/<key>/` of the shards, whose inputs are bfloat16 outputs. The
key depends on the weights of the stem, the description of the input and the shards. A shard of outputs is complete
when its note exists, so a job that was killed continues with the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmtg_core.addresses import allow_code
from dmtg_core.network.frozen import digest
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from pipelines.config.loading import Config
from pipelines.data.manifest import Shard, broken_shards
from pipelines.data.reader import Reader
from pipelines.data.sources.base import INPUT, Column
from pipelines.errors import UserError
from pipelines.execution.executor import Executor
from pipelines.scratch import temporary_folder
from pipelines.storage import Location

FOLDER = "_outputs"
GROUP_BYTES = 16 * 2**20  # size of a row group
BATCH = 64  # samples that the stem computes at a time
SPARE = 0.5  # largest share of the free disk that "auto" uses
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """The outputs of one stem for all shards of a reader.

    Args:
        spec: The network.
        reader: Reader of the shards.
        folder: Folder of the outputs.
        shape: Shape of the output for one sample.
    """

    spec: NetworkSpec
    reader: Reader
    folder: Location
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the output for one sample."""
        return 2 * math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of samples."""
        return sum(map(self.reader.manifest.rows, self.reader.manifest.shards))

    @property
    def group_rows(self) -> int:
        """Samples of a row group."""
        return max(GROUP_BYTES // self.bytes, 1)


def with_outputs(
    config: Config, reader: Reader, executor: Executor | None, log: Callable[[str], None] = logger.info
) -> Reader:
    """Return the reader of the outputs of the stem, which are computed first if they are missing.

    Args:
        config: The configuration.
        reader: Reader of the shards.
        executor: Computes the outputs.
        log: Called with each line.

    Returns:
        `reader` itself if outputs are not wanted: the stem is not frozen, or its input is augmented.

    Raises:
        UserError: If outputs are requested and impossible, or if a stage of the computation failed.
    """
    reason = _unwanted(config)
    if reason:
        if config.data.stem_outputs == "on":
            raise UserError(reason, where="data.stem_outputs=on", remedy="set it to auto", wrong_use=True)
        return reader
    plan = _plan(config, reader)
    left = [file for file in reader.manifest.files() if not (plan.folder / _note(file)).exists()]
    if left and config.data.stem_outputs == "auto" and not _fits(plan, log):
        return reader
    if left:
        _compute(plan, left, executor, log)
    return _reader(plan, config)


def _unwanted(config: Config) -> str:
    if config.data.stem_outputs == "off":
        return "they are off"
    if not config.encoder_spec().frozen:
        return "the stem is trained, so its outputs change"
    return "augmentation changes the inputs in each epoch" if config.train.augment else ""


def _plan(config: Config, reader: Reader) -> _Plan:
    spec = replace(config.network_spec(reader.manifest.description.input, reader.tasks), groups=1)
    network = _network(spec)
    described = json.dumps([spec.input.to_dict(), reader.manifest.digest()], sort_keys=True)
    key = hashlib.sha256(f"{digest([network.stem])} {described}".encode()).hexdigest()[:16]
    shape = network.stored_output(_zeros(spec)).shape[1:]
    return _Plan(spec, reader, reader.folder / FOLDER / key, tuple(shape))


def _network(spec: NetworkSpec) -> GroupingNetwork:
    """The network with the stem, built once in a process; the driver has checked what code it needs."""
    allow_code(*(address for _, address in spec.code))
    return _built(json.dumps(spec.to_dict()))


@lru_cache(maxsize=1)
def _built(described: str) -> GroupingNetwork:
    return GroupingNetwork(NetworkSpec.from_dict(json.loads(described))).eval()


def _zeros(spec: NetworkSpec) -> torch.Tensor:
    return torch.zeros(1, *spec.input.shape, dtype=getattr(torch, spec.input.dtype))


def _fits(plan: _Plan, log: Callable[[str], None]) -> bool:
    """Whether a local disk has room for the outputs."""
    needed, local = plan.bytes * plan.rows, plan.reader.folder.local
    free = shutil.disk_usage(local).free if local is not None else math.inf
    if needed <= SPARE * free:
        return True
    log(
        f"the outputs of the frozen stem would need {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free: they "
        "are computed in each epoch"
    )
    return False


def _compute(plan: _Plan, files: list[str], executor: Executor | None, log: Callable[[str], None]) -> None:
    size = plan.bytes * plan.rows / 2**20
    log(f"computing the outputs of the frozen stem once for {plan.rows} samples ({size:.0f} MiB): {plan.folder}")
    started = time.perf_counter()
    if executor is None or executor.embedded:  # one process with all cores
        for file in files:
            _write(plan, file)
    else:
        for done in executor.run(partial(_write, plan), files):
            if done.error is not None:
                raise UserError(
                    f"the outputs of {files[done.index]} could not be computed: {done.error}",
                    where=str(plan.folder),
                    remedy="run the same command again to resume, or set data.stem_outputs=off",
                ) from done.error
    log(f"the outputs of the frozen stem took {time.perf_counter() - started:.0f} s")


def _write(plan: _Plan, file: str) -> None:
    """Write the outputs of one shard, and then its note."""
    place = plan.reader.folder / file
    with temporary_folder() as scratch, place.filesystem.open_input_file(place.path) as opened:
        shard, local = pq.ParquetFile(opened), Path(scratch) / "shard.parquet"
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(local, shard.schema_arrow, **options) as writer:
            for group in _groups(plan, shard):
                writer.write_table(group, row_group_size=len(group))
        (plan.folder / file).write_file(local)
        with local.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        note = Shard(file, shard.metadata.num_rows, local.stat().st_size, sha256)
        (plan.folder / _note(file)).write_json(vars(note))


def _groups(plan: _Plan, shard: pq.ParquetFile) -> Iterator[pa.Table]:
    """The rows of a shard in row groups, with outputs in place of inputs."""
    network, spec = _network(plan.spec), plan.spec.input
    held: list[pa.Table] = []
    for batch in shard.iter_batches(min(BATCH, plan.group_rows)):
        table = pa.Table.from_batches([batch])
        little = np.dtype(spec.dtype).newbyteorder("<")
        values = np.stack([np.frombuffer(value.as_py(), little) for value in table[INPUT]])
        raw = torch.from_numpy(values.astype(spec.dtype).reshape(-1, *spec.shape))
        outputs = network.stored_output(raw).view(torch.int16).numpy().astype("<i2")
        column = pa.array([row.tobytes() for row in outputs], pa.binary())
        held.append(table.set_column(table.schema.get_field_index(INPUT), table.schema.field(INPUT), column))
        if sum(map(len, held)) >= _rows_of_groups(plan):
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _reader(plan: _Plan, config: Config) -> Reader:
    """The reader of complete outputs."""
    manifest = plan.reader.manifest
    notes: dict[str, Any] = {file: (plan.folder / _note(file)).read_json() for file in manifest.files()}
    columns = {**manifest.description.columns, INPUT: Column("int16", plan.shape)}
    own = replace(
        manifest,
        description=replace(manifest.description, columns=columns),
        shards={split: [Shard(**notes[s.file]) for s in shards] for split, shards in manifest.shards.items()},
        group_rows=_rows_of_groups(plan),
    )
    broken = broken_shards(plan.folder, own, checksums=config.data.verify_checksums)
    if broken:
        raise UserError(
            f"outputs of the frozen stem are damaged: {'; '.join(broken[:5])}",
            where=str(plan.folder),
            remedy="delete this folder: the outputs are computed again",
        )
    return replace(plan.reader, folder=plan.folder, manifest=own, outputs=True)


def _rows_of_groups(plan: _Plan) -> int:
    """Samples of each row group but the last: whole batches."""
    batch = min(BATCH, plan.group_rows)
    return max(plan.group_rows // batch, 1) * batch


def _note(file: str) -> str:
    return f"{file}.json"
