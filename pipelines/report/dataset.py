"""The page of a data set: what the manifest counts, and some samples as pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from dmtg_core.tasks import Task
from pipelines import statistics
from pipelines.ingest import Reader
from pipelines.manifest import SPLITS, Manifest
from pipelines.report import TEMPLATES, pictures
from pipelines.report.contact_sheet import Sheet, pick
from pipelines.statistics import class_name
from pipelines.storage import Location

SAMPLES = 12
ENDS = 20  # of many classes, so many of the most and of the least frequent are shown
QUARANTINE = "_quarantine.jsonl"


def dataset_page(title: str, reader: Reader, found: Mapping[str, Any]) -> str:
    """A data set as HTML.

    Args:
        title: Name of the data set.
        reader: Of its shards and the tasks to show.
        found: What `pipelines.inspect.inspect` found: `problems`, `notes`, `broken` (files that cannot be read).
    """
    manifest, tasks = reader.manifest, reader.tasks
    splits = [split for split in SPLITS if manifest.rows(split)]
    sample_wise = [task for task in tasks if task.kind == "binary"]
    samples = pick(reader, SAMPLES, found["broken"])
    sheet = Sheet(samples, reader)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "percent": percent}
    return environment.get_template("dataset.html").render(
        title=title,
        folder=str(reader.folder),
        manifest=manifest,
        splits=splits,
        problems=found["problems"],
        notes=found["notes"],
        reasons=frequent_reasons(reader.folder),
        tasks=[task_row(manifest, task, splits) for task in tasks],
        flags=[flag_row(manifest, task, splits) for task in sample_wise],
        classes=[class_table(manifest, task, splits) for task in tasks if task.classes],
        values=[row for task in tasks if "regression" in task.kind for row in value_rows(manifest, task, splits)],
        input_kind=manifest.description.input.kind,
        samples=[(sample.id, sheet.input(sample), sheet.labels(sample)) for sample in samples],
        legends=sheet.legends(),
        ramp=pictures.ramp(),
        stripes=pictures.stripes(),
        source=json.dumps(dict(manifest.source), indent=2, default=str),
        style=Markup("".join((TEMPLATES / f"{name}.css").read_text() for name in ("page", "dataset"))),  # noqa: S704 - files of this package
    )


def figure(value: float | None) -> str:
    """A number with four digits, or a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A share in per cent; what is there and yet less than is shown says so."""
    if value is None:
        return "–"
    return "< 0.1 %" if 0 < value < 0.001 else f"{value:.1%}".replace("%", " %")


def task_row(manifest: Manifest, task: Task, splits: Sequence[str]) -> dict[str, Any]:
    """Kind and unit of a task, and a split: the share of samples without a label, and of pixels in the others."""
    gaps = []
    for split in splits:
        sums = manifest.sums[split][task.name]
        labelled = sums["rows"] - sums["missing"]
        pixels = _size(manifest, task) * labelled
        unlabelled = 1 - sums["values"] / pixels if task.dense and pixels else None
        gaps.append({"samples": sums["missing"] / sums["rows"], "pixels": unlabelled})
    return {"name": task.name, "kind": task.kind.replace("_", " "), "unit": task.unit, "gaps": gaps}


def _size(manifest: Manifest, task: Task) -> int:
    """Values that a sample's label has."""
    size = 1
    for length in manifest.description.columns[f"task.{task.name}"].shape:
        size *= length
    return size


def flag_row(manifest: Manifest, task: Task, splits: Sequence[str]) -> dict[str, Any]:
    """Count and share of class 1 in every split."""
    found = [manifest.sums[split][task.name] for split in splits]
    return {"name": task.name, "counts": [sums["classes"][1] for sums in found], "shares": _shares(found, 1)}


def _shares(found: Sequence[statistics.Sums], number: int) -> list[float | None]:
    return [sums["classes"][number] / sums["values"] if sums["values"] else None for sums in found]


def class_table(manifest: Manifest, task: Task, splits: Sequence[str]) -> dict[str, Any]:
    """A row a class with its count in the training split and its share of the labels of every split.

    Of many classes the most and the least frequent ones are kept, and `left_out` says how many are not.
    """
    found = [manifest.sums[split][task.name] for split in splits]
    counts = manifest.sums["train"][task.name]["classes"]
    numbers = [number for number in range(len(counts)) if number != task.ignore_index]
    kept = numbers
    if len(numbers) > 2 * ENDS:
        ordered = sorted(numbers, key=lambda number: -counts[number])
        kept = ordered[:ENDS] + ordered[-ENDS:]
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
        "left_out": len(numbers) - len(kept),
        "empty": sum(counts[number] == 0 for number in numbers),
        "classes": len(numbers),
    }


def value_rows(manifest: Manifest, task: Task, splits: Sequence[str]) -> list[dict[str, Any]]:
    """A row a channel and split: mean, deviation and range in raw and in network units."""
    rows = []
    for channel in range(task.channels):
        for split in splits:
            sums = manifest.sums[split][task.name]
            found = statistics.moments(sums["channels"][channel] if task.channels > 1 else sums)
            rows.append(
                {
                    "name": f"{task.name}, channel {channel}" if task.channels > 1 else task.name,
                    "unit": task.unit,
                    "split": split,
                    "raw": found,
                    "network": statistics.in_network_units(task, found, channel),
                }
            )
    return rows


def frequent_reasons(folder: Location, most: int = 8) -> list[dict[str, Any]]:
    """Why samples were left out, the most frequent first, each with how many they are and one of them."""
    file = folder / QUARANTINE
    bad = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    alike: dict[str, list[dict[str, str]]] = {}
    for one in bad:
        # what names a file or a number differs from sample to sample
        alike.setdefault(re.sub(r"\S*[\d/]\S*", "…", one["reason"].replace(one["id"], "…")), []).append(one)
    ordered = sorted(alike.values(), key=len, reverse=True)[:most]
    return [{"count": len(group), **group[0]} for group in ordered]
