"""`search`: naive MTL as the baseline, and a grouping with its networks by one of two methods.

The method "dmtg" is that of the paper, see `published`. The method "guided" compares candidates and spends a
budget where validation data says that it pays, see `guided`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmtg_core.evaluation.jackknife import Difference, difference_of, score_parts
from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import inference_cost
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.guided import GuidedSearch
from dmtg_core.search.options import BASELINE, DISTILLED, ENSEMBLE, OVERLAP, SearchOptions
from dmtg_core.search.published import PublishedSearch
from dmtg_core.search.stages import Stages
from dmtg_core.training.context import LocalContext, TrainContext
from dmtg_core.training.data import ArrayData, Data
from dmtg_core.training.loop import rows_evaluated
from dmtg_core.training.metrics import Metrics
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.warm_start import WarmStart

# The lowest of several validation scores is low by chance, too: 14 of 19 searches on tables of 200 to 1,300 rows
# had a network with a lower score than naive MTL, and the mean test error of all 19 was 0.5 % higher.
ERRORS = 2.0


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Args:
        network: The hard network with the weights of its best epoch, in evaluation mode.
        naive: The network of naive MTL with the weights of its best epoch, in evaluation mode; None without a
            baseline.
        grouping: The grouping of `network`. It is one group if the wide encoder was best.
        chosen: Name of the network with the best validation score; with "guided" also "naive_mtl".
        distilled: Result of the distillation: `teachers`, the best `score` and the `metrics` before it, the score
            of the `ensemble`, the best score after the distillation (`final`), whether the distilled network was
            `kept`, and its part of `cost`. It is empty without a distillation.
        score: Validation score of `network`, see `score_of`.
        difference: Difference of the validation scores of the best network of "guided" and naive MTL. Naive MTL is
            the result unless `is_better`. None without a baseline.
        metrics: Split → task → metric → value.
        baseline: Metrics of naive MTL; empty without a baseline.
        candidates: For each network that was trained: `stage`, `grouping`, `score` (its lowest validation score),
            `final` (the same if it was trained to the end, else None) and `probabilities` of the gate `(N, K)`
            after the last epoch in which it was trained.
        affinity: `feature_overlap` of the tasks `(N, N)`; empty if it was not measured.
        cost: Training cost in runs of naive MTL, without the baseline.
        budget: The most training that the search was allowed in runs of naive MTL; None without a budget ("dmtg",
            and with one branch).
        costs: Training cost of each stage in runs of naive MTL.
    """

    network: GroupingNetwork
    naive: GroupingNetwork | None
    grouping: Grouping
    chosen: str
    distilled: dict[str, Any]
    score: float
    difference: Difference | None
    metrics: dict[str, Metrics]
    baseline: dict[str, Metrics]
    candidates: list[dict[str, Any]]
    affinity: list[list[float]]
    cost: float
    budget: float | None
    costs: dict[str, float]


def search(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    options: SearchOptions | None = None,
    *,
    baseline: bool = True,
    splits: Sequence[str] = ("val", "test"),
    context: TrainContext | None = None,
    warm_start: WarmStart | None = None,
) -> SearchResult:
    """Find a grouping and train its networks. The search resumes from the context's latest checkpoint.

    Args:
        spec: The grouping network. Start i has seed `spec.seed + i`.
        options: The candidates. The default is `SearchOptions()`.
        baseline: Train naive MTL (one branch, all epochs) first, as the baseline.
        splits: Splits on which naive MTL and the result are evaluated. Selections use only "val".
        warm_start: Models from which all gated candidates start. Naive MTL starts from them only if it is a single
            model, and otherwise from scratch.

    Raises:
        NonFiniteLossError: If the loss is not finite.
        ValueError: If the warm start does not fit, if the checkpoint is damaged, or as `ArrayData.check`.
    """
    if isinstance(data, ArrayData):
        data.check(spec.input, spec.tasks)
    options = options or SearchOptions()
    method = PublishedSearch if options.runs(spec.groups) is None else GuidedSearch
    stages = method(spec, data, settings, options, baseline, splits, context or LocalContext(), warm_start)
    stages.train_baseline()
    return _outcome(stages, stages.run())


def _outcome(stages: Stages, chosen: str) -> SearchResult:
    """The result of a search whose best network is `chosen`."""
    by_name = {result["stage"]: result for result in stages.state.results}
    trained, after = stages.state.trained, by_name.get(DISTILLED)
    naive = trained.get(BASELINE)
    distilled: dict[str, Any] = {}
    if after is not None:
        before = by_name[chosen]["final"]
        distilled = {"teachers": after["teachers"], "score": before, "final": after["final"]}
        distilled |= {"ensemble": by_name[ENSEMBLE]["score"], "kept": after["final"] < before}
        distilled |= {"metrics": stages.evaluate(trained[chosen]), "cost": after["cost"]}
    network = trained[DISTILLED if after else chosen]
    best = (after or by_name[chosen])["final"]
    for found in (network, *([naive] if naive is not None else [])):
        found.eval()
    guided = isinstance(stages, GuidedSearch)
    difference = None
    if guided and naive is not None:
        rows, tasks = rows_evaluated(stages.spec, stages.settings), stages.spec.tasks
        first, second = (
            score_parts(tasks, one, stages.data, stages.context, batch_size=rows) for one in (naive, network)
        )
        difference = difference_of(first, second)
        cost = inference_cost(network).flops / inference_cost(naive).flops
        if not is_better(difference, cost):
            network, chosen, distilled, best = naive, BASELINE, {}, by_name[BASELINE]["final"]
    order = [name for name in by_name if "probabilities" in by_name[name]]
    return SearchResult(
        network=network,
        naive=naive,
        grouping=network.grouping(),
        chosen=chosen,
        distilled=distilled,
        score=best,
        difference=difference,
        metrics=stages.evaluate(network),
        baseline=by_name.get(BASELINE, {}).get("metrics", {}),
        candidates=[_described(by_name[name]) for name in order],
        affinity=by_name.get(OVERLAP, {}).get("affinity", []),
        cost=stages.spent,
        budget=stages.budget.runs if guided else None,
        costs={name: one["cost"] for name, one in by_name.items() if "cost" in one},
    )


def is_better(difference: Difference, cost: float) -> bool:
    """Whether a network is chosen over naive MTL.

    At twice the inference cost or more, the difference has to be more than `ERRORS` standard errors below 0. From
    one to two times the cost this number increases linearly from 0: groups that are adapters of a frozen encoder
    cost little.

    Args:
        difference: The network's validation score minus that of naive MTL.
        cost: Inference cost of the network in that of naive MTL.
    """
    return -difference.value > ERRORS * min(max(cost - 1, 0.0), 1.0) * difference.error


def _described(result: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a candidate for `SearchResult`."""
    return {key: result.get(key) for key in ("stage", "grouping", "score", "final", "probabilities")}
