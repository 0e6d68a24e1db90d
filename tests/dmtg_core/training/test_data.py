"""A data set in memory: each sample once, on one worker, in an order of the seed and the epoch."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmtg_core import ArrayData, Arrays, Batch, Task
from dmtg_core.training.data import Chunks, DeviceArrays, overlapped
from tests.dmtg_core import samples
from tests.dmtg_core.samples import IMAGE, MIXED

TASKS = (Task("t", "regression"),)
CPU = torch.device("cpu")


def numbered(rows: int, **options) -> ArrayData:
    """Samples whose input and label are their number."""
    values = np.arange(rows, dtype=np.float32)
    split = Arrays(values[:, None], {"t": values}, {})
    return ArrayData({"train": split, "val": split}, TASKS, **options)


def drawn(data: ArrayData, epoch: int, batch_size: int) -> list[list[int]]:
    """Sample numbers of each batch. Labels must belong to their inputs."""
    batches = []
    for batch in data.train(epoch, batch_size):
        assert torch.equal(batch.inputs[:, 0], batch.targets["t"])
        batches.append(batch.inputs[:, 0].int().tolist())
    return batches


@given(rows=st.integers(3, 70), batch_size=st.integers(3, 40), workers=st.integers(1, 3), epoch=st.integers(0, 3))
def test_every_sample_occurs_once_in_an_epoch_on_any_number_of_workers(rows, batch_size, workers, epoch):
    parts = [drawn(numbered(rows, rank=r, world_size=workers), epoch, batch_size) for r in range(workers)]
    steps = numbered(rows, world_size=workers).steps(batch_size)
    assert [len(part) for part in parts] == [steps] * workers
    assert all(batch for part in parts for batch in part)
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(rows))


@given(rows=st.integers(2, 40), batch_size=st.integers(1, 40), workers=st.integers(1, 3))
def test_no_batch_is_empty_whatever_its_size(rows, batch_size, workers):
    if batch_size < workers <= rows:
        with pytest.raises(ValueError, match="cannot be shared"):
            drawn(numbered(rows, rank=0, world_size=workers), 0, batch_size)
    elif rows >= workers:
        parts = [drawn(numbered(rows, rank=r, world_size=workers), 0, batch_size) for r in range(workers)]
        assert all(batch for part in parts for batch in part)


@given(rows=st.integers(6, 70), batch_size=st.integers(6, 40), workers=st.integers(2, 3))
def test_workers_share_the_global_batches_of_one_worker(rows, batch_size, workers):
    parts = [drawn(numbered(rows, rank=r, world_size=workers), 1, batch_size) for r in range(workers)]
    together = [sorted(i for batch in batches for i in batch) for batches in zip(*parts, strict=True)]
    single = numbered(rows)
    if single.steps(batch_size) == len(together):
        assert together == [sorted(batch) for batch in drawn(single, 1, batch_size)]


@given(rows=st.integers(2, 70), batch_size=st.integers(2, 40), workers=st.integers(1, 3))
def test_a_remainder_of_single_samples_joins_the_last_batch(rows, batch_size, workers):
    if min(rows, batch_size) >= 2 * workers:
        parts = [drawn(numbered(rows, rank=r, world_size=workers), 0, batch_size) for r in range(workers)]
        assert min(len(batch) for part in parts for batch in part) >= 2


def test_the_order_depends_on_epoch_and_seed():
    def order(seed: int, epoch: int) -> list[int]:
        return [i for batch in drawn(numbered(50, seed=seed), epoch, 8) for i in batch]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6
    data = numbered(50, seed=1)
    drawn(data, 0, 8)
    assert [i for batch in drawn(data, 1, 8) for i in batch] == order(1, 1)


def test_the_order_does_not_depend_on_global_random_state():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 - it is the global state that counts
    drawn(numbered(50), 0, 8)
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


@given(rows=st.integers(3, 50), batch_size=st.integers(1, 20), workers=st.integers(1, 3))
def test_evaluation_sees_every_sample_on_one_worker(rows, batch_size, workers):
    seen = []
    for rank in range(workers):
        batches = list(numbered(rows, rank=rank, world_size=workers).evaluate("val", batch_size))
        assert all(0 < len(batch.inputs) <= batch_size for batch in batches)
        assert batches
        seen += [int(i) for batch in batches for i in batch.targets["t"]]
    assert seen == list(range(rows))


def test_fewer_samples_than_workers_are_refused_by_the_name_of_the_split():
    with pytest.raises(ValueError, match="'train' has 2 samples for 3 workers"):
        numbered(2, world_size=3)


def test_unsigned_16_bit_labels_and_inputs_keep_their_values():
    values = np.array([0, 255, 256, 32767, 32768, 65534], dtype=np.uint16)
    tasks = (Task("t", "regression"),)
    data = ArrayData({"val": Arrays(values[:, None], {"t": values}, {})}, tasks)
    (batch,) = data.evaluate("val", 10)
    assert batch.targets["t"].tolist() == values.tolist()
    assert batch.inputs[:, 0].tolist() == values.tolist()


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_labels_of_every_stored_type_become_targets(dtype, kind):
    task = Task("t", kind, 2 if kind == "multiclass" else 1)
    labels = np.array([0, 1, 1], dtype=dtype)
    (batch,) = ArrayData({"val": Arrays(np.zeros((3, 2), np.float32), {"t": labels}, {})}, [task]).evaluate(
        "val", 3
    )
    assert batch.targets["t"].tolist() == [0, 1, 1]
    assert batch.targets["t"].dtype == (torch.int64 if kind == "multiclass" else torch.float32)


def test_boolean_labels_become_targets():
    split = Arrays(np.zeros((2, 2), np.float32), {"t": np.array([True, False])}, {})
    (batch,) = ArrayData({"val": split}, [Task("t", "binary")]).evaluate("val", 2)
    assert batch.targets["t"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("task", MIXED, ids=lambda t: t.name)
def test_missing_labels_become_nan_or_the_ignore_index(task):
    arrays = samples.arrays(IMAGE, [task], 6)
    shape = (6, 16, 16) if task.dense else (6,)
    present = np.zeros(shape, dtype=bool)
    present[1] = True
    arrays = Arrays(arrays.inputs, arrays.labels, {task.name: present})
    target = arrays.batch([task], np.arange(6), torch.device("cpu")).targets[task.name]
    missing = target == task.ignore_index if task.classes else target.isnan()
    assert missing[[0, 2, 3, 4, 5]].all()
    if task.valid_below is None and task.ignore_index != 0:
        assert not missing[1].any()


def test_a_task_that_is_not_requested_is_not_read():
    arrays = Arrays(
        np.zeros((2, 3), np.float32), {"t": np.zeros(2, np.float32), "other": np.array(["a", "b"])}, {}
    )
    (batch,) = ArrayData({"val": arrays}, TASKS).evaluate("val", 2)
    assert batch.targets.keys() == {"t"}


def test_batches_do_not_share_memory_with_the_data_set():
    data = numbered(4)
    (batch,) = data.train(0, 4)
    batch.inputs.zero_()
    batch.targets["t"].zero_()
    assert data.splits["train"].inputs.sum() == 6


def chunked(*sizes: int) -> Chunks:
    """Numbered samples in parts; only some parts have a mask."""
    ends = np.cumsum(sizes)
    return Chunks(
        [
            Arrays(
                np.arange(end - size, end, dtype=np.float32)[:, None],
                {"t": np.arange(end - size, end, dtype=np.uint16)},
                {"t": np.arange(end - size, end) % 3 > 0} if part % 2 else {},
            )
            for part, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
    )


NUMBER = Task("t", "regression")


@pytest.mark.parametrize("device_arrays", [False, True])
def test_chunks_and_device_arrays_give_each_sample_its_own_label(device_arrays: bool):
    chunks = chunked(3, 4, 1, 5)
    samples = DeviceArrays(chunks, CPU) if device_arrays else chunks
    rows = np.array([12, 0, 3, 6, 7, 4, 11])
    batch = samples.batch([NUMBER], rows, CPU)
    order = batch.inputs[:, 0].long()
    assert sorted(order.tolist()) == sorted(rows.tolist())
    missing = [row for row in rows if row in (3, 6, 9, 12)]  # of the parts that have a mask
    for value, target in zip(order.tolist(), batch.targets["t"].tolist(), strict=True):
        assert math.isnan(target) if value in missing else target == value


def test_device_arrays_keep_the_whole_range_of_16_bits():
    values = np.array([0, 1, 32767, 32768, 65535], np.uint16)
    arrays = DeviceArrays(Arrays(values[:, None].astype(np.float32), {"t": values}, {}), CPU)
    target = arrays.batch([NUMBER], np.array([4, 3, 2, 1, 0]), CPU).targets["t"]
    assert target.tolist() == [65535, 32768, 32767, 1, 0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_epoch_has_the_remaining_batches(world_size: int):
    for rank in range(world_size):
        data = numbered(40, rank=rank, world_size=world_size)
        whole = [batch.inputs.tolist() for batch in data.train(2, 8)]
        for start in range(len(whole) + 1):
            assert [batch.inputs.tolist() for batch in data.train(2, 8, start)] == whole[start:]


def test_overlapped_batches_are_the_same_in_the_same_order():
    data = numbered(40)
    plain = [batch.inputs.tolist() for batch in data.train(0, 8)]
    assert [batch.inputs.tolist() for batch in overlapped(data.train(0, 8), CPU)] == plain


def test_overlapped_raises_the_error_of_its_thread_after_the_batches_before_it():
    def broken():
        yield next(numbered(8).train(0, 8))
        raise OSError("the disk failed")

    batches = overlapped(broken(), CPU)
    next(batches)
    with pytest.raises(OSError, match="the disk failed"):
        next(batches)


def test_overlapped_prefetches_at_most_its_depth_and_stops_with_its_consumer():
    made = []

    def counted():
        for number in itertools.count():
            made.append(number)
            yield Batch(torch.tensor([number]), {})

    threads = threading.active_count()
    batches = overlapped(counted(), CPU, depth=3)
    assert [next(batches).inputs.item() for _ in range(5)] == list(range(5))
    batches.close()
    assert threading.active_count() == threads
    assert len(made) <= 5 + 3 + 1  # taken, in the queue, and the one that waits for space in the queue
