"""Data sets in memory: batches of stored samples, prefetched, and equal for any number of workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmtg_core.data_checks import check_choice, check_input, check_lengths, check_samples
from dmtg_core.input_spec import InputSpec
from dmtg_core.sampling import SAMPLERS, epoch_order, epoch_steps, sample_weights
from dmtg_core.tasks import Task


@dataclass(frozen=True)
class Batch:
    """A batch: stored input `(B, …)` and encoded targets, on the training device."""

    inputs: Tensor
    targets: dict[str, Tensor]


class Data(Protocol):
    """The data of a training. Each worker has its own object, which returns that worker's part."""

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over this worker's part of each global batch of an epoch, from batch number `start`.

        Each sample occurs once in an epoch, or as often as a sampler says. The order depends only on the seed and
        the epoch. All workers have the same number of batches, and no batch is empty. `start` does not change the
        batches that follow.
        """
        ...

    def steps(self, batch_size: int) -> int:
        """Number of global batches in an epoch."""
        ...

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Iterate over this worker's part of a split. Each sample is on exactly one worker."""
        ...


class Samples(Protocol):
    """Stored samples from which batches are gathered: `Arrays`, `Chunks` or `DeviceArrays`."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, tasks: Sequence[Task], rows: np.ndarray, device: torch.device) -> Batch:
        """Return the samples at `rows`, encoded on `device`. Their order in the batch is not specified."""
        ...


@dataclass(frozen=True)
class Arrays:
    """n stored samples.

    Args:
        inputs: `(n, …)`.
        labels: Task name → `(n, …)` raw labels.
        present: Task name → bool `(n,)` or `(n, H, W)`, False for a missing label. A task without an entry has
            all labels.
        outputs: Whether the inputs are outputs of a frozen stem: bfloat16 values in an array of int16, see
            `dmtg_core.network.trunk`.

    Raises:
        ValueError: For an array that is no NumPy array of numbers, or has another number of samples.
    """

    inputs: np.ndarray
    labels: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    outputs: bool = False

    def __post_init__(self) -> None:
        check_lengths(self.inputs, self.labels, self.present)

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, rows: slice | np.ndarray) -> Arrays:
        """Return some of the samples. A slice is not copied."""
        labels = {name: values[rows] for name, values in self.labels.items()}
        present = {name: values[rows] for name, values in self.present.items()}
        return Arrays(self.inputs[rows], labels, present, self.outputs)

    def batch(self, tasks: Sequence[Task], rows: np.ndarray, device: torch.device) -> Batch:
        """See `Samples.batch`."""
        return gather([(self, rows)], tasks, device)


class Chunks:
    """Several `Arrays` as one set of samples. They are not concatenated: rows are copied once, into their batch.

    Args:
        parts: The parts. Their samples are numbered consecutively.
    """

    def __init__(self, parts: Sequence[Arrays]) -> None:
        self.parts = tuple(parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, rows: np.ndarray) -> list[tuple[Arrays, np.ndarray]]:
        """Return the parts that hold `rows`, each with the rows in it."""
        part_of = np.searchsorted(self.ends, rows, side="right")
        return [
            (self.parts[i], rows[part_of == i] - (self.ends[i] - len(self.parts[i]))) for i in np.unique(part_of)
        ]

    def batch(self, tasks: Sequence[Task], rows: np.ndarray, device: torch.device) -> Batch:
        """See `Samples.batch`."""
        return gather(self.locate(rows), tasks, device)


def gather(parts: Sequence[tuple[Arrays, np.ndarray]], tasks: Sequence[Task], device: torch.device) -> Batch:
    """Gather rows of several parts into one batch, encoded on `device`."""
    inputs = _as_stored(_gathered([(arrays.inputs, rows) for arrays, rows in parts], device), parts[0][0])
    encoded = _encoded_on_host if device.type == "cpu" else _encoded
    return Batch(inputs, {task.name: encoded(parts, task, device) for task in tasks})


def with_outputs(arrays: Arrays, compute: Callable[[Tensor], Tensor], batch_size: int = 256) -> Arrays:
    """Return samples with outputs of a frozen stem as inputs. `compute` is `GroupingNetwork.stored_output`."""
    starts = range(0, len(arrays), batch_size)
    parts = [compute(torch.from_numpy(arrays.inputs[start : start + batch_size])) for start in starts]
    stored = torch.cat(parts).cpu().view(torch.int16).numpy()
    return Arrays(stored, arrays.labels, arrays.present, outputs=True)


def _as_stored(inputs: Tensor, part: Arrays) -> Tensor:
    """Inputs in the type that the network reads."""
    return inputs.view(torch.bfloat16) if part.outputs else inputs


def _encoded_on_host(parts: Sequence[tuple[Arrays, np.ndarray]], task: Task, device: torch.device) -> Tensor:
    """Encode each part directly into the target, while it is in the cache of the processor."""
    shape = (sum(len(rows) for _, rows in parts), *parts[0][0].labels[task.name].shape[1:])
    held = torch.empty(shape, dtype=torch.int64 if task.classes else torch.float32, device=device)
    view, start = held.numpy(), 0
    for arrays, rows in parts:
        raw, present = arrays.labels[task.name].take(rows, 0), arrays.present.get(task.name)
        known = None if present is None else present.take(rows, 0)
        task.encode_rows(raw, known, view[start : start + len(rows)])
        start += len(rows)
    return task.in_layout(held)


def _encoded(parts: Sequence[tuple[Arrays, np.ndarray]], task: Task, device: torch.device) -> Tensor:
    """Encode on the device. The stored labels are copied to it, as they are smaller than targets."""
    raw = _gathered([(arrays.labels[task.name], rows) for arrays, rows in parts], device)
    masks = [(arrays.present.get(task.name), rows) for arrays, rows in parts]
    known = [mask for mask, _ in masks if mask is not None]
    if not known:
        return task.encode(raw)
    shape = known[0].shape[1:]
    # a part without missing labels has no mask
    whole = [
        (np.ones((len(a), *shape), bool) if m is None else m, r)
        for (a, _), (m, r) in zip(parts, masks, strict=True)
    ]
    return task.encode(raw, _gathered(whole, device))


def _gathered(parts: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> Tensor:
    """Gather rows of several arrays into one tensor on the device. Each row is copied once on the host."""
    first = parts[0][0]
    count = sum(len(rows) for _, rows in parts)
    dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype
    # copies from page-locked memory overlap with the computation
    held = torch.empty((count, *first.shape[1:]), dtype=dtype, pin_memory=device.type == "cuda")
    view, start = held.numpy(), 0
    for array, rows in parts:
        # with "clip" numpy writes directly into the batch; rows are never out of range
        np.take(array, rows, axis=0, out=view[start : start + len(rows)], mode="clip")
        start += len(rows)
    return held.to(device, non_blocking=True)


def parts_of(samples: Samples) -> tuple[Arrays, ...]:
    """The arrays of samples that are in host memory."""
    if isinstance(samples, Chunks):
        return samples.parts
    return (samples,) if isinstance(samples, Arrays) else ()


class DeviceArrays:
    """Stored samples on the training device. A batch needs no copy from the host.

    Args:
        samples: The samples to copy to the device.
        device: The device.
    """

    def __init__(self, samples: Arrays | Chunks, device: torch.device) -> None:
        parts = samples.parts if isinstance(samples, Chunks) else (samples,)
        masked = {name for part in parts for name in part.present}

        def present(part: Arrays, name: str) -> np.ndarray:
            held = next(p.present[name] for p in parts if name in p.present)
            return part.present.get(name, np.ones((len(part), *held.shape[1:]), bool))

        self.inputs = _as_stored(_stored([part.inputs for part in parts], device), parts[0])
        self.labels = {name: _stored([p.labels[name] for p in parts], device) for name in parts[0].labels}
        self.present = {name: _stored([present(p, name) for p in parts], device) for name in masked}

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, tasks: Sequence[Task], rows: np.ndarray, device: torch.device) -> Batch:
        """See `Samples.batch`. `device` is the device of the samples."""
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        targets = {}
        for task in tasks:
            held = self.present.get(task.name)
            present = None if held is None else _rows(held, index)
            targets[task.name] = task.encode(_rows(self.labels[task.name], index), present)
        return Batch(_rows(self.inputs, index), targets)


def _stored(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Copy the parts into one tensor on the device."""
    count = sum(len(part) for part in parts)
    dtype = torch.from_numpy(np.empty(0, parts[0].dtype)).dtype
    held = torch.empty((count, *parts[0].shape[1:]), dtype=dtype, device=device)
    start = 0
    for part in parts:
        held[start : start + len(part)] = torch.from_numpy(np.array(part))  # a part may be read-only memory
        start += len(part)
    return held


