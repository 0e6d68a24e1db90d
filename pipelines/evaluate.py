"""`dmtg evaluate`: registered models, or a finished run, on the shards of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from dmtg_core.metrics import Metrics, MetricSums
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.ingest import Reader
from pipelines.manifest import check_shards, read_manifest
from pipelines.registry import load_groups
from pipelines.storage import locate


def evaluate(config: Config, model: str, split: str = "test") -> Metrics:
    """Metrics of a model on a split: task → metric → value.

    Args:
        model: `models:/…` address or a run folder.

    Raises:
        UserError: When model and shards do not fit, or the split holds nothing.
    """
    folder = locate(config.data.shards)
    manifest = read_manifest(folder)
    check_shards(folder, manifest, checksums=config.data.verify_checksums)
    groups = load_groups(model, config.track)
    wanted = [task.name for group in groups.values() for task in group.tasks]
    tasks = manifest.tasks(wanted, str(folder))
    if not manifest.rows(split):
        raise UserError(
            f"the shards have no samples in split {split!r}", where=str(folder), remedy="use another split"
        )
    reader = Reader(folder, manifest, tasks)
    sums = MetricSums(tasks)
    with torch.inference_mode():
        for arrays in _shards(reader, split):
            for start in range(0, len(arrays), config.train.batch_size):
                rows = np.arange(start, min(start + config.train.batch_size, len(arrays)))
                batch = arrays.batch(tasks, rows, torch.device("cpu"))
                outputs: dict[str, torch.Tensor] = {}
                for group in groups.values():
                    outputs |= group(batch.inputs)
                sums.update(outputs, batch.targets)
    return sums.compute()


def _shards(reader: Reader, split: str) -> Iterator[Any]:
    for shard in reader.manifest.shards[split]:
        if shard.rows:
            file = reader.folder / shard.file
            with file.filesystem.open_input_file(file.path) as opened:
                yield reader.arrays([pq.read_table(opened, columns=list(reader.columns()))])
