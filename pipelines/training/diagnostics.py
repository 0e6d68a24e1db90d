"""What a run's page shows beside the result, measured when training ends: intervals, costs, samples."""

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
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel, NetworkSpec, clone
from dmtg_core.search.search import SearchResult
from dmtg_core.tasks import Task
from dmtg_core.training.data import Arrays, Batch
from dmtg_core.training.losses import sample_loss, valid
from pipelines.data import statistics
from pipelines.data.manifest import SPLITS
from pipelines.data.reader import Reader
from pipelines.data.stream import Unit, all_units
from pipelines.report.contact_sheet import Sample, Sheet, ids_of, in_words
from pipelines.training.latency import costs

EXAMINED = 2**30  # bytes of samples that are looked at one by one; of larger splits a part that is drawn
RESAMPLES, CONFIDENCE = 1000, 0.95
ROWS_EACH = 3  # of a task in the table of the worst labels
PACKAGES = ("dmtg", "torch", "torchvision", "ray", "mlflow", "numpy", "pyarrow")
Place = tuple[Unit, int]  # a row of a row group


def details_of(
    result: SearchResult, reader: Reader, spec: NetworkSpec, *, samples: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """All of it, JSON-ready.

    Args:
        result: The search, on the device that it is to be measured on.
        reader: Of the run's tasks.
        spec: The network that was configured.
        samples: How many to keep as pictures, of either sort; 0 keeps no data at all.
        batch_size: Samples that are computed at once.
        seed: Of what is drawn.
    """
    split = "test" if "test" in result.metrics else "val"
    # copies are not compiled: they are used with batches of other sizes, and beside networks that are not either
    network, naive = clone(result.network), result.naive and clone(result.naive)
    look = Look(network, naive, reader, split, batch_size, seed)
    return {
        "versions": versions(),
        "data": data_of(reader),
        "cost": costs(network, spec),
        "intervals": look.intervals(),
        "samples": look.samples(samples) if samples else None,
    }


def versions() -> dict[str, str]:
    """Python and the packages that a result can depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def data_of(reader: Reader) -> dict[str, Any]:
    """The data set in short: samples of each split, and of each task what the training labels are."""
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
                "labels": labels_in_words(task, manifest.sums["train"][task.name]),
                "missing": statistics.summary(manifest.sums["train"][task.name])["missing_rate"],
            }
            for task in reader.tasks
        ],
    }


def labels_in_words(task: Task, sums: statistics.Sums) -> str:
    """The labels of a split: the most frequent classes, or mean, deviation and range."""
    if not sums["values"]:
        return "none"
    if "classes" in sums:
        shares = sorted(((count / sums["values"], i) for i, count in enumerate(sums["classes"])), reverse=True)
        shown = [f"{statistics.class_name(task, i)} {share:.0%}" for share, i in shares[:3] if share]
        return ", ".join(shown) + (f", {len(shares) - 3} more" if len(shares) > 3 else "")
    found = statistics.moments(sums)
    unit = f" ({task.unit})" if task.unit else ""
    return "mean {mean:.4g}, deviation {std:.4g}, {min:.4g} to {max:.4g}".format(**found) + unit


class Together(nn.Module):
    """The models of all groups as the one network that they are.

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
class Look:
    """A look at the samples of a split, one by one.

    Args:
        network: The result, as `GroupingNetwork` or `Together`.
        naive: The network of naive MTL.
        reader: Of the run's tasks.
        split: Which samples.
        batch_size: Samples that are computed at once.
        seed: Of what is drawn.
    """

    network: nn.Module
    naive: GroupingNetwork | None
    reader: Reader
    split: str
    batch_size: int
    seed: int

    def units(self) -> list[Unit]:
        """Row groups to look at: all of the split, or so many that are drawn."""
        units = all_units(self.reader, self.split)
        rows = max(EXAMINED // self.reader.row_bytes(), 1)
        drawn = np.random.default_rng(self.seed).permutation(len(units))
        before = np.concatenate([[0], np.cumsum([units[i].rows for i in drawn])[:-1]])
        return [units[i] for i in sorted(drawn[before < rows])]

    def batches(self, units: Sequence[Unit]) -> Iterator[tuple[list[Place], Batch]]:
        """The samples of some row groups in their order, encoded on the network's device, with where they are."""
        for unit in units:
            arrays = self.reader.read(unit.file, unit.group)
            for start in range(0, unit.rows, self.batch_size):
                rows = np.arange(start, min(start + self.batch_size, unit.rows))
                yield [(unit, int(row)) for row in rows], self._batch(arrays, rows)

    def _batch(self, arrays: Arrays, rows: np.ndarray) -> Batch:
        return arrays.batch(self.reader.tasks, rows, next(self.network.parameters()).device)

    @torch.inference_mode()
    def intervals(self) -> dict[str, Any] | None:
        """The gain over naive MTL with a paired bootstrap over the samples; None where only some are looked at."""
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
        """Every sample that is looked at, and its loss in each task over the mean of all, NaN without a label."""
        places: list[Place] = []
        found = []
        for where, batch in self.batches(self.units()):
            outputs = self.network(batch.inputs)
            places += where
            found.append(
                torch.stack([_loss(task, outputs, batch.targets) for task in self.reader.tasks], 1).cpu().numpy()
            )
        losses = np.concatenate(found)
        counts = (~np.isnan(losses)).sum(0)
        mean = np.nansum(losses, 0) / np.maximum(counts, 1)
        return places, losses / np.where(mean > 0, mean, 1)

    def samples(self, count: int) -> dict[str, Any]:
        """Some samples and the worst ones: pictures of dense tasks, a table of the labels of the others."""
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
        """A stored sample, and the same with what the network says in the place of its labels."""
        arrays = self.reader.read(unit.file, unit.group)
        outputs = self.network(self._batch(arrays, np.array([row])).inputs)
        labels = {name: values[row] for name, values in arrays.labels.items()}
        present = {name: there[row] for name, there in arrays.present.items()}
        guesses = {task.name: task.decode(outputs[task.name])[0].cpu().numpy() for task in self.reader.tasks}
        sample = Sample(ids_of(self.reader, unit.file, unit.group)[row], arrays.inputs[row], labels, present)
        return sample, Sample(f"{sample.id}, predicted", sample.inputs, guesses, {})

    def _labels(self, places: Sequence[Place], losses: np.ndarray, columns: Sequence[int]) -> list[dict[str, Any]]:
        """The labels of sample-wise tasks that the network is farthest from, a few of each task."""
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
                        "prediction": logged(task, guess.labels[task.name]),
                        "loss": float(losses[i, n]),
                        "input": asdict(shown),
                    }
                )
        return rows


def logged(task: Task, guess: np.ndarray) -> str:
    """A prediction of a sample-wise task: the likeliest class and how likely, or numbers with their unit."""
    if task.kind == "binary":
        return f"{in_words(task, np.asarray(guess > 0.5))} ({max(float(guess), 1 - float(guess)):.0%})"
    if task.classes:
        return f"{statistics.class_name(task, int(guess.argmax()))} ({float(guess.max()):.0%})"
    return in_words(task, guess)


def _loss(task: Task, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Mean loss of each sample's labels; NaN where it has none."""
    target = targets[task.name]
    count = valid(task, target).reshape(len(target), -1).sum(1)
    return sample_loss(task, outputs[task.name], target) / count.where(count > 0, torch.nan)


def _worst_first(losses: np.ndarray) -> list[int]:
    """Samples by their mean over the tasks in which they have labels; those without any are left out."""
    known = np.flatnonzero(~np.isnan(losses).all(1))
    means = np.nanmean(losses[known], 1)
    return [int(i) for i in known[np.argsort(-means, kind="stable")]]
