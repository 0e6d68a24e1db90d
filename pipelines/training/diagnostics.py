"""Details of a run's page, measured at the end of training: confidence intervals, inference cost, samples."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmtg_core.evaluation.bootstrap import BlockSums, compare
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel, clone
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.options import BASELINE
from dmtg_core.search.search import SearchResult
from dmtg_core.tasks import Task
from dmtg_core.training.data import Arrays, Batch
from dmtg_core.training.losses import sample_loss, valid
from pipelines.data import statistics
from pipelines.data.manifest import SPLITS
from pipelines.data.reader import Reader
from pipelines.data.stream import Unit, all_units
from pipelines.report.contact_sheet import Sample, Sheet, ids_of, in_words
from pipelines.report.formatting import quantity
from pipelines.training.measures.latency import costs

EXAMINED = 2**30  # most bytes of samples that are examined; of a larger split a random part
RESAMPLES, CONFIDENCE = 1000, 0.95
ROWS_EACH = 3  # rows of a task in the table of the worst labels
PACKAGES = ("dmtg", "torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")
Place = tuple[Unit, int]  # a row of a row group


def details_of(
    result: SearchResult, reader: Reader, spec: NetworkSpec, *, samples: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """The details as JSON values.

    Args:
        result: The search, on the device of the measurement.
        reader: Reader of the run's tasks.
        spec: The configured network.
        samples: Number of random and of worst samples to store as pictures; 0 stores no data at all.
        batch_size: Samples in a batch.
        seed: Seed of the random choices.
    """
    split = "test" if "test" in result.metrics else "val"
    # clones are not compiled: batches have other sizes here, and the other networks are not compiled either
    network = clone(result.network)
    naive = None if result.naive is None or result.chosen == BASELINE else clone(result.naive)
    analysis = SplitAnalysis(network, naive, reader, split, batch_size, seed)
    return {
        "versions": versions(),
        "data": data_of(reader),
        "cost": costs(network, spec),
        "intervals": analysis.intervals(),
        "samples": analysis.samples(samples) if samples else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def data_of(reader: Reader) -> dict[str, Any]:
    """Summary of the data set: samples of each split, and the training labels of each task."""
    manifest = reader.manifest
    splits = [split for split in SPLITS if manifest.rows(split)]
    return {
        "digest": manifest.digest(),
        "source": manifest.source.get("kind", ""),
        "splits": {split: manifest.rows(split) for split in splits},
        "quarantined": manifest.quarantined,
        "tasks": [
            {
                "name": task.name,
                "kind": task.kind.replace("_", " "),
                "labels": label_summary(task, manifest.sums["train"][task.name]),
                "missing": statistics.summary(manifest.sums["train"][task.name])["missing_rate"],
            }
            for task in reader.tasks
        ],
    }


def label_summary(task: Task, sums: statistics.Sums) -> str:
    """Summary of the labels of a split: the most frequent classes, or mean, deviation and range."""
    if not sums["values"]:
        return "none"
    if "classes" in sums:
        shares = sorted(((count / sums["values"], i) for i, count in enumerate(sums["classes"])), reverse=True)
        shown = [f"{statistics.class_name(task, i)} {share:.0%}" for share, i in shares[:3] if share]
        return ", ".join(shown) + (f", {len(shares) - 3} more" if len(shares) > 3 else "")
    found = statistics.moments(sums)
    mean, deviation, least, greatest = (quantity(found[key], task.unit) for key in ("mean", "std", "min", "max"))
    return f"mean {mean}, deviation {deviation}, {least} to {greatest}"


class MergedGroups(nn.Module):
    """The models of all groups as one network.

    Args:
        models: Group → model.
    """

    def __init__(self, models: Mapping[str, GroupModel]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def forward(self, raw: Tensor) -> dict[str, Tensor]:
        """Stored input to task name → output."""
        return {name: output for model in self.models.values() for name, output in model(raw).items()}


@dataclass(frozen=True)
class SplitAnalysis:
    """Losses and predictions of the samples of a split.

    Args:
        network: The result, as `GroupingNetwork` or `MergedGroups`.
        naive: The network of naive MTL; None without a baseline, or if it is the result.
        reader: Reader of the run's tasks.
        split: The split.
        batch_size: Samples in a batch.
        seed: Seed of the random choices.
    """

    network: nn.Module
    naive: GroupingNetwork | None
    reader: Reader
    split: str
    batch_size: int
    seed: int

    def units(self) -> list[Unit]:
        """The examined row groups: all of the split, or a random part of it."""
        units = all_units(self.reader, self.split)
        rows = max(EXAMINED // self.reader.row_bytes(), 1)
        drawn = np.random.default_rng(self.seed).permutation(len(units))
        before = np.concatenate([[0], np.cumsum([units[i].rows for i in drawn])[:-1]])
        return [units[i] for i in sorted(drawn[before < rows])]

    def batches(self, units: Sequence[Unit]) -> Iterator[tuple[list[Place], Batch]]:
        """The samples of row groups in their order, encoded on the network's device, with their places."""
        for unit in units:
            arrays = self.reader.read(unit.file, unit.group)
            for start in range(0, unit.rows, self.batch_size):
                rows = np.arange(start, min(start + self.batch_size, unit.rows))
                yield [(unit, int(row)) for row in rows], self._batch(arrays, rows)

    def _batch(self, arrays: Arrays, rows: np.ndarray) -> Batch:
        return arrays.batch(self.reader.tasks, rows, next(self.network.parameters()).device)

    @torch.inference_mode()
    def intervals(self) -> dict[str, Any] | None:
        """The gain over naive MTL with a paired bootstrap over the samples; None if only a part is examined."""
        units, rows = self.units(), self.reader.manifest.rows(self.split)
        if self.naive is None or rows < 2 or sum(unit.rows for unit in units) < rows:
            return None
        before, after = (BlockSums(self.reader.tasks, rows) for _ in range(2))
        for _, batch in self.batches(units):
            before.update(self.naive(batch.inputs), batch.targets)
            after.update(self.network(batch.inputs), batch.targets)
        found = compare(before, after, resamples=RESAMPLES, confidence=CONFIDENCE, seed=self.seed)
        kept = {key: value for key, value in asdict(found).items() if key not in ("champion", "challenger")}
        return kept | {"confidence": CONFIDENCE}

    @torch.inference_mode()
    def losses(self) -> tuple[list[Place], np.ndarray]:
        """Every examined sample, and its loss in each task relative to the mean; NaN without a label."""
        places: list[Place] = []
        found = []
        for batch_places, batch in self.batches(self.units()):
            outputs = self.network(batch.inputs)
            places += batch_places
            found.append(
                torch.stack([_loss(task, outputs, batch.targets) for task in self.reader.tasks], 1).cpu().numpy()
            )
        losses = np.concatenate(found)
        counts = (~np.isnan(losses)).sum(0)
        mean = np.nansum(losses, 0) / np.maximum(counts, 1)
        return places, losses / np.where(mean > 0, mean, 1)

    def samples(self, count: int) -> dict[str, Any]:
        """Random and worst samples: pictures of dense tasks, and a table of the labels of the others."""
        places, losses = self.losses()
        dense = [n for n, task in enumerate(self.reader.tasks) if task.dense]
        plain = [n for n, task in enumerate(self.reader.tasks) if not task.dense]
        found: dict[str, Any] = {"split": self.split, "examined": len(places),
                                 "of": self.reader.manifest.rows(self.split)}  # fmt: skip
        if dense:
            order = _worst_first(losses[:, dense])
            drawn = np.random.default_rng(self.seed).permutation(order[count:])[:count]
            found |= self._pictures(places, {"some": sorted(drawn), "worst": order[:count]}, losses[:, dense])
        if plain:
            found["labels"] = self._labels(places, losses, plain)
        return found

    def _pictures(
        self, places: Sequence[Place], chosen: Mapping[str, Sequence[int]], losses: np.ndarray
    ) -> dict[str, Any]:
        reader = replace(self.reader, tasks=tuple(task for task in self.reader.tasks if task.dense))
        pairs = {i: self._pair(*places[i]) for indices in chosen.values() for i in indices}
        sheet = Sheet([sample for pair in pairs.values() for sample in pair], reader)
        shown = {
            i: {
                "id": target.id,
                "loss": float(np.nanmean(losses[i])),
                "input": asdict(sheet.input(target)),
                "tasks": [
                    {"name": a.name, "target": asdict(a), "prediction": asdict(b)}
                    for a, b in zip(sheet.labels(target), sheet.labels(guess), strict=True)
                ],
            }
            for i, (target, guess) in pairs.items()
        }
        legends = [asdict(legend) for legend in sheet.legends() if legend.name != "input"]
        return {key: [shown[i] for i in indices] for key, indices in chosen.items()} | {"legends": legends}

    @torch.inference_mode()
    def _pair(self, unit: Unit, row: int) -> tuple[Sample, Sample]:
        """A stored sample, and the same sample with predictions instead of labels."""
        arrays = self.reader.read(unit.file, unit.group)
        outputs = self.network(self._batch(arrays, np.array([row])).inputs)
        labels = {name: values[row] for name, values in arrays.labels.items()}
        present = {name: there[row] for name, there in arrays.present.items()}
        guesses = {task.name: task.decode(outputs[task.name])[0].cpu().numpy() for task in self.reader.tasks}
        sample = Sample(ids_of(self.reader, unit.file, unit.group)[row], arrays.inputs[row], labels, present)
        return sample, Sample(f"{sample.id}, predicted", sample.inputs, guesses, {})

    def _labels(self, places: Sequence[Place], losses: np.ndarray, columns: Sequence[int]) -> list[dict[str, Any]]:
        """The labels of sample-wise tasks with the highest losses, `ROWS_EACH` of each task."""
        rows = []
        for n in columns:
            worst = [i for i in np.argsort(-np.nan_to_num(losses[:, n], nan=-1.0)) if not np.isnan(losses[i, n])]
            for i in worst[:ROWS_EACH]:
                task = self.reader.tasks[n]
                sample, guess = self._pair(*places[i])
                shown = Sheet([sample], self.reader).input(sample)
                rows.append(
                    {
                        "id": sample.id,
                        "task": task.name,
                        "target": in_words(task, sample.labels[task.name]),
                        "prediction": prediction_text(task, guess.labels[task.name]),
                        "loss": float(losses[i, n]),
                        "input": asdict(shown),
                    }
                )
        return rows


def prediction_text(task: Task, guess: np.ndarray) -> str:
    """A prediction of a sample-wise task: the most likely class with its probability, or numbers and unit."""
    if task.kind == "binary":
        return f"{in_words(task, np.asarray(guess > 0.5))} ({max(float(guess), 1 - float(guess)):.0%})"
    if task.classes:
        return f"{statistics.class_name(task, int(guess.argmax()))} ({float(guess.max()):.0%})"
    return in_words(task, guess)


def _loss(task: Task, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Mean loss of each sample's labels; NaN without labels."""
    target = targets[task.name]
    count = valid(task, target).reshape(len(target), -1).sum(1)
    return sample_loss(task, outputs[task.name], target) / count.where(count > 0, torch.nan)


def _worst_first(losses: np.ndarray) -> list[int]:
    """Samples by their mean loss over the tasks with labels, worst first; samples without labels are left out."""
    known = np.flatnonzero(~np.isnan(losses).all(1))
    means = np.nanmean(losses[known], 1)
    return [int(i) for i in known[np.argsort(-means, kind="stable")]]
