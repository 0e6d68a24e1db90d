"""What each training worker does: data, search, results. It runs inside Ray Train."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dmtg_core.network.cost import inference_cost
from dmtg_core.network.grouping_network import GroupModel, NetworkSpec
from dmtg_core.search.search import SearchResult, search
from dmtg_core.tasks import Task
from dmtg_core.training import checkpoint
from dmtg_core.training.data import Data
from dmtg_core.training.metrics import Metrics, normalized_gain
from dmtg_core.training.profile import profile_steps
from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.data.ingest import open_data
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.storage import Location
from pipelines.training.ray.context import RayContext
from pipelines.training.ray.events import for_result, on_board, teller
from pipelines.training.ray.failures import LastingError, lasting_error
from pipelines.training.ray.watchdog import Pulse, Watched

CONFIG, GROUPING, RESULT, MODELS = "config.yaml", "grouping.json", "result.json", "models"
DETAILS = "details.json"  # what the run's page shows beside the result
SEARCHED = "searched.json"  # a result whose groups are still to be trained on their own
PROFILE = "profile"


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, sent to it whole.

    Args:
        held: References to the tables of each split in shared memory; None to stream.
        notes: Warnings to keep beside the result, such as tasks with thin support.
        start: Names and places of the models to start from, kept in the run folder.
        board: Where to tell the driver what happens.
        profile: Only measure some steps.
        details: Also write what the run's page shows beside the result.
    """

    config: Config
    reader: Reader
    held: Mapping[str, Any] | None
    run: Location
    notes: tuple[str, ...] = ()
    start: tuple[tuple[str, Location], ...] = ()
    board: Any = None
    profile: bool = False
    details: bool = False


def read_jsonl(file: Location) -> list[dict[str, Any]]:
    """The objects of a file with one on every line; empty where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def work(values: dict[str, Any]) -> None:
    """The training function of Ray Train.

    Raises:
        LastingError: For what other workers would meet again.
    """
    job: Job = values["job"]
    context = RayContext(job.run, teller(job.board), job.config.ray.hung_after_s)
    try:
        # each worker on a machine gets its share of the cores
        torch.set_num_threads(max((os.cpu_count() or 1) // context.local_world_size, 1))
        if job.profile:
            with _explaining(job, context):
                _profile(job, context)
            return
        with _explaining(job, context):
            result = _search(job, context)
        if context.rank == 0:
            _keep(job, context, result)
    finally:
        context.close()


@contextmanager
def _explaining(job: Job, context: RayContext) -> Iterator[None]:
    """Errors that come from the configuration, as what they are."""
    try:
        yield
    except (RuntimeError, MemoryError, checkpoint.OutdatedNetworkError) as error:
        lasting = lasting_error(error, job.config, str(job.run), context.world_size)
        if lasting is None:
            raise
        raise lasting from error


def _open(job: Job, context: RayContext) -> tuple[NetworkSpec, Data]:
    config, reader = job.config, job.reader
    data = open_data(
        reader, job.held, config.data, seed=config.train.seed,
        rank=context.rank, world_size=context.world_size, device=context.device,
    )  # fmt: skip
    return config.network_spec(reader.manifest.description.input, reader.tasks), Watched(
        data, context.watchdog, Pulse(job.board) if context.rank == 0 else None
    )


def _search(job: Job, context: RayContext) -> SearchResult:
    config, (spec, data) = job.config, _open(job, context)
    splits = [split for split in ("val", "test") if job.reader.manifest.rows(split)]
    return search(
        spec, data, config.settings(), config.search_options(), baseline=config.search.baseline,
        splits=splits, context=context, warm_start=warm_start(job.start),
    )  # fmt: skip


def _profile(job: Job, context: RayContext) -> None:
    spec, data = _open(job, context)
    with tempfile.TemporaryDirectory(prefix="dmtg-") as folder:
        profile_steps(spec, data, job.config.settings(), context, Path(folder))
        if context.rank == 0:
            for file in sorted(Path(folder).iterdir()):
                (job.run / PROFILE / file.name).write_bytes(file.read_bytes())


def _keep(job: Job, context: RayContext, result: SearchResult) -> None:
    """The result in the run folder, after the checkpoint from which another call would come to the same."""
    whole = context.flush()
    last = "the last checkpoint, without training again" if whole else "the last whole checkpoint"
    run = job.run if whole else job.run.patient(0)  # it has been waited for long enough
    try:
        if job.details:
            write_details(job, run, result)
        notes = (*job.notes, *warnings_of(context.records), *for_result(on_board(job.board)))
        write_result(run, result, notes, SEARCHED if job.config.search.group_epochs else RESULT)
    except UserError as error:
        raise LastingError(
            f"training is done, its result {error.what.removeprefix('cannot write: ')}",
            where=error.where,
            remedy=f"{error.remedy}; then run the same words again: they go on from {last}",
        ) from error


def write_details(job: Job, run: Location, result: SearchResult) -> None:
    """What the run's page shows beside the result."""
    from pipelines.training.diagnostics import details_of  # the report reads what is written here

    config = job.config
    spec = config.network_spec(job.reader.manifest.description.input, job.reader.tasks)
    found = details_of(
        result, job.reader, spec,
        samples=config.run.samples, batch_size=config.train.batch_size, seed=config.train.seed,
    )  # fmt: skip
    (run / DETAILS).write_json(found)


