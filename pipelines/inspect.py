"""`dmtg inspect`: what the shards hold, and whether training on them makes sense."""

from __future__ import annotations

from typing import Any

from pipelines import statistics
from pipelines.config import Config
from pipelines.manifest import SPLITS, Manifest, broken_shards, read_manifest
from pipelines.storage import locate
from pipelines.train import support_notes


def inspect(config: Config) -> dict[str, Any]:
    """Statistics a task and split, problems that stop training, and notes that do not.

    Raises:
        UserError: When there is no dataset.
    """
    folder = locate(config.data.shards)
    manifest = read_manifest(folder)
    tasks = manifest.tasks(config.data.tasks, str(folder))
    problems = broken_shards(folder, manifest, checksums=True)
    for task in tasks:
        reason = statistics.constant(manifest.sums["train"][task.name])
        if reason:
            problems.append(f"task {task.name} is constant in the training split: {reason}")
    return {
        "rows": sum(manifest.rows(split) for split in SPLITS),
        "quarantined": manifest.quarantined,
        "digest": manifest.digest(),
        "problems": problems,
        "notes": support_notes(manifest, tasks, config.data.min_support),
        "table": _table(manifest, [task.name for task in tasks]),
        "statistics": {
            split: {task.name: statistics.summary(manifest.sums[split][task.name]) for task in tasks}
            for split in SPLITS
            if manifest.rows(split)
        },
    }


def _table(manifest: Manifest, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    kinds = {task.name: task.kind for task in manifest.description.tasks}
    for name in names:
        for split in SPLITS:
            if not manifest.rows(split):
                continue
            found = statistics.summary(manifest.sums[split][name])
            rows.append(
                {
                    "task": name,
                    "kind": kinds[name],
                    "split": split,
                    "rows": found["rows"],
                    "missing": f"{found['missing_rate']:.1%}",
                    **{key: f"{found[key]:.4g}" if key in found else "" for key in ("mean", "std", "min", "max")},
                    "classes": _shares(found.get("classes")),
                }
            )
    return rows


def _shares(classes: list[int] | None) -> str:
    if not classes:
        return ""
    total = sum(classes) or 1
    return " ".join(f"{i}:{count / total:.1%}" for i, count in enumerate(classes) if count)
