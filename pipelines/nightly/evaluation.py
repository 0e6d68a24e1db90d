"""Evaluation of champion and challenger on the same samples, and the rule of promotion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from dmtg_core.evaluation.bootstrap import BlockSums, Comparison, Gain, compare
from dmtg_core.own_code import code_of_tasks
from pipelines.config.code import allow_named, check_allowed
from pipelines.config.loading import Config
from pipelines.config.regroup_section import RegroupSection
from pipelines.data.manifest import check_shards, read_manifest
from pipelines.data.reader import Reader
from pipelines.data.stream import StreamData
from pipelines.errors import UserError
from pipelines.runs.files import MODELS
from pipelines.runs.models import group_names, read_model
from pipelines.serving.evaluate import outputs_for
from pipelines.storage import Location, locate

VERDICT = "verdict.json"  # file of a nightly run
PROMOTED, KEPT = "promoted", "kept"


def evaluate(config: Config, evaluation: str, digest: str, run: Location) -> dict[str, Any]:
    """Evaluate both models on the evaluation split, over the tasks that both have.

    It runs as a task of the executor.

    Args:
        config: Configuration.
        evaluation, digest: Evaluation data: address, and data digest at the start of the nightly run.
        run: Folder of the nightly run, with the champion's models and the challenger's run.

    Returns:
        A `Comparison` as a dictionary, with `headline` metrics and `champion_groups`.

    Raises:
        UserError: If the shards have changed. Their checksums are verified in every nightly run.
    """
    allow_named(config.model_dump())
    trust = config.run.trust_code
    folder = locate(evaluation)
    manifest = read_manifest(folder)
    if manifest.digest() != digest:
        raise UserError(
            "the evaluation data has changed during the nightly run",
            where=evaluation,
            remedy="delete the folder of the nightly run and start from scratch",
        )
    split: str = config.regroup.split
    check_shards(folder, replace(manifest, shards={split: manifest.shards[split]}), checksums=True)
    sides = {"champion": run / "champion", "challenger": run / "challenger" / MODELS}
    models = {
        side: {name: read_model(place / name, trust_code=trust) for name in group_names(place)}
        for side, place in sides.items()
    }
    served = {side: {t.name for model in held.values() for t in model.tasks} for side, held in models.items()}
    common = served["champion"] & served["challenger"]
    tasks = [task for task in manifest.tasks(None, evaluation) if task.name in common]
    check_allowed(code_of_tasks(tasks), trust_code=trust)
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
    """Read the result of `evaluate` from JSON, where numbers that are not finite are null."""

    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    def gain(values: Mapping[str, float | None]) -> Gain:
        return Gain(*(number(values[key]) for key in ("value", "low", "high")))

    by_task = {name: gain(values) for name, values in found["by_task"].items()}
    sides = (found["champion"], found["challenger"])
    return Comparison(gain(found["gain"]), by_task, *sides, number(found["likely"]), found["samples"])


def verdict_of(found: Mapping[str, Any], rules: RegroupSection) -> tuple[str, str]:
    """The verdict, promoted or kept, and its reason.

    The challenger is promoted if the mean gain is at least the margin, its interval lies above zero, and no task
    loses more than its limit. With an undefined value the champion is kept.
    """
    compared = comparison_of(found)
    gain, percent = compared.gain, f"{rules.confidence:.0%}"
    shown = f"gain {gain.value:+.2f} % ({percent} interval {gain.low:+.2f} to {gain.high:+.2f} %)"
    if not gain.value >= rules.margin:
        return KEPT, f"{shown}, less than the margin of {rules.margin:g} %"
    if not gain.low > 0:
        return KEPT, f"{shown}, not significant"
    worse = [
        f"{name} {one.value:+.2f} %, the limit is {0 - limit:g} %"
        for name, one in compared.by_task.items()
        if (limit := rules.limits.get(name, rules.limit)) is not None and not -one.value <= limit
    ]
    if worse:
        return KEPT, f"{shown}, but single tasks lose too much: {'; '.join(worse)}"
    return PROMOTED, shown
