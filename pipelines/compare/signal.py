"""`dmtg signal`: short runs that show whether the choice of groups has an effect on a data set.

The grouping signal trains a few random groupings with a few seeds each. If networks with the same grouping differ
as much as networks with different groupings, no random grouping is better than the others. Good groups can be rare
among random ones, so groups of tasks with a high feature overlap (`dmtg_core.search.feature_overlap`) are trained
too. A wide encoder of equal cost shows how much of a gain comes from capacity alone. The conclusion follows from
the sizes of these effects in gain. If the runs are too few for one, it says how many would be enough.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from dmtg_core.grouping import Grouping
from dmtg_core.names import quoted
from dmtg_core.tasks import Task
from pipelines.compare.cells import Cell, Kind, Result
from pipelines.compare.effects import Layout, conclude, effect_text, enough_runs, relation_text
from pipelines.compare.methods import random_groupings
from pipelines.compare.preparation import cell_job, cells_session, open_cells_folder
from pipelines.compare.significance import agreement, intraclass_correlation, mean_of
from pipelines.compare.training import train_cells
from pipelines.compare.verdicts import UNCLEAR
from pipelines.config.loading import Config
from pipelines.config.sections import SignalSection
from pipelines.data.manifest import thin_losses
from pipelines.errors import UserError
from pipelines.execution.resources import cells_cpus
from pipelines.runs.identity import SIGNAL
from pipelines.runs.results import numbers
from pipelines.storage import Location
from pipelines.training.checks import folder_of_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SignalResult:
    """A grouping signal.

    Args:
        folder: Folder of the grouping signal.
        found: Content of `signal.json`.
    """

    folder: Location
    found: dict[str, Any]


def signal(config: Config, log: Callable[[str], None] = logger.info) -> SignalResult:
    """Compute a grouping signal. It resumes where an earlier call with the same configuration stopped.

    All figures are of the validation split.

    Raises:
        UserError: For every problem, before training if it can be known by then.
    """
    named, base = open_cells_folder(config, "signal")
    section = config.signal
    epochs = max(round(section.share * config.train.epochs), 1)
    with (
        folder_of_data(config, named, base, cells_cpus(config.ray), log) as (named, folder, manifest),
        cells_session(named, log, folder, manifest) as (data, executor),
    ):
        names = [task.name for task in data.tasks]
        groups = min(config.network.groups, len(names))
        partitions = distinct_partitions(names, groups, section.partitions)
        if len(partitions) < 2:
            raise UserError(
                f"there is only one partition of {len(names)} tasks into {groups} groups of equal size",
                where="data.tasks, network.groups",
                remedy="give fewer groups or more tasks",
                wrong_use=True,
            )
        wide = (Kind.WIDE,) if config.encoder_spec().can_widen else ()
        kinds = (Kind.NAIVE, Kind.PROPOSAL, *wide)
        cells = [Cell.of(one, seed, epochs) for one in partitions for seed in section.seeds]
        cells += [Cell(kind, seed, epochs) for kind in kinds for seed in section.seeds]
        results = train_cells(cell_job(data, executor, folder), executor, cells, log)
    grouped = [[results[Cell.of(one, seed, epochs)] for seed in section.seeds] for one in partitions]
    of_kind = {kind: [results[Cell(kind, seed, epochs)] for seed in section.seeds] for kind in kinds}
    found = {
        "name": folder.name,
        "epochs": epochs,
        "partitions": [[list(group) for group in one.groups] for one in partitions],
        "seeds": list(section.seeds),
        **analyse(
            data.tasks,
            grouped,
            of_kind[Kind.NAIVE],
            of_kind[Kind.PROPOSAL],
            of_kind.get(Kind.WIDE, []),
            section,
            left_out=thin_losses(data.manifest, data.tasks, config.data.min_support),
            most=count_partitions(len(names), groups),
        ),
    }
    (folder / SIGNAL).write_json(found)
    return SignalResult(folder, found)


def distinct_partitions(tasks: Sequence[str], groups: int, count: int) -> list[Grouping]:
    """Different partitions of `random_groupings`. There are fewer than `count` if no more exist."""
    rng = np.random.default_rng([len(tasks), groups])
    found: dict[str, Grouping] = {}
    for one in islice(random_groupings(tasks, groups, rng), 100 * count):
        found.setdefault(one.name, one)
        if len(found) == count:
            break
    return list(found.values())


def count_partitions(tasks: int, groups: int) -> int:
    """Number of partitions of `random_groupings`: the sizes of their groups differ by one at most."""
    size, larger = divmod(tasks, groups)
    smaller = groups - larger
    labelled = math.factorial(tasks) // (math.factorial(size + 1) ** larger * math.factorial(size) ** smaller)
    return labelled // (math.factorial(larger) * math.factorial(smaller))


def analyse(
    tasks: Sequence[Task],
    grouped: Sequence[Sequence[Result]],
    naive: Sequence[Result],
    proposed: Sequence[Result],
    wide: Sequence[Result],
    section: SignalSection,
    *,
    left_out: Mapping[str, str],
    most: int,
) -> dict[str, Any]:
    """Effects in gain, correlations, the conclusion, and the verdict as text.

    Args:
        tasks: The tasks.
        grouped: Results of each partition, with one result for each seed.
        naive, proposed, wide: Results over seeds of naive MTL, of groups with a high feature overlap, and of the
            wide encoder.
        section: Options of the signal.
        left_out: Task → the reason why its loss has little meaning. The verdict is that of the other tasks.
        most: Largest number of different partitions.
    """
    names = [task.name for task in tasks]
    kept = [name for name in names if name not in left_out] or names
    rows = [_scores(row, kept) for row in grouped]
    random = [mean_of([row[i] for row in rows]).value for i in range(len(naive))]
    single, ours, whole = (_scores(results, kept) for results in (naive, proposed, wide))
    over_random = _gains(ours, random)
    layout = Layout.of(rows)
    spread, difference = layout.spread(), mean_of(over_random)
    worth = section.worth
    conclusion, enough = UNCLEAR, None
    if len(left_out) < len(names):
        conclusion = conclude(spread, difference, worth)
        if conclusion == UNCLEAR:
            enough = enough_runs(layout, over_random, worth, others=3 if wide else 2, most=most)
    found = {
        "conclusion": conclusion,
        "worth": worth,
        "between": asdict(spread),
        "random": _gain(random, single),
        "proposed_over_random": asdict(difference),
        "proposed_over_wide": _gain(ours, whole) if wide else None,
        "wide": _gain(whole, single) if wide else None,
        "wide_over_random": _gain(whole, random) if wide else None,
        "correlation": asdict(intraclass_correlation(rows)),
        "by_task": {
            name: asdict(intraclass_correlation([_scores(row, [name]) for row in grouped])) for name in names
        },
        "agreement": agreement([Grouping.from_dict(p["grouping"], names) for p in proposed]).value,
        "left_out": dict(left_out),
        "enough": {"partitions": enough[0], "seeds": _more(section.seeds, enough[1])} if enough else None,
    }
    return found | {"verdict": verdict(found, names, enough)}


def _scores(results: Sequence[Result], tasks: Sequence[str]) -> list[float]:
    """Mean logarithm of the validation losses of the tasks, of each result."""
    losses = [numbers(result["metrics"]["val"]) for result in results]
    return [math.fsum(math.log(max(one[task]["loss"], 1e-12)) for task in tasks) / len(tasks) for one in losses]


def _gains(scores: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Gain of the mean loss over a reference in per cent, of each seed."""
    return [100 * (1 - math.exp(a - b)) for a, b in zip(scores, reference, strict=True)]


def _gain(scores: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Mean of `_gains` with its interval."""
    return asdict(mean_of(_gains(scores, reference)))


def _more(seeds: Sequence[int], count: int) -> list[int]:
    """The seeds and the smallest further ones, as many as `count`."""
    further = (seed for seed in range(1, count + len(seeds) + 1) if seed not in seeds)
    return [*seeds, *islice(further, count - len(seeds))]


def verdict(found: Mapping[str, Any], tasks: Sequence[str], enough: tuple[int, int] | None) -> str:
    """The effects and what follows from them, as text.

    Args:
        found: As in `signal.json`.
        tasks: Names of the tasks.
        enough: Number of partitions and seeds that would be enough, if it is known.
    """
    left_out = found["left_out"]
    listed = ", ".join(f"{quoted(name)} ({reason})" for name, reason in left_out.items())
    if len(left_out) == len(tasks):
        return f"These runs cannot tell whether grouping matters: the validation labels are too few. {listed}."
    text = f"{effect_text(found, enough)} {relation_text(found)}"
    return f"{text} Tasks with too few validation labels are left out: {listed}." if left_out else text