def warnings_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the epochs of a run have warned of, each once, with the stage."""
    said = [f"{record['stage']}: {warning}" for record in records for warning in record.get("warnings", ())]
    return list(dict.fromkeys(said))


def warm_start(places: Sequence[tuple[str, Location]]) -> WarmStart | None:
    """The models at some places, by their names; None where there are no places.

    Raises:
        UserError: When one of them is damaged.
    """
    if not places:
        return None
    return WarmStart([read_model(place) for _, place in places], [name for name, _ in places])


def gains(tasks: Sequence[Task], metrics: Metrics, baseline: Metrics) -> dict[str, float]:
    """The gain over naive MTL in per cent: of errors, and the published forms, of scores and of losses."""
    return {
        "error": normalized_gain(tasks, metrics, baseline),
        "score": normalized_gain(tasks, metrics, baseline, form="score"),
        "loss": normalized_gain(tasks, metrics, baseline, metric="loss"),
    }


def write_model(place: Location, model: GroupModel) -> None:
    """One group's model into a folder anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_model(Path(folder), model)
        for file in sorted(Path(folder).iterdir()):
            (place / file.name).write_bytes(file.read_bytes())


def branches_of(run: Location) -> int:
    """K of the network that a run was configured with; 1 where its folder does not say."""
    file = run / CONFIG
    values = yaml.safe_load(file.read_text()) if file.exists() else {}
    return int(values.get("network", {}).get("groups", 1))


def outdated(error: checkpoint.OutdatedNetworkError, where: str) -> UserError:
    """What the user is told of a network that an earlier version trained wrongly."""
    return UserError(
        str(error).partition(": ")[2], where=where, remedy="train it again with dmtg train and another run.name"
    )


def read_model(place: Location) -> GroupModel:
    """What `write_model` wrote.

    Raises:
        UserError: When a file is missing or damaged, it is no group's model, or it has to be trained again.
    """
    branches = branches_of(place.parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        for name in place.files(recursive=False):
            (Path(folder) / name).write_bytes((place / name).read_bytes())
        try:
            return checkpoint.load_model(Path(folder), branches=branches)
        except checkpoint.OutdatedNetworkError as error:
            raise outdated(error, str(place)) from error
        except ValueError as error:
            raise UserError(
                str(error).replace(folder, str(place)),
                where=str(place),
                remedy="give a folder models/group_<k> of a run that dmtg train has finished",
            ) from error


def check_models(config: Config, run: Location) -> None:
    """Stop at group models in a run folder that an earlier version trained wrongly.

    Raises:
        UserError: For the first of them.
    """
    if config.network.groups > checkpoint.RIGHT_UP_TO:
        for name in (run / MODELS).folders():
            read_model(run / MODELS / name)


def write_result(run: Location, result: SearchResult, notes: Sequence[str] = (), file: str = RESULT) -> None:
    """Group models, grouping and figures into the run folder; the file comes last and says that all is there."""
    for name, model in result.network.specialise().items():
        write_model(run / MODELS / name, model)
    (run / GROUPING).write_text(result.grouping.to_json())
    split = "test" if "test" in result.metrics else "val"
    tasks = result.network.tasks
    found = gains(tasks, result.metrics[split], result.baseline[split]) if result.baseline else {}
    (run / file).write_json(
        {
            "grouping": result.grouping.to_dict(),
            "grouping_name": result.grouping.name,
            "split": split,
            "metrics": result.metrics[split],
            "baseline": result.baseline.get(split, {}),
            "normalized_gain": found.get("error"),
            "gains": found,
            "validation": result.metrics.get("val", {}),
            "chosen": result.chosen,
            "candidates": result.candidates,
            "distilled": result.distilled,
            "affinity": result.affinity,
            "training_cost": result.cost,
            "inference": asdict(inference_cost(result.network)),
            "headline": {task.name: task.metric for task in tasks},
            "notes": list(notes),
        }
    )
