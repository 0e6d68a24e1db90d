"""Plans of shards as a list in memory: the definition of their order, names and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict

from pipelines.config.sections import DataSection, SourceSection
from pipelines.data.planning import ShardPlan, make_plans
from pipelines.data.sources.base import Description, Entry, Source

SPLITS = ("train", "val", "test")


def plans_in_memory(
    entries: Iterable[Entry], description: Description, source: SourceSection, data: DataSection
) -> list[ShardPlan]:
    """Sort the samples of each split by the hash of their ids, and cut them into shards."""
    by_split: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for entry in entries:
        by_split[entry.split].append(entry)
    described = [description.input.to_dict(), [task.to_dict() for task in description.tasks]]
    described.append(dict(description.preparation))
    options = json.dumps([described, source.kind, source.options, data.compression], sort_keys=True, default=str)
    size = data.rows_per_shard or min(max(64 * 2**20 // description.row_bytes, 64), 8192)
    plans = []
    for split, members in by_split.items():
        mixed = sorted(members, key=lambda entry: (digest_of(entry.block or entry.id), digest_of(entry.id)))
        for start in range(0, len(mixed), size):
            chosen = tuple(mixed[start : start + size])
            fields = [{key: value for key, value in asdict(entry).items() if key != "block"} for entry in chosen]
            text = options + json.dumps(fields, sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode()).hexdigest()
            file = f"{split}-{start // size:05d}-{digest[:12]}.parquet"
            plans.append(ShardPlan(file, split, chosen, digest, digest))
    return plans


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def plans(reader: Source) -> list[ShardPlan]:
    """The plans of all samples of a reader, with default options."""
    return make_plans(reader.entries(), reader.describe(), SourceSection(kind="table"), DataSection(shards="x"))
