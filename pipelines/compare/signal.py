"""`dmtg signal`: whether grouping can matter on a data set, found out by short runs before a long one.

A few random groupings are trained with a few seeds each. If networks of one grouping differ among seeds as much as
networks of different groupings do, chance finds none that is better. Good groups can be rare among random ones:
those of tasks with a high feature overlap (`dmtg_core.search.feature_overlap`) are trained too. So is the wide
encoder of equal cost: how far it is ahead says whether capacity counts, not grouping.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import yaml

from dmtg_core.grouping import Grouping
from dmtg_core.network.encoders import WIDTHS
from dmtg_core.tasks import Task
from pipelines.compare.cells import NAIVE, PROPOSAL, WIDE, Cell, Result, train_cells
from pipelines.compare.driver import cell_job, cells_session, check_cells, open_folder
from pipelines.compare.methods import random_groupings
from pipelines.compare.significance import Correlation, agreement, intraclass_correlation, mean_of
from pipelines.config.loading import Config
from pipelines.data.shards import ensure_shards
from pipelines.registry.tracking import shown
from pipelines.runs.files import CONFIG
from pipelines.runs.identity import SIGNAL
from pipelines.runs.results import numbers
from pipelines.storage import Location

WEAK, STRONG = 0.3, 0.6  # of an intraclass correlation
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Signalled:
    """What a pre-flight gave.

    Args:
        folder: Its folder.
        found: The content of `signal.json`.
    """

    folder: Location
    found: dict[str, Any]


def signal(config: Config, log: Callable[[str], None] = logger.info) -> Signalled:
    """Run a pre-flight to its end, from wherever an earlier call with the same configuration got to.

    Everything is judged on validation data.

    Raises:
        UserError: For anything that stands in the way.
    """
    described, folder = open_folder(config, "signal")
    section = config.signal
    epochs = max(round(section.share * config.train.epochs), 1)
    with cells_session(config):
        manifest = ensure_shards(config, log)
        tasks = check_cells(described, manifest, log)
        (folder / CONFIG).write_text(yaml.safe_dump(shown(described), sort_keys=False))
        names = [task.name for task in tasks]
        partitions = draw(names, min(config.network.groups, len(names)), section.partitions)
        wide = config.network.encoder in WIDTHS
        cells = [Cell.of(one, seed, epochs) for one in partitions for seed in section.seeds]
        cells += [Cell(kind, seed, epochs) for kind in (NAIVE, PROPOSAL) for seed in section.seeds]
        cells += [Cell(WIDE, seed, epochs) for seed in section.seeds] if wide else []
        results = train_cells(cell_job(config, manifest, tasks, folder), cells, log)
    grouped = [[results[Cell.of(one, seed, epochs)] for seed in section.seeds] for one in partitions]
    naive = [results[Cell(NAIVE, seed, epochs)] for seed in section.seeds]
    proposed = [results[Cell(PROPOSAL, seed, epochs)] for seed in section.seeds]
    wides = [results[Cell(WIDE, seed, epochs)] for seed in section.seeds] if wide else []
    found = {
        "name": folder.name,
        "epochs": epochs,
        "partitions": [[list(group) for group in one.groups] for one in partitions],
        "seeds": list(section.seeds),
        **judged(tasks, grouped, naive, proposed, wides),
    }
    (folder / SIGNAL).write_json(found)
    return Signalled(folder, found)


def draw(tasks: Sequence[str], groups: int, count: int) -> list[Grouping]:
    """Different ones of `random_groupings`; fewer where there are no more."""
    rng = np.random.default_rng([len(tasks), groups])
    found: dict[str, Grouping] = {}
    for one in islice(random_groupings(tasks, groups, rng), 100 * count):
        found.setdefault(one.name, one)
        if len(found) == count:
            break
    return list(found.values())


def judged(
    tasks: Sequence[Task],
    grouped: Sequence[Sequence[Result]],
    naive: Sequence[Result],
    proposed: Sequence[Result],
    wide: Sequence[Result],
) -> dict[str, Any]:
    """What the runs say: correlations, gains over naive MTL, and a verdict.

    Args:
        tasks: The tasks.
        grouped: The results of each partition, seed by seed.
        naive, proposed, wide: Those of naive MTL, of groups that read the same, and of the wide encoder.
    """
    overall = intraclass_correlation([[result["score"] for result in row] for row in grouped])
    by_task = {
        task.name: asdict(intraclass_correlation([[_log_loss(r, task.name) for r in row] for row in grouped]))
        for task in tasks
    }

    def lead(results: Sequence[Sequence[float]]) -> dict[str, Any]:
        """By how many per cent the first mean loss of a pair is lower than the second, over seeds."""
        return asdict(mean_of([100 * (1 - math.exp(a - b)) for a, b in results]))

    middle = [mean_of([row[i]["score"] for row in grouped]).value for i in range(len(naive))]
    random = lead([(m, n["score"]) for m, n in zip(middle, naive, strict=True)])
    ours = lead([(p["score"], m) for p, m in zip(proposed, middle, strict=True)])
    wider = lead([(w["score"], n["score"]) for w, n in zip(wide, naive, strict=True)]) if wide else None
    ahead = lead([(w["score"], m) for w, m in zip(wide, middle, strict=True)]) if wide else None
    names = [task.name for task in tasks]
    found = {
        "correlation": asdict(overall),
        "by_task": by_task,
        "random": random,
        "proposed_over_random": ours,
        "agreement": agreement([Grouping.from_dict(p["grouping"], names) for p in proposed]),
        "wide": wider,
        "wide_over_random": ahead,
    }
    return found | {"verdict": verdict(overall, random, ours, wider, ahead)}


def _log_loss(result: Result, task: str) -> float:
    return math.log(max(numbers(result["metrics"]["val"])[task]["loss"], 1e-12))


Lead = Mapping[str, Any]


def verdict(overall: Correlation, random: Lead, proposed: Lead, wide: Lead | None, ahead: Lead | None) -> str:
    """Whether grouping matters, in words."""
    if not math.isfinite(overall.value):
        return "Nothing varies: these runs say nothing."
    share = (
        f"among random groupings, which tasks go together explains {max(overall.value, 0):.0%} of the variation "
        f"(intraclass correlation {overall.value:.2f}, 95 % interval {overall.low:.2f} to {overall.high:.2f}), "
        f"and groups of tasks that read the same are {_words(proposed)} random ones"
    )
    if proposed["low"] > 0 or overall.low > WEAK or overall.value > STRONG:
        first = f"Grouping matters here: {share}."
    elif overall.value < WEAK:
        first = f"Grouping hardly matters here: {share}."
    else:
        first = f"Grouping may matter here: {share}; more partitions or seeds would tell."
    second = f" Random groups are {_words(random)} naive MTL"
    if wide is None or ahead is None:
        return f"{first}{second}."
    return (
        f"{first}{second}; one wide encoder of the same cost is {_words(wide)} naive MTL, and {_words(ahead)} "
        "random groups."
    )


def _words(lead: Lead) -> str:
    """A lead in per cent of loss, as better, worse or neither."""
    if not lead["low"] * lead["high"] > 0:
        return f"not told apart from ({lead['value']:+.1f} % of loss)"
    return f"{abs(lead['value']):.1f} % of loss {'better' if lead['value'] > 0 else 'worse'} than"
