"""`dmtg inspect`: statistics of the shards, and problems that make training on them impossible."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from dmtg_core.tasks import Task
from pipelines.config.loading import Config
from pipelines.data import statistics
from pipelines.data.manifest import (
    SPLITS,
    Manifest,
    broken_shards,
    read_manifest,
    repeated_notes,
    support_notes,
)
from pipelines.data.reader import Reader
from pipelines.data.renewal import stale_notes
from pipelines.report.dataset import dataset_page
from pipelines.report.formatting import quantity
from pipelines.runs.folders import check_page
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)

PAGE = "inspect.html"
MOST_CLASSES = 20  # classes of a task in the table; the most frequent ones if there are more


def inspect(config: Config, out: str = "") -> dict[str, Any]:
    """Inspect the shards and write a page: statistics of each task and split, problems and notes.

    Args:
        config: The configuration, which names the shards and tasks.
        out: File or folder of the page. The default is `_inspect.html` beside the manifest, or
            `<name>-inspect.html` in `run.root` if the shards are remote or not writable.

    Returns:
        The fields of the JSON object. Problems stop training; notes do not.

    Raises:
        UserError: If there is no data set, or the page cannot be written.
    """
    folder = locate(config.data.shards)
    manifest = read_manifest(folder)
    tasks = manifest.tasks(config.data.tasks, str(folder))
    logger.info("checking the shards in %s", folder)
    page = _target(config, folder, out)
    check_page(page, "--out")
    broken = broken_shards(folder, manifest, checksums=True)
    problems = broken + _constant(manifest, tasks)
    notes = support_notes(manifest, tasks, config.data.min_support) + _drifts(manifest, tasks)
    notes += repeated_notes(manifest)
    notes += [*stale_notes(config, manifest), *manifest.description.notes]
    reader, unreadable = Reader(folder, manifest, tasks), {problem.partition(" ")[0] for problem in broken}
    logger.info("writing the page")
    drawn = dataset_page(config.name, reader, problems=problems, notes=notes, unreadable=unreadable)
    page.write_text(drawn)
    return {
        "rows": sum(manifest.rows(split) for split in SPLITS),
        "quarantined": manifest.quarantined,
        "digest": manifest.digest(),
        "problems": problems,
        "notes": notes,
        "repeated": dict(manifest.repeated),
        "table": _table(manifest, tasks),
        "statistics": {
            split: {task.name: statistics.summary(manifest.sums[split][task.name]) for task in tasks}
            for split in SPLITS
            if manifest.rows(split)
        },
        "page": str(page),
    }


def _target(config: Config, folder: Location, out: str) -> Location:
    if out:
        chosen = locate(out)
        return chosen / PAGE if chosen.is_dir() else chosen
    if folder.local is not None and os.access(folder.local, os.W_OK):
        return folder / f"_{PAGE}"
    return locate(config.run.root) / f"{config.name}-{PAGE}"


def _constant(manifest: Manifest, tasks: Sequence[Task]) -> list[str]:
    reasons = {task.name: statistics.constant(manifest.sums["train"][task.name]) for task in tasks}
    return [f"task {name} is constant in the training split: {why}" for name, why in reasons.items() if why]


def _drifts(manifest: Manifest, tasks: Sequence[Task]) -> list[str]:
    notes = []
    for task in tasks:
        for split in SPLITS[1:]:
            if manifest.rows(split):
                sums = [manifest.sums[which][task.name] for which in ("train", split)]
                drift = statistics.drift(task, *sums)
                notes += [f"task {task.name} differs in {split}: {drift}"] if drift else []
    return notes


def _table(manifest: Manifest, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    rows = []
    for task in tasks:
        for split in SPLITS:
            if not manifest.rows(split):
                continue
            found = statistics.summary(manifest.sums[split][task.name])
            rows.append(
                {
                    "task": task.name,
                    "kind": task.kind,
                    "split": split,
                    "rows": found["rows"],
                    "missing": f"{found['missing_rate']:.1%}",
                    **{key: _figure(found.get(key), task.unit) for key in ("mean", "std", "min", "max")},
                    "classes": _shares(task, found.get("classes")),
                }
            )
    return rows


def _figure(value: float | None, unit: str) -> str:
    """A raw value with its unit; empty if the task has none."""
    return "" if value is None else quantity(value, unit)


def _shares(task: Task, classes: list[int] | None) -> str:
    if not classes:
        return ""
    total = sum(classes) or 1
    present = [i for i, count in enumerate(classes) if count]
    shown = present if len(present) <= MOST_CLASSES else sorted(present, key=lambda i: -classes[i])[:MOST_CLASSES]
    rest = f" and {len(present) - len(shown)} more" if len(shown) < len(present) else ""
    return "  ".join(f"{statistics.class_name(task, i)}: {classes[i] / total:.1%}" for i in shown) + rest
