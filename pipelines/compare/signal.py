"""`dmtg signal`: short runs that show whether the choice of groups has an effect on a data set.

The grouping signal trains a few random groupings with a few seeds each. If networks with the same grouping differ
as much as networks with different groupings, no random grouping is better than the others. Good groups can be rare
among random ones, so groups of tasks with a high feature overlap (`dmtg_core.search.feature_overlap`) are trained
too. A wide encoder of equal cost shows how much of a gain comes from capacity alone.
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
from dmtg_core.tasks import Task
from pipelines.compare.cells import NAIVE, PROPOSAL, WIDE, Cell, Result, train_cells
from pipelines.compare.methods import random_groupings
from pipelines.compare.preparation import cell_job, cells_session, open_cells_folder
from pipelines.compare.significance import Correlation, agreement, intraclass_correlation, mean_of
from pipelines.config.loading import Config
from pipelines.execution.resources import cells_cpus
from pipelines.runs.identity import SIGNAL
from pipelines.runs.results import numbers
from pipelines.storage import Location
from pipelines.training.checks import folder_of_data

WEAK, STRONG = 0.3, 0.6  # thresholds of the intraclass correlation
logger = logging.getLogger(__name__)


# beginnings of the verdict, from which the next command follows
HARDLY = "Grouping hardly matters here."
NO_SIGNAL = "All runs have the same validation score, so there is no grouping signal."


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
        partitions = distinct_partitions(names, min(config.network.groups, len(names)), section.partitions)
        kinds = (NAIVE, PROPOSAL, WIDE) if config.encoder_spec().can_widen else (NAIVE, PROPOSAL)
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
        **analyse(data.tasks, grouped, of_kind[NAIVE], of_kind[PROPOSAL], of_kind.get(WIDE, [])),
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


def analyse(
    tasks: Sequence[Task],
    grouped: Sequence[Sequence[Result]],
    naive: Sequence[Result],
    proposed: Sequence[Result],
    wide: Sequence[Result],
) -> dict[str, Any]:
    """Correlations, gains of the losses, and the verdict.

    Args:
        tasks: The tasks.
        grouped: Results of each partition, with one result for each seed.
        naive, proposed, wide: Results over seeds of naive MTL, of groups with a high feature overlap, and of the
            wide encoder.
    """
    overall = intraclass_correlation([[result["score"] for result in row] for row in grouped])
    by_task = {
        task.name: asdict(intraclass_correlation([[_log_loss(r, task.name) for r in row] for row in grouped]))
        for task in tasks
    }
    random = [mean_of([row[i]["score"] for row in grouped]).value for i in range(len(naive))]
    single, ours, whole = ([result["score"] for result in results] for results in (naive, proposed, wide))
    names = [task.name for task in tasks]
    gains = {
        "random": _gain(random, single),
        "proposed_over_random": _gain(ours, random),
        "wide": _gain(whole, single) if wide else None,
        "wide_over_random": _gain(whole, random) if wide else None,
    }
    return {
        "correlation": asdict(overall),
        "by_task": by_task,
        **gains,
        "agreement": agreement([Grouping.from_dict(p["grouping"], names) for p in proposed]).value,
        "verdict": verdict(overall, gains),
    }


def _log_loss(result: Result, task: str) -> float:
    return math.log(max(numbers(result["metrics"]["val"])[task]["loss"], 1e-12))


def _gain(scores: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Gain of the mean loss over a reference, in per cent, with its interval over seeds."""
    return asdict(mean_of([100 * (1 - math.exp(a - b)) for a, b in zip(scores, reference, strict=True)]))


def verdict(overall: Correlation, gains: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Whether the choice of groups has an effect, as text.

    Args:
        overall: Correlation of the validation scores.
        gains: `random` and `wide` over naive MTL, `proposed_over_random` and `wide_over_random`; those of the wide
            encoder are None if its widths are fixed.
    """
    if not math.isfinite(overall.value):
        return NO_SIGNAL
    random, proposed = gains["random"], gains["proposed_over_random"]
    assert random is not None
    assert proposed is not None
    ending = ""
    if proposed["low"] > 0 or overall.low > WEAK or overall.value > STRONG:
        effect = "Grouping matters here."
    elif overall.value < WEAK:
        effect = HARDLY
    else:
        effect = "Grouping may matter here."
        ending = " More partitions or seeds would give a clearer answer."
    text = (
        f"{effect} The choice of groups explains {max(overall.value, 0):.0%} of the variation among random "
        f"groupings (intraclass correlation {overall.value:.2f}, "
        f"95 % interval {overall.low:.2f} to {overall.high:.2f}). "
        f"Groups of tasks with a high feature overlap are {_relation(proposed, 'random groups')}. "
        f"Random groups are {_relation(random, 'naive MTL')}."
    )
    wide, over_random = gains["wide"], gains["wide_over_random"]
    if wide is not None and over_random is not None:
        text += (
            f" One wide encoder of the same cost is {_relation(wide, 'naive MTL')} and "
            f"{_relation(over_random, 'random groups')}."
        )
    return f"{text} The gains are of the losses.{ending}"


def _relation(gain: Mapping[str, Any], reference: str) -> str:
    """A gain as better than a reference, worse than it, or not significantly different from it."""
    if not gain["low"] * gain["high"] > 0:
        relation = "not significantly different from"
    else:
        relation = "better than" if gain["value"] > 0 else "worse than"
    return f"{relation} {reference} (gain {gain['value']:+.1f} %)"
