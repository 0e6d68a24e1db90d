"""The page of a data set: statistics of the manifest, and some samples as pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dmtg_core.tasks import Task
from pipelines.data import statistics
from pipelines.data.manifest import SPLITS, Manifest
from pipelines.data.reader import Reader
from pipelines.data.shards import QUARANTINE
from pipelines.data.statistics import class_name
from pipelines.report import pictures
from pipelines.report.contact_sheet import Sheet, pick
from pipelines.report.features import features_of
from pipelines.report.formatting import in_unit
from pipelines.report.render import render
from pipelines.runs.files import each_jsonl
from pipelines.storage import Location

SAMPLES = 12
REASONS, LONGEST = 1000, 200  # different reasons of quarantine that are counted, and their characters
ENDS = 20  # classes at each end of a long table: the most and the least frequent ones


def dataset_page(
    title: str, reader: Reader, *, problems: Sequence[str], notes: Sequence[str], unreadable: Collection[str]
) -> str:
    """Render the page of a data set as HTML.

    Args:
        title: Name of the data set.
        reader: Reader of the shards and of the tasks to show.
        problems: Problems that stop training.
        notes: Notes that do not stop training.
        unreadable: Files of damaged shards, from which no samples are drawn.
    """
    manifest, tasks = reader.manifest, reader.tasks
    splits = [split for split in SPLITS if manifest.rows(split)]
    numeric = [task for task in tasks if not task.classes and task.kind != "binary"]
    samples = pick(reader, SAMPLES, unreadable)
    sheet = Sheet(samples, reader)
    return render(
        "dataset.html",
        styles=("page", "sheet", "dataset"),
        title=title,
        folder=str(reader.folder),
        manifest=manifest,
        splits=splits,
        problems=problems,
        notes=notes,
        reasons=frequent_reasons(reader.folder),
        tasks=[task_row(manifest, task, splits) for task in tasks],
        flags=[flag_row(manifest, task, splits) for task in tasks if task.kind == "binary"],
        classes=[class_table(manifest, task, splits) for task in tasks if task.classes],
        features=features_of(reader, unreadable),
        kind=manifest.description.input.kind,
        dense=any(task.dense for task in tasks),
        values=[row for task in numeric for row in value_rows(manifest, task, splits)],
        samples=[(sample.id, sheet.input(sample), sheet.labels(sample)) for sample in samples],
        legends=sheet.legends(),
        ramp=pictures.ramp(),
        stripes=pictures.stripes(),
        source=json.dumps(dict(manifest.source), indent=2, default=str),
    )


def task_row(manifest: Manifest, task: Task, splits: Sequence[str]) -> dict[str, Any]:
    """Kind and unit of a task, and its missing labels in each split.

    Missing labels are the share of samples without a label, and the share of pixels without one in the others.
    """
    gaps = []
    for split in splits:
        sums = manifest.sums[split][task.name]
        labelled = sums["rows"] - sums["missing"]
        pixels = _size(manifest, task) * labelled
        unlabelled = 1 - sums["values"] / pixels if task.dense and pixels else None
        gaps.append({"samples": sums["missing"] / sums["rows"], "pixels": unlabelled})
    return {"name": task.name, "kind": task.kind.replace("_", " "), "unit": in_unit(0, task.unit)[1], "gaps": gaps}


def _size(manifest: Manifest, task: Task) -> int:
    """Number of values of a label."""
    size = 1
    for length in manifest.description.columns[f"task.{task.name}"].shape:
        size *= length
    return size


def flag_row(manifest: Manifest, task: Task, splits: Sequence[str]) -> dict[str, Any]:
    """Count and share of the positive class in every split."""
    found = [manifest.sums[split][task.name] for split in splits]
    return {"name": task.name, "counts": [sums["classes"][1] for sums in found], "shares": _shares(found, 1)}


def _shares(found: Sequence[statistics.Sums], number: int) -> list[float | None]:
    return [sums["classes"][number] / sums["values"] if sums["values"] else None for sums in found]


def class_table(manifest: Manifest, task: Task, splits: Sequence[str]) -> dict[str, Any]:
    """A row for each class with its count in the training split and its share of the labels of every split.

    If there are many classes, those without a label in train are left out. If there are very many, those between
    the most and the least frequent ones are left out too, and `left_out` is their number.
    """
    found = [manifest.sums[split][task.name] for split in splits]
    counts = manifest.sums["train"][task.name]["classes"]
    numbers = [number for number in range(len(counts)) if number != task.ignore_index]
    kept, left_out = numbers, 0
    if len(numbers) > 2 * ENDS:
        kept = sorted((number for number in numbers if counts[number]), key=lambda number: -counts[number])
        left_out = max(len(kept) - 2 * ENDS, 0)
        kept = kept[:ENDS] + kept[ENDS + left_out :]
    rows = [
        {"name": class_name(task, number), "count": counts[number], "shares": _shares(found, number)}
        for number in kept
    ]
    greatest = max((share or 0.0 for row in rows for share in row["shares"]), default=0.0)
    return {
        "name": task.name,
        "of": "pixels" if task.dense else "labels",
        "rows": rows,
        "greatest": greatest or 1.0,
        "left_out": left_out,
        "empty": sum(counts[number] == 0 for number in numbers),
        "classes": len(numbers),
    }


def value_rows(manifest: Manifest, task: Task, splits: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each channel and split: mean, deviation and range in raw and in network units."""
    rows = []
    for split in splits:
        channels = statistics.by_channel(manifest.sums[split][task.name])
        for number, sums in enumerate(channels):
            found = statistics.moments(sums)
            rows.append(
                {
                    "name": f"{task.name}, channel {number}" if len(channels) > 1 else task.name,
                    "channel": number,
                    "unit": in_unit(0, task.unit)[1],
                    "split": split,
                    "raw": {key: in_unit(value, task.unit)[0] for key, value in found.items()},
                    # each channel has its own constants
                    "network": _rounded(statistics.in_network_units(task, found, number))
                    if len(channels) == task.channels
                    else {},
                }
            )
    return sorted(rows, key=lambda row: row["channel"])


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    """Values in network units to four decimals: a mean of 7·10⁻¹⁰ is a rounding error."""
    return {key: round(value, 4) for key, value in found.items()}


def _without_figures(word: re.Match[str]) -> str:
    """A word without a digit and a slash; `…` for another."""
    return "…" if re.search(r"[\d/]", word[0]) else word[0]


def frequent_reasons(folder: Location, most: int = 8) -> list[dict[str, Any]]:
    """Reasons of quarantine, the most frequent first, each with the number of samples and one of them."""
    similar: dict[str, dict[str, Any]] = {}
    for one in each_jsonl(folder / QUARANTINE):
        # file names and numbers differ between samples with the same reason
        reason = re.sub(r"\S+", _without_figures, one["reason"].replace(one["id"], "…"))[:LONGEST]
        if reason in similar or len(similar) < REASONS:
            similar.setdefault(reason, {"count": 0, **one})["count"] += 1
    return sorted(similar.values(), key=lambda group: -group["count"])[:most]