def _rows(held: Tensor, index: Tensor) -> Tensor:
    # torch indexes signed 16-bit values, but not unsigned ones
    if held.dtype == torch.uint16:
        return held.view(torch.int16)[index].view(torch.uint16)
    return held[index]


def overlapped(batches: Iterator[Batch], device: torch.device, depth: int = 2) -> Iterator[Batch]:
    """Prefetch batches in a separate thread.

    On a GPU the copies run on a separate stream.

    Args:
        batches: The batches. Only the thread uses the iterator.
        device: Device of the batches.
        depth: Number of batches to prefetch.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(batches, device, ready, stop), daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, made = item
            if made is not None:
                _wait(batch, made)
            yield batch
    finally:
        stop.set()
        thread.join()


def _produce(
    batches: Iterator[Batch], device: torch.device, ready: queue.Queue[Any], stop: threading.Event
) -> None:
    """Put each batch with the event of its completion into the queue, then None or the exception."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    last: BaseException | None = None
    try:
        with torch.cuda.stream(stream) if stream else nullcontext():
            for batch in batches:
                if not _put(ready, (batch, stream.record_event() if stream else None), stop):
                    return
    except BaseException as error:  # noqa: BLE001 - raised again by the consumer
        last = error
    _put(ready, last, stop)


def _put(ready: queue.Queue[Any], item: object, stop: threading.Event) -> bool:
    """Put an item into the queue. Return False if `stop` was set first."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _wait(batch: Batch, event: Any) -> None:
    """Let the current stream wait for a batch of another stream."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in (batch.inputs, *batch.targets.values()):
        tensor.record_stream(current)


