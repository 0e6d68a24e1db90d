"""The values of the metrics of a run, from the files of its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.monitoring.exporter import Series, Values
from pipelines.monitoring.names import (
    CHECKPOINT,
    ENTROPY,
    EPOCH,
    GAIN,
    GPU_MEMORY,
    GROUPS,
    LOST_WORKERS,
    SAMPLES,
    SCORE,
    STEP,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    WAITING,
)
from pipelines.runs.events import LOST, Event


def run_values(run: str, records: Iterable[Mapping[str, Any]], events: Iterable[Event]) -> Values:
    """The values of a run.

    Args:
        run: Its name.
        records: The records of its epochs; records of earlier versions lack some figures.
        events: Its events.
    """
    last = {record["stage"]: record for record in records}
    found: dict[Series, float | None] = {(LOST_WORKERS, (run,)): sum(one["kind"] == LOST for one in events)}
    for stage, record in last.items():
        labels = (run, stage)
        found |= {
            (EPOCH, labels): record["epoch"], (SCORE, labels): record["val_score"],
            (GAIN, labels): record.get("gain"), (ENTROPY, labels): record["gate"]["entropy"],
            (GROUPS, labels): record.get("groups"), (SAMPLES, labels): record["samples_per_second"],
            (WAITING, labels): record["data_share"], (CHECKPOINT, (run,)): record.get("checkpoint_seconds"),
            (GPU_MEMORY, (run,)): record.get("gpu_memory"),
        }  # fmt: skip
        for task, loss in record["train_loss"].items():
            found[TRAIN_LOSS, (*labels, task)] = loss
            found[VALIDATION_LOSS, (*labels, task)] = record["val"][task]["loss"]
    return {series: float(value) for series, value in found.items() if value is not None}


def step_values(run: str, profile: Mapping[str, Any]) -> Values:
    """The time of each part of a step.

    Args:
        run: Name of the run.
        profile: As `dmtg_core.training.profile.profile_steps` returns it.
    """
    return {(STEP, (run, part)): share * profile["seconds_per_step"] for part, share in profile["shares"].items()}
