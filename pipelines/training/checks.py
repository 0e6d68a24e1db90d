"""Checks and preparation that every command that trains does first: folder, shards, tasks, networks, samples."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import yaml

from dmtg_core.addresses import load
from dmtg_core.names import listed
from dmtg_core.network.batched.choice import built
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.sampling import epoch_steps, sampled_tasks
from dmtg_core.tasks import Task
from dmtg_core.training.aggregation import load_aggregator
from dmtg_core.training.objective.scalarizers import task_weighting
from dmtg_core.training.step import WeighedLoss
from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.data.ingest import keeps_in_memory, load_splits
from pipelines.data.manifest import Manifest, check_shards, check_targets, repeated_notes, support_notes
from pipelines.data.reader import Reader
from pipelines.data.renewal import ensure_shards, ready_shards, renew_shards
from pipelines.data.stem_outputs import with_outputs
from pipelines.errors import UserError
from pipelines.execution.choice import kept_session
from pipelines.execution.executor import Executor, Held
from pipelines.registry.tracking import shown
from pipelines.runs.files import CONFIG
from pipelines.runs.identity import open_run, results_folder
from pipelines.runs.warm_start import warm_start_errors
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A data set that passed all checks.

    Args:
        config: Configuration of the command.
        reader: Reader of the chosen tasks.
        notes: Notes about tasks with little support.
        outputs: Reader of the outputs of a frozen stem; None if training reads the inputs.
    """

    config: Config
    reader: Reader
    notes: tuple[str, ...]
    outputs: Reader | None = None

    @property
    def manifest(self) -> Manifest:
        """Manifest of the shards."""
        return self.reader.manifest

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The chosen tasks."""
        return self.reader.tasks

    @property
    def training(self) -> Reader:
        """The reader of what training reads."""
        return self.outputs or self.reader

    def samples(self, executor: Executor) -> Mapping[str, Sequence[Held]] | None:
        """Load the samples into the memory of an executor; None if they do not fit and are streamed."""
        kept = keeps_in_memory(self.training, self.config.data, executor)
        return load_splits(self.training, executor) if kept else None


def prepare(
    config: Config,
    executor: Executor | None,
    log: Callable[[str], None],
    check: Callable[[Manifest, tuple[Task, ...]], None] | None = None,
    manifest: Manifest | None = None,
) -> Prepared:
    """Write the shards if they are missing, and check data and networks before a worker starts.

    Args:
        config: Configuration of the command.
        executor: The executor of the command; None where shards that are missing get their own.
        log: Log callback.
        check: Check of the networks, given manifest and tasks; by default `check_network`.
        manifest: Manifest of shards that are known to be those of the configuration.

    Raises:
        UserError: For the first problem.
    """
    manifest = ensure_shards(config, log, executor, manifest)
    folder = locate(config.data.shards)
    tasks = check_data(config, manifest, folder)
    if check is None:
        check_network(config, manifest, tasks, log=log)
    else:
        check(manifest, tasks)
    labels = support_notes(manifest, tasks, config.data.min_support)
    notes = (*labels, *repeated_notes(manifest), *batch_notes(config, manifest))
    reader = Reader(folder, manifest, tasks)
    training = with_outputs(config, reader, executor, log)
    return Prepared(config, reader, notes, training if training.outputs else None)


def batch_notes(config: Config, manifest: Manifest) -> list[str]:
    """A note if a batch holds more samples than there are: every epoch is then a single step."""
    size, rows = config.train.batch_size, manifest.rows("train")
    if size <= rows:
        return []
    return [f"train.batch_size={size} is more than the {rows} training samples: a step has all of them"]


@contextmanager
def folder_of_data(
    config: Config, named: Config, folder: Location, cpus: float, log: Callable[[str], None]
) -> Iterator[tuple[Config, Location, Manifest]]:
    """The folder of a comparison, a grouping signal or a sweep on its data; see `results_folder`.

    If shards have to be created on Ray, its session lasts until the end of the block: training uses it, too.

    Args:
        config: Configuration of the command.
        named, folder: Result of `open_folder`.
        cpus: Logical CPUs of a local Ray cluster.
        log: Log callback.

    Yields:
        The configuration with the folder's name, the folder, and the manifest of the shards, which are created if
        they are missing or stale.

    Raises:
        UserError: As `ensure_shards` and `results_folder`.
    """
    ready = ready_shards(config, log)
    with kept_session(config.ray, cpus) if ready is None else nullcontext():
        manifest = ready or renew_shards(config, log)
        own = results_folder(named, folder, manifest.digest(), log, named=bool(config.run.name))
        yield named.model_copy(update={"run": named.run.model_copy(update={"name": own.name})}), own, manifest


def open_folder(config: Config, name: str) -> tuple[Config, Location]:
    """Open the folder of a comparison, a grouping signal or a sweep.

    Args:
        config: Configuration of the command.
        name: Name of the folder.

    Returns:
        The configuration with this run name, and the folder.

    Raises:
        UserError: If the folder cannot be written or belongs to another configuration.
    """
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return named, open_run(named)


def write_config(config: Config, folder: Location) -> None:
    """Write a configuration into its folder, without secrets."""
    (folder / CONFIG).write_text(yaml.safe_dump(shown(config), sort_keys=False))


def check_data(config: Config, manifest: Manifest, folder: Location) -> tuple[Task, ...]:
    """Check the data and return the chosen tasks.

    Raises:
        UserError: For the first problem.
    """
    tasks = manifest.tasks(config.data.tasks, str(folder))
    check_limits(config, tasks)
    check_sampler(config, tasks)
    check_targets(manifest, tasks, str(folder))
    check_shards(folder, manifest, checksums=config.data.verify_checksums)
    check_workers(config, manifest)
    return tasks


def check_limits(config: Config, tasks: Sequence[Task]) -> None:
    """Check that the limits of the nightly run are those of tasks: another name would have no effect.

    Raises:
        UserError: For a name that no task has.
    """
    names = [task.name for task in tasks]
    unknown = [name for name in config.regroup.limits if name not in names]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], names, n=3) or names
        raise UserError(
            f"regroup.limits names {listed(unknown)}, which is no task of this configuration",
            where="regroup.limits",
            remedy=f"did you mean {listed(nearest)}?",
            wrong_use=True,
        )


def check_sampler(config: Config, tasks: Sequence[Task]) -> None:
    """Check that the sampler has a task whose labels weight the samples.

    Raises:
        UserError: If there is none.
    """
    if config.data.sampler == "balanced":
        with _section("data"):
            sampled_tasks(tasks)


def check_network(
    config: Config,
    manifest: Manifest,
    tasks: Sequence[Task],
    models: WarmStart | None = None,
    log: Callable[[str], None] = logger.info,
) -> None:
    """Check the network, and the models from which it starts.

    Raises:
        UserError: For the first problem.
    """
    with _section("network"):
        spec = config.network_spec(manifest.description.input, tasks)
        for kind, address in spec.code:
            load(kind, address)
        network = GroupingNetwork(spec)
        if config.network.batch_branches == "on" and spec.groups > 1:
            built(network)
    with _section("train"):
        WeighedLoss(network, aggregator=config.train.aggregator)
        task_weighting(network, config.settings())
        if config.train.aggregator != "sum":
            load_aggregator(config.train.aggregator)
    if models is not None:
        with warm_start_errors():
            models.check(spec)
        for note in models.notes(spec):
            log(note)


def check_workers(config: Config, manifest: Manifest) -> None:
    """Check that every number of workers can share the data, and that an epoch has as many batches with each.

    Raises:
        UserError: If a split has fewer samples than workers, or the number of batches depends on the workers.
    """
    fewest, most = config.ray.fewest, config.ray.most
    few = [split for split in manifest.shards if 0 < manifest.rows(split) < most]
    problem = f"split {few[0]} has {manifest.rows(few[0])} samples for {most} workers" if few else ""
    try:
        steps = [epoch_steps(manifest.rows("train"), config.train.batch_size, n) for n in (fewest, most)]
    except ValueError as error:
        problem = str(error)
    else:
        if steps[0] != steps[1]:
            problem = (
                f"an epoch of {manifest.rows('train')} samples has {steps[0]} batches for {fewest} workers and "
                f"{steps[1]} for {most}, because {most} workers cannot share the last one"
            )
    if problem:
        raise UserError(
            problem, where="ray.workers", remedy="lower the number of workers, or change train.batch_size"
        )


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Raise errors of the core as errors of a section of the configuration."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=name, remedy=f"correct the {name} section", wrong_use=True) from error