class ArrayData:
    """A data set in memory. Workers with the same seed have parts of the same global batches.

    Args:
        splits: Split name → samples.
        tasks: The tasks of the targets.
        seed: Seed of the order of the training samples.
        rank, world_size: Rank of this worker and number of workers.
        device: Device of the batches.
        sampler: "uniform" has each sample once in an epoch, "balanced" draws them; see `dmtg_core.sampling`.

    Raises:
        ValueError: If a split has fewer samples than there are workers, inputs are not finite, labels are not what
            their tasks say, or as `sample_weights`. Every sample is checked here, once, and not in the steps.
    """

    def __init__(
        self,
        splits: Mapping[str, Samples],
        tasks: Sequence[Task],
        *,
        seed: int = 22,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        sampler: str = "uniform",
    ) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        for name, arrays in splits.items():
            if len(arrays) < world_size:
                raise ValueError(f"split {name!r} has {len(arrays)} samples for {world_size} workers")
            for part in parts_of(arrays):
                check_samples(f"split {name!r}", part.inputs, part.labels, part.present, tasks)
        self.splits = dict(splits)
        self.tasks = tuple(tasks)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device = torch.device(device)
        held: Any = self.splits["train"] if sampler == "balanced" else None
        self.weights = None if held is None else sample_weights(self.tasks, parts_of(held) or (held,))

    def check(self, spec: InputSpec, tasks: Sequence[Task]) -> None:
        """Check that the data has the input and the tasks of a network.

        Raises:
            ValueError: For another shape of the input, another task, or no split "train" or "val".
        """
        if {"train", "val"} - set(self.splits):
            raise ValueError(f"expected the splits train and val, got {', '.join(self.splits) or 'none'}")
        if [task.name for task in tasks] != [task.name for task in self.tasks]:
            names = [", ".join(task.name for task in some) for some in (tasks, self.tasks)]
            raise ValueError(f"the network has the tasks {names[0]}, the data has {names[1]}")
        for name, samples in self.splits.items():
            for part in parts_of(samples):
                if not part.outputs:
                    check_input(f"split {name!r}", part.inputs, spec)

    def steps(self, batch_size: int) -> int:
        """See `epoch_steps`."""
        return epoch_steps(len(self.splits["train"]), batch_size, self.world_size)

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`."""
        batches = self._train(epoch, batch_size, start)
        # only a GPU computes while this thread gathers samples
        return overlapped(batches, self.device) if self.device.type == "cuda" else batches

    def _train(self, epoch: int, batch_size: int, start: int) -> Iterator[Batch]:
        samples = self.splits["train"]
        order = epoch_order(len(samples), self.weights, [self.seed, epoch])
        edges = [*range(0, len(order), batch_size)[: self.steps(batch_size)], len(order)]
        for first, last in pairwise(edges[start:]):
            rows = np.array_split(order[first:last], self.world_size)[self.rank]
            yield samples.batch(self.tasks, rows, self.device)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        arrays = self.splits[split]
        mine = np.array_split(np.arange(len(arrays)), self.world_size)[self.rank]
        for start in range(0, len(mine), batch_size):
            yield arrays.batch(self.tasks, mine[start : start + batch_size], self.device)
