"""Champion and challenger on the same frozen samples, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from dmtg_core.evaluation.bootstrap import BlockSums, Comparison, Gain, compare
from pipelines.config.loading import Config
from pipelines.config.sections import RegroupSection
from pipelines.data.manifest import read_manifest
from pipelines.data.reader import Reader
from pipelines.data.stream import StreamData
from pipelines.errors import UserError
from pipelines.runs.files import MODELS
from pipelines.runs.models import read_model
from pipelines.serving.evaluate import outputs_for
from pipelines.storage import Location, locate


def judge(config: Config, evaluation: str, digest: str, night: Location) -> dict[str, Any]:
    """Measure both on the evaluation split, over the tasks that both have. Runs as a Ray task.

    Args:
        evaluation, digest: Shards, and what they were when the night began.
        night: Folder with the champion's models, and the challenger's run.

    Returns:
        A `Comparison` as a dictionary, with `headline` metrics and `champion_groups`.

    Raises:
        UserError: When the shards have changed.
    """
    folder = locate(evaluation)
    manifest = read_manifest(folder)
    if manifest.digest() != digest:
        raise UserError(
            "the evaluation data was changed during the night",
            where=evaluation,
            remedy="delete the night's folder and begin it anew",
        )
    sides = {"champion": night / "champion", "challenger": night / "challenger" / MODELS}
    models = {side: {name: read_model(place / name) for name in place.folders()} for side, place in sides.items()}
    served = {side: {t.name for model in held.values() for t in model.tasks} for side, held in models.items()}
    common = served["champion"] & served["challenger"]
    tasks = [task for task in manifest.description.tasks if task.name in common]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = Reader(folder, manifest, tuple(tasks))
    data = StreamData(reader, config.data, seed=0, rank=0, world_size=1, device=device)
    rows = manifest.rows(config.regroup.split)
    sums = {side: BlockSums(tasks, rows) for side in models}
    for held in models.values():
        for model in held.values():
            model.to(device).eval()
    with torch.inference_mode():
        for batch in data.evaluate(config.regroup.split, config.train.batch_size):
            for side, held in models.items():
                sums[side].update(outputs_for(tasks, held.values(), batch.inputs), batch.targets)
    found = compare(
        sums["champion"], sums["challenger"],
        resamples=config.regroup.resamples, confidence=config.regroup.confidence, seed=config.train.seed,
    )  # fmt: skip
    groups = {name: [task.name for task in model.tasks] for name, model in models["champion"].items()}
    return asdict(found) | {"headline": {task.name: task.metric for task in tasks}, "champion_groups": groups}


def comparison_of(found: Mapping[str, Any]) -> Comparison:
    """What `judge` gave, read back from JSON: what was not finite is null there and counts as undefined."""

    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    def gain(values: Mapping[str, float | None]) -> Gain:
        return Gain(*(number(values[key]) for key in ("value", "low", "high")))

    by_task = {name: gain(values) for name, values in found["by_task"].items()}
    sides = (found["champion"], found["challenger"])
    return Comparison(gain(found["gain"]), by_task, *sides, number(found["likely"]), found["samples"])


def verdict_of(found: Mapping[str, Any], rules: RegroupSection) -> tuple[str, str]:
    """Promoted or kept, and why, in words.

    The challenger takes over where the mean error falls by the margin, the interval of that lies above zero, and
    no task's error rises by more than its limit. What is not defined speaks for the champion.
    """
    compared = comparison_of(found)
    gain, percent = compared.gain, f"{rules.confidence:.0%}"
    shown = f"mean error {-gain.value:+.2f} % ({percent} interval {-gain.high:+.2f} to {-gain.low:+.2f} %)"
    if not gain.value >= rules.margin:
        return "kept", f"{shown}: it had to fall by {rules.margin:g} %"
    if not gain.low > 0:
        return "kept", f"{shown}: that may be chance"
    worse = [
        f"{name} {-one.value:+.2f} %, allowed {limit:+g} %"
        for name, one in compared.by_task.items()
        if (limit := rules.limits.get(name, rules.limit)) is not None and not -one.value <= limit
    ]
    if worse:
        return "kept", f"{shown}, but the error of single tasks rose too far: {'; '.join(worse)}"
    return "promoted", shown
