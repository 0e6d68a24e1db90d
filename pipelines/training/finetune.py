"""Training of each group on its own after the search, on Ray in parallel if the cluster has the resources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dmtg_core.addresses import CodeError
from dmtg_core.network.cost import inference_cost
from dmtg_core.tasks import Task
from dmtg_core.training.checkpoint import group_model
from dmtg_core.training.context import LocalContext
from dmtg_core.training.loop import advance, evaluate_splits, reporting, score_of
from dmtg_core.training.state import TrainState
from pipelines.config.loading import Config
from pipelines.data.ingest import open_data
from pipelines.execution.executor import Executor
from pipelines.runs.events import emitter
from pipelines.runs.files import CHECKPOINTS, DETAILS, MODELS, RESULT, SEARCHED
from pipelines.runs.models import group_names, read_model, write_model
from pipelines.runs.outcome import outcome
from pipelines.runs.results import gains, numbers, score_or_none
from pipelines.scratch import temporary_folder
from pipelines.storage import Location
from pipelines.training.context import TaskContext
from pipelines.training.failures import permanent_error, training_failed
from pipelines.training.worker import Job

GROUPS, MODEL, DONE = "groups", "model", "done.json"


def train_groups(job: Job, executor: Executor, log: Callable[[str], None]) -> None:
    """Train every group of a search for `search.group_epochs` epochs more and write the run's result.

    A group is a task of the executor. On Ray, groups run in parallel if resources are available. A group that an
    earlier call has finished is not trained again.

    Raises:
        UserError: When a group could not be trained.
    """
    config, searched = job.config, (job.run / SEARCHED).read_json()
    left = [
        (name, members, score_before(searched, [task for task in job.reader.tasks if task.name in members]))
        for name, members in searched["grouping"].items()
        if not _done(job.run, name).exists()
    ]
    log(f"training {len(left)} groups on their own, {config.search.group_epochs} epochs each")
    for done in executor.run(partial(_train_group, job), left):
        if done.error is not None:
            raise training_failed(done.error, str(job.run)) from done.error
        before, after = done.value
        log(f"{left[done.index][0]:>10} trained on its own: validation score {before:.4f} → {after:.4f}")
    _finish(job, searched, executor)


def _train_group(job: Job, group: tuple[str, Sequence[str], float]) -> tuple[float, float]:
    return train_group(job, *group)


def score_before(searched: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """The validation score of the tasks of a group at the end of the search."""
    return score_of(tasks, numbers({task.name: searched["validation"][task.name] for task in tasks}))


def train_group(job: Job, name: str, members: Sequence[str], before: float) -> tuple[float, float]:
    """Train one group in its own process; resumes from its last checkpoint.

    The model of the best epoch is written. If none has a better validation score, it is the model of the search.

    Returns:
        Validation score before and after.
    """
    job.allow_code()
    reader = replace(job.training, tasks=tuple(task for task in job.reader.tasks if task.name in members))
    settings = group_settings(job.config)
    with temporary_folder() as scratch:
        context = TaskContext(job.run / GROUPS / name / CHECKPOINTS, scratch, emitter(job.event_log))
        data = open_data(
            reader, job.held, job.config.data, seed=settings.seed, rank=0, world_size=1, device=context.device
        )
        try:
            state = _state(job, name, context, before)
            advance(state, data, settings, context, until=settings.epochs, hooks=reporting(context))
        except (RuntimeError, MemoryError, CodeError) as error:
            raise permanent_error(error, job.config, str(job.run), 1) or error from error
        state.take_best()
        splits = [split for split in ("val", "test") if reader.manifest.rows(split)]
        metrics = evaluate_splits(state.network, data, splits, settings, context)
    write_model(job.run / GROUPS / name / MODEL, group_model(state.network))
    _done(job.run, name).write_json({"before": before, "after": state.best_score, "metrics": metrics})
    return before, state.best_score


def group_settings(config: Config) -> Any:
    """The settings of a group: without a gate, all epochs are the same."""
    rate = config.search.group_learning_rate or config.train.learning_rate / 10
    return replace(
        config.settings(), epochs=config.search.group_epochs, search_share=1.0, learning_rate=rate,
        lr_min=min(config.train.lr_min, rate),
    )  # fmt: skip


def _state(job: Job, name: str, context: TaskContext, before: float) -> TrainState:
    settings = group_settings(job.config)
    resumed = TrainState.resumed(settings, context)
    if resumed is not None:
        return resumed
    model = read_model(job.run / MODELS / name)
    state = TrainState.fresh(model.network.to(context.device), settings)
    state.consider(before)
    return state


def _done(run: Location, name: str) -> Location:
    return run / GROUPS / name / DONE


def _finish(job: Job, searched: Mapping[str, Any], executor: Executor) -> None:
    """Replace the group models of the search, then write the result."""
    result = dict(searched)
    metrics, validation, scores = dict(searched["metrics"]), dict(searched["validation"]), {}
    for name in searched["grouping"]:
        done = _done(job.run, name).read_json()
        metrics |= done["metrics"][searched["split"]]
        validation |= done["metrics"]["val"]
        scores[name] = {"before": done["before"], "after": done["after"]}
        for file in (job.run / GROUPS / name / MODEL).files():
            (job.run / MODELS / name / file).write_bytes((job.run / GROUPS / name / MODEL / file).read_bytes())
    tasks = job.reader.tasks
    found = gains(tasks, metrics, searched["baseline"]) if searched["baseline"] else {}
    epochs = job.config.search.group_epochs
    notes = [*searched["notes"], f"groups trained {epochs} epochs on their own, which naive MTL did not get"]
    models = {name: read_model(job.run / MODELS / name) for name in searched["grouping"]}
    result |= {
        "inference": asdict(inference_cost(models)),
        "metrics": metrics, "validation": validation, "score": score_or_none(tasks, validation),
        "groups": scores, "gains": found,
        "normalized_gain": found.get("error"), "notes": notes if found else searched["notes"],
    }  # fmt: skip
    result["outcome"] = outcome(result)
    if job.details:
        for done in executor.run(partial(rewrite_samples, job), [searched["split"]]):
            if done.error is not None:
                raise training_failed(done.error, str(job.run)) from done.error
    (job.run / RESULT).write_json(result)


def rewrite_samples(job: Job, split: str) -> None:
    """Replace the samples of the run's page by predictions of the new models; without naive MTL, no intervals."""
    from pipelines.training.diagnostics import MergedGroups, SplitAnalysis

    job.allow_code()
    device = LocalContext().device
    models = {name: read_model(job.run / MODELS / name) for name in group_names(job.run / MODELS)}
    config, network = job.config, MergedGroups(models).to(device).eval()
    analysis = SplitAnalysis(network, None, job.reader, split, config.train.batch_size, config.train.seed)
    details = (job.run / DETAILS).read_json() if (job.run / DETAILS).exists() else {}
    samples = analysis.samples(config.run.samples) if config.run.samples else None
    (job.run / DETAILS).write_json(details | {"intervals": None, "samples": samples})
