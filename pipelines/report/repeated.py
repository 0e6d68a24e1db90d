"""Samples with the input of a training sample, such as a photo that is there twice, or two rows of one person."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from pipelines.data.manifest import SPLITS, Manifest
from pipelines.data.reader import Reader
from pipelines.data.stream import all_units

LEAST = 0.01  # share of a split from which a note says so
BYTES = 8  # of a digest: two of a million different inputs have the same one with a probability of 3e-8


def repeated_inputs(reader: Reader, without: Collection[str] = ()) -> dict[str, int]:
    """Count the samples of val and test whose stored input is that of a training sample, byte for byte.

    Args:
        reader: Reader of the shards.
        without: Unreadable shards.

    Returns:
        Split → count.
    """
    inputs = replace(reader, tasks=())
    known = np.unique(_digests(inputs, "train", without))
    return {
        split: int(np.isin(_digests(inputs, split, without), known).sum())
        for split in SPLITS[1:]
        if reader.manifest.rows(split)
    }


def repeated_notes(manifest: Manifest, repeated: Mapping[str, int]) -> list[str]:
    """Return a note for each split with a considerable share of such samples."""
    return [
        f"{count} of {manifest.rows(split)} {split} samples have the input of a training sample: their errors can "
        "be lower than those of new samples. Rows of one object, such as a person, belong in one split: see "
        "source.options.split_by"
        for split, count in repeated.items()
        if count >= max(LEAST * manifest.rows(split), 1)
    ]


def _digests(inputs: Reader, split: str, without: Collection[str]) -> np.ndarray:
    units = [unit for unit in all_units(inputs, split) if unit.file not in without]
    found = b"".join(
        blake2b(row, digest_size=BYTES).digest()
        for unit in units
        for row in np.ascontiguousarray(inputs.read(unit.file, unit.group).inputs)
    )
    return np.frombuffer(found, np.uint64)
