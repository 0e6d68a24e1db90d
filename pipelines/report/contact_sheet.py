"""The contact sheet: samples as pictures and text, the input beside every label."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import ANGLES, Task
from pipelines.data import statistics
from pipelines.data.reader import Reader
from pipelines.data.statistics import Sums, class_name
from pipelines.data.stream import all_units
from pipelines.report import pictures
from pipelines.report.formatting import figure, in_unit, quantity
from pipelines.report.pictures import Picture

SEED = 22
MOST_CLASSES = 24  # classes in the legend of a dense task; so many have different colours
MOST_CHANNELS = 4  # channels of a dense task that are drawn
FAR = 3.0  # standard deviations; values farther from the mean have the colour of the nearer end
Limits = Sequence[tuple[float, float]]  # lower and upper limit of every channel, in raw units


@dataclass(frozen=True)
class Sample:
    """A stored sample: its id, input and raw labels, and the masks of present labels, as in `Arrays`."""

    id: str
    inputs: np.ndarray
    labels: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shown:
    """A value of a sample as text, and as pictures if it has a spatial extent."""

    name: str
    words: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Legend:
    """The legend of a dense task: classes with their colours, or the two ends of the colour map."""

    name: str
    classes: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, ...] = ()


def pick(reader: Reader, count: int, without: Collection[str] = ()) -> list[Sample]:
    """Draw samples of the training split at random with a fixed seed.

    Args:
        reader: Reader of the shards.
        count: Number of samples; a smaller split gives all of its samples.
        without: Unreadable shards.
    """
    units = [unit for unit in all_units(reader, "train") if unit.file not in without]
    places = [(unit, row) for unit in units for row in range(unit.rows)]
    chosen = np.random.default_rng(SEED).permutation(len(places))[:count]
    rows: dict[Any, list[int]] = {}
    for place in sorted(chosen):
        unit, row = places[place]
        rows.setdefault(unit, []).append(row)
    return [sample for unit, inside in rows.items() for sample in _read(reader, unit.file, unit.group, inside)]


def _read(reader: Reader, file: str, group: int, rows: Sequence[int]) -> list[Sample]:
    arrays, ids = reader.read(file, group), ids_of(reader, file, group)
    return [
        Sample(
            ids[row],
            arrays.inputs[row],
            {name: values[row] for name, values in arrays.labels.items()},
            {name: mask[row] for name, mask in arrays.present.items()},
        )
        for row in rows
    ]


def ids_of(reader: Reader, file: str, group: int) -> list[str]:
    """The ids of the samples of a row group."""
    place = reader.folder / file
    with place.filesystem.open_input_file(place.path) as opened:
        found: list[str] = pq.ParquetFile(opened).read_row_group(group, columns=["id"])["id"].to_pylist()
        return found


class Sheet:
    """Draws samples with common scales and common class colours.

    Args:
        samples: The samples to draw; the classes in them get colours.
        reader: Reader of their shards.
    """

    def __init__(self, samples: Sequence[Sample], reader: Reader) -> None:
        self._description = reader.manifest.description
        self._samples, self._tasks = samples, reader.tasks
        if self._description.input.kind == "features":
            self._span = self._feature_span()
        sums = reader.manifest.sums["train"]
        self._limits = {
            task.name: limits(task, sums[task.name]) for task in reader.tasks if task.kind == "dense_regression"
        }
        self._seen = {
            task.name: sorted({int(i) for sample in samples for i in np.unique(_known_pixels(task, sample))})
            for task in reader.tasks
            if task.kind == "dense_classification"
        }

    def _feature_span(self) -> tuple[float, float]:
        """Range of the features of all samples in network units, without outliers."""
        units = [standardised(self._description.input, sample.inputs) for sample in self._samples]
        low, high = np.nanmin(units, initial=np.inf), np.nanmax(units, initial=-np.inf)
        return max(float(low), -FAR), min(float(high), FAR)

    def legends(self) -> list[Legend]:
        """Legends of the features and of each dense task."""
        found = [self._legend(task) for task in self._tasks if task.dense]
        if self._description.input.kind == "features":
            low, high = self._span
            found.insert(
                0, Legend("input", ends=(f"{low:.3g} to {high:.3g} in network units, one cell for each feature",))
            )
        return found

    def _legend(self, task: Task) -> Legend:
        if task.classes:
            seen = self._seen[task.name]
            named = tuple((class_name(task, i), pictures.class_colour(k)) for k, i in enumerate(seen))
            rest = len(named) - MOST_CLASSES
            return Legend(task.name, named[:MOST_CLASSES], (f"and {rest} more classes",) if rest > 0 else ())
        if task.metric in ANGLES:
            return Legend(task.name, ends=("the three components from -1 to 1 as red, green and blue",))
        ends = [" to ".join(quantity(end, task.unit) for end in pair) for pair in self._limits[task.name]]
        return Legend(task.name, ends=tuple(dict.fromkeys(ends)))

    def input(self, sample: Sample) -> Shown:
        """An image as a picture, features as a strip, tokens as text, or as ids if there is no tokenizer."""
        spec = self._description.input
        if spec.kind == "tokens":
            return Shown("input", text_of(sample.inputs, spec.padding, self._description.preparation))
        if spec.kind == "features":
            return show_features(sample.inputs, spec, self._span, sample.id)
        shape = " × ".join(str(length) for length in spec.shape)
        alt = f"input of sample {sample.id}, an image of {shape}"
        return Shown("input", "", (pictures.photo(sample.inputs, alt),))

    def labels(self, sample: Sample) -> list[Shown]:
        """All labels of a sample, labels with pictures first."""
        return [self._label(task, sample) for task in sorted(self._tasks, key=lambda task: not task.dense)]

    def _label(self, task: Task, sample: Sample) -> Shown:
        if not _present(task, sample).any():
            return Shown(task.name, "missing")
        if task.kind == "dense_classification":
            return show_classes(task, sample, self._seen[task.name])
        if task.metric in ANGLES and task.dense:
            return show_directions(task, sample)
        if task.kind == "dense_regression":
            return show_values(task, sample, self._limits[task.name])
        return Shown(task.name, in_words(task, sample.labels[task.name]))


def show_features(values: np.ndarray, spec: InputSpec, span: tuple[float, float], sample_id: str) -> Shown:
    """A strip of all features in network units, and the first features in their own units."""
    first = ", ".join(figure(value) for value in values[:8]) + (", …" if len(values) > 8 else "")
    alt = f"input of sample {sample_id}, {len(values)} features: {first}"
    return Shown("input", first, (pictures.strip(standardised(spec, values), span, alt),))


def standardised(spec: InputSpec, values: np.ndarray) -> np.ndarray:
    """Stored features in network units."""
    return (values.astype(np.float64) - np.array(spec.mean)) / np.array(spec.std)


def text_of(ids: np.ndarray, padding: int, preparation: Mapping[str, Any]) -> str:
    """The text of token ids, decoded by their tokenizer; the ids if there is no tokenizer."""
    found = [int(i) for i in ids if i != padding]
    try:
        from tokenizers import Tokenizer, decoders
    except ImportError:
        return f"token ids {found}"
    if "tokenizer" not in preparation:
        return f"token ids {found}"
    tokenizer = Tokenizer.from_str(preparation["tokenizer"])
    if (json.loads(preparation["tokenizer"]).get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        tokenizer.decoder = decoders.ByteLevel()  # our tokenizers are stored without a decoder
    return str(tokenizer.decode(found)).strip()


def show_classes(task: Task, sample: Sample, seen: Sequence[int]) -> Shown:
    """A map of class ids, and the classes with the largest areas."""
    ids = sample.labels[task.name]
    valid = _valid(task, sample)
    found, counts = np.unique(ids[valid], return_counts=True)
    most = sorted(zip(counts.tolist(), found.tolist(), strict=True), reverse=True)[:3]
    text = ", ".join(f"{class_name(task, i)} {_percent(count / ids.size)}" for count, i in most)
    text = _with_gaps(text, valid)
    return Shown(task.name, text, (pictures.class_map(ids, valid, seen, _alt(task, sample, text)),))


def show_directions(task: Task, sample: Sample) -> Shown:
    """Three channels of a direction as one colour picture."""
    units = (sample.labels[task.name].astype(np.float64) - np.array(task.offset)) / np.array(task.scale)
    valid = np.asarray(_valid(task, sample).all(2))
    text = _with_gaps("", valid)
    alt = _alt(task, sample, text or "directions as colours")
    return Shown(task.name, text, (pictures.directions(units, valid, alt),))


def show_values(task: Task, sample: Sample, scales: Limits) -> Shown:
    """Maps of numbers, one picture for each channel."""
    values, valid = sample.labels[task.name], _valid(task, sample)
    known = values[valid]
    span = [figure(in_unit(known.min(), task.unit)[0]), quantity(known.max(), task.unit)] if known.size else []
    text = _with_gaps(" to ".join(span), valid)
    channels = list(zip(_channels(values), _channels(valid), scales, strict=True))[:MOST_CHANNELS]
    drawn = [
        pictures.heat(*channel, _alt(task, sample, text, f", channel {c}" if len(channels) > 1 else ""))
        for c, channel in enumerate(channels)
    ]
    return Shown(task.name, text, tuple(drawn))


def _channels(values: np.ndarray) -> list[np.ndarray]:
    """The channels `(H, W)` of `(H, W, C)` or of `(H, W)`."""
    return [values] if values.ndim == 2 else list(np.moveaxis(values, 2, 0))


def _alt(task: Task, sample: Sample, text: str, which: str = "") -> str:
    return f"{task.name}{which} of sample {sample.id}: {text}"


def _with_gaps(text: str, valid: np.ndarray) -> str:
    gap = 1 - valid.mean()
    return ", ".join(part for part in (text, f"{_percent(gap)} without a label" if gap else "") if part)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "< 1%"


def in_words(task: Task, value: np.ndarray) -> str:
    """The label of a task that is not dense: the name of a class, yes or no, or numbers with their unit."""
    if task.kind == "binary":
        return class_name(task, int(value)) if task.labels else ("no", "yes")[int(value) != 0]
    if task.classes:
        return "missing" if int(value) == task.ignore_index else class_name(task, int(value))
    return ", ".join("missing" if math.isnan(x) else quantity(x, task.unit) for x in np.atleast_1d(value).tolist())


def limits(task: Task, sums: Sums) -> Limits:
    """The values at the two ends of the colour map, a pair for each channel: the range without outliers."""
    channels = statistics.by_channel(sums)
    ends = [_limits(statistics.moments(channel)) for channel in channels]
    return ends if len(ends) == task.channels else ends * task.channels


def _limits(found: Mapping[str, float]) -> tuple[float, float]:
    if not found:
        return 0.0, 1.0
    low, high = (found["mean"] + sign * FAR * found["std"] for sign in (-1, 1))
    return max(low, found["min"]), min(high, found["max"])


def _present(task: Task, sample: Sample) -> np.ndarray:
    return np.asarray(sample.present.get(task.name, True))


def _valid(task: Task, sample: Sample) -> np.ndarray:
    """Mask of the valid values of a dense label, in the shape of the label."""
    values = sample.labels[task.name]
    mask = _present(task, sample)
    mask = np.broadcast_to(mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim)), values.shape)
    if task.classes:
        return mask & (values != task.ignore_index)
    return mask & np.isfinite(values) & (task.valid_below is None or values < task.valid_below)


def _known_pixels(task: Task, sample: Sample) -> np.ndarray:
    return sample.labels[task.name][_valid(task, sample)]
