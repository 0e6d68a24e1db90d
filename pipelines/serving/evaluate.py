"""`dmtg evaluate`: metrics of a registered model or a finished run on the shards of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from dmtg_core.network.composite import Composite
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.own_code import code_of_tasks
from dmtg_core.tasks import Task
from dmtg_core.training.metrics import Metrics, MetricSums
from pipelines.config.code import allow_named, check_allowed
from pipelines.config.loading import Config
from pipelines.data.manifest import check_shards, read_manifest
from pipelines.data.reader import Reader
from pipelines.data.renewal import stale_notes
from pipelines.data.stream import StreamData
from pipelines.errors import UserError
from pipelines.serving.fitting import check_input, load_with_preparation, same_tasks
from pipelines.storage import locate

logger = logging.getLogger(__name__)


def evaluate(config: Config, model: str, split: str = "test", *, trust_code: bool = False) -> Metrics:
    """Metrics of a model on a split: task → metric → value.

    Args:
        model: `models:/…` address or a run folder.
        split: Split of the shards.
        trust_code: As `pipelines.registry.models.load_registered`.

    Raises:
        UserError: When model and shards do not fit, or the split is empty.
    """
    allow_named(config.model_dump())
    trust = trust_code or config.run.trust_code
    folder = locate(config.data.shards)
    manifest = read_manifest(folder)
    logger.info("checking the shards in %s", folder)
    check_shards(folder, manifest, checksums=config.data.verify_checksums)
    for note in stale_notes(config, manifest):
        logger.warning(note)
    groups, preparation = load_with_preparation(model, config.track, trust_code=trust)
    described = manifest.description
    for group in groups.values():
        check_input(group.spec.input, preparation, described.input, described.preparation, str(folder))
        same_tasks(group.tasks, described.tasks, str(folder))
    wanted = [task.name for group in groups.values() for task in group.tasks]
    tasks = manifest.tasks(wanted, str(folder))
    check_allowed(code_of_tasks(tasks), trust_code=trust)
    if not manifest.rows(split):
        raise UserError(
            f"the shards have no samples in split {split!r}", where=str(folder), remedy="use another split"
        )
    logger.info("evaluating %d samples", manifest.rows(split))
    reader = Reader(folder, manifest, tasks)
    data = StreamData(reader, config.data, seed=0, rank=0, world_size=1, device=torch.device("cpu"))
    sums = MetricSums(tasks)
    with torch.inference_mode():
        for batch in data.evaluate(split, config.train.batch_size):
            sums.update(outputs_for(tasks, groups.values(), batch.inputs), batch.targets)
    return sums.compute()


def outputs_for(
    tasks: Sequence[Task], groups: Iterable[GroupModel], inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Outputs of group models for stored input, for some tasks and in the network units of these.

    The outputs of a model have the units of the shards that it was trained on.
    """
    wanted = {task.name: task for task in tasks}
    composite = Composite(groups)
    outputs = composite(inputs)
    return {
        task.name: task.in_units_of(wanted[task.name], outputs[task.name])
        for task in composite.tasks
        if task.name in wanted
    }
