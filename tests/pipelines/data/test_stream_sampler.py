"""Streamed batches of the sampler "balanced": as often as computed, the same for any number of workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dmtg_core import Arrays, InputSpec, Task
from dmtg_core.sampling import repeats, sample_weights
from pipelines.config.sections import DataSection
from pipelines.data.reader import Reader
from pipelines.data.stream import StreamData
from tests.pipelines.shard_files import write_arrays

TASKS = (Task("scarce", "binary"), Task("kind", "multiclass", 4), Task("size", "regression"))
ROWS = (33, 20, 0, 17)


def arrays_of(rows: int, first: int) -> Arrays:
    """Numbered samples: every ninth is positive, classes are 1 : 2 : 4 : 13, a fifth of them is missing."""
    numbers = np.arange(first, first + rows)
    kind = np.searchsorted([1, 3, 7], numbers % 20, side="right")
    labels = {"scarce": (numbers % 9 == 0).astype(np.uint8), "kind": kind.astype(np.uint8)}
    labels["size"] = numbers.astype(np.float32)
    return Arrays(numbers.astype(np.float32)[:, None], labels, {"kind": numbers % 5 > 0})


@pytest.fixture(scope="module")
def parts() -> list[Arrays]:
    firsts = np.cumsum([0, *ROWS])
    return [arrays_of(rows, first) for rows, first in zip(ROWS, firsts[:-1].tolist(), strict=True)]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory, parts: list[Arrays]) -> dict[int, Reader]:
    """Group rows → reader of the same samples."""
    splits = {"train": parts, "val": parts}
    spec = InputSpec("features", (1,))
    return {n: write_arrays(tmp_path_factory.mktemp("shards"), spec, TASKS, splits, n) for n in (3, 7, 40)}


def worker(reader: Reader, shuffle_rows: int, rank: int = 0, world_size: int = 1, seed: int = 1) -> StreamData:
    mib = shuffle_rows * reader.row_bytes() / 2**20
    data = DataSection(shards="x", shuffle_mib=mib, sampler="balanced")
    return StreamData(reader, data, seed=seed, rank=rank, world_size=world_size, device=torch.device("cpu"))


def together(workers: list[StreamData], epoch: int, batch_size: int, start: int = 0) -> list[list[int]]:
    """The samples of every global batch in order; labels must belong to their inputs."""
    found = []
    for shares in zip(*(one.train(epoch, batch_size, start) for one in workers), strict=True):
        for batch in shares:
            assert torch.equal(batch.inputs[:, 0], batch.targets["size"])
            assert torch.equal(batch.targets["scarce"].bool(), batch.inputs[:, 0] % 9 == 0)
        found.append(sorted(i for batch in shares for i in batch.inputs[:, 0].int().tolist()))
    return found


def test_labels_are_those_of_the_arrays_and_weights_too(readers: dict[int, Reader], parts: list[Arrays]) -> None:
    file = readers[7].manifest.shards["train"][1].file
    found = readers[7].labels(file)
    assert found.labels.keys() == {"scarce", "kind", "size"}
    assert found.labels["size"].tolist() == parts[1].labels["size"].tolist()
    assert found.present["kind"].tolist() == parts[1].present["kind"].tolist()
    assert worker(readers[7], 20).weights.tolist() == sample_weights(TASKS, parts).tolist()


@settings(max_examples=25)
@given(
    group_rows=st.sampled_from([3, 7, 40]),
    shuffle=st.integers(1, 100),
    batch_size=st.integers(1, 40),
    workers=st.integers(2, 4),
    epoch=st.integers(0, 3),
)
def test_every_sample_occurs_as_often_as_computed_on_any_number_of_workers(
    readers: dict[int, Reader], parts: list[Arrays], group_rows, shuffle, batch_size, workers, epoch
):
    assume(workers <= batch_size)
    reader = readers[group_rows]
    alone = together([worker(reader, shuffle)], epoch, batch_size)
    counts = repeats(sample_weights(TASKS, parts), [1, epoch])
    assert Counter(i for batch in alone for i in batch) == Counter({i: int(n) for i, n in enumerate(counts) if n})
    crew = [worker(reader, shuffle, rank, workers) for rank in range(workers)]
    assert together(crew, epoch, batch_size) == alone


@settings(max_examples=10)
@given(
    group_rows=st.sampled_from([3, 7]),
    shuffle=st.integers(1, 60),
    batch_size=st.integers(4, 20),
    start=st.integers(0, 9),
)
def test_run_resumes_within_an_epoch_with_another_number_of_workers(
    readers: dict[int, Reader], group_rows, shuffle, batch_size, start
):
    reader = readers[group_rows]
    (one,) = [worker(reader, shuffle)]
    epochs = [together([one], epoch, batch_size) for epoch in (0, 1, 2)]  # each reads ahead into the next
    start = min(start, len(epochs[1]))
    others = [worker(reader, shuffle, rank, 3) for rank in range(3)]
    assert together(others, 1, batch_size, start) == epochs[1][start:]
    assert together(others, 2, batch_size) == epochs[2]


def test_the_draw_depends_on_seed_and_epoch(readers: dict[int, Reader]) -> None:
    drawn = {str(together([worker(readers[7], 30, seed=s)], e, 10)) for s in (1, 2) for e in (0, 1)}
    assert len(drawn) == 4


def test_a_window_holds_each_drawn_sample_once(readers: dict[int, Reader]) -> None:
    data = worker(readers[40], 1000)
    for unit in data.train_units(0):
        held = unit.part(data.reader.read(unit.file, unit.group))
        places, count = unit.order()
        assert len(held) == count <= unit.rows == len(places)
        assert len(set(held.inputs[:, 0])) == count


def test_validation_has_each_sample_once(readers: dict[int, Reader]) -> None:
    seen = [i for batch in worker(readers[7], 20).evaluate("val", 8) for i in batch.inputs[:, 0].int().tolist()]
    assert seen == list(range(sum(ROWS)))
