"""Differentiable multi-task grouping (DMTG; Gao et al., ICML 2024) in plain PyTorch.

Find in one training run which tasks should share an encoder:

    network = GroupingNetwork(NetworkSpec(input, tasks, EncoderSpec("mlp"), groups=3))
    state = fit(network, data, TrainSettings(epochs=20))
    print(state.network.grouping())
    models = state.network.specialise()
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmtg_core.addresses import allow_code
    from dmtg_core.grouping import Grouping
    from dmtg_core.input_spec import InputSpec
    from dmtg_core.loss_options import LossOptions
    from dmtg_core.network.cost import Cost, grouping_cost, inference_cost, training_flops, widened_to
    from dmtg_core.network.encoders import ENCODERS, EncoderSpec
    from dmtg_core.network.gate import GroupGate
    from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
    from dmtg_core.network.spec import NetworkSpec
    from dmtg_core.sampling import balanced_tasks
    from dmtg_core.search.distillation import Teachers
    from dmtg_core.search.feature_overlap import cluster, feature_overlap
    from dmtg_core.search.gradient_affinity import GradientAffinities, projected_affinity
    from dmtg_core.search.options import SearchOptions
    from dmtg_core.search.search import SearchResult, search
    from dmtg_core.search.selection import Candidate, Selection, best_partition, select
    from dmtg_core.tasks import Task
    from dmtg_core.training.aggregation import AGGREGATORS
    from dmtg_core.training.augment import AUGMENTATIONS, augment
    from dmtg_core.training.context import LocalContext, TrainContext
    from dmtg_core.training.data import ArrayData, Arrays, Batch, Data
    from dmtg_core.training.loop import NonFiniteLossError, evaluate, fit
    from dmtg_core.training.metrics import Metrics, MetricSums, normalized_gain, total_error
    from dmtg_core.training.settings import TemperatureSchedule, TrainSettings
    from dmtg_core.training.state import TrainState
    from dmtg_core.training.step import train_step
    from dmtg_core.training.warm_start import WarmStart

__all__ = [
    "AGGREGATORS",
    "AUGMENTATIONS",
    "ENCODERS",
    "ArrayData",
    "Arrays",
    "Batch",
    "Candidate",
    "Cost",
    "Data",
    "EncoderSpec",
    "GradientAffinities",
    "GroupGate",
    "GroupModel",
    "Grouping",
    "GroupingNetwork",
    "InputSpec",
    "LocalContext",
    "LossOptions",
    "MetricSums",
    "Metrics",
    "NetworkSpec",
    "NonFiniteLossError",
    "SearchOptions",
    "SearchResult",
    "Selection",
    "Task",
    "Teachers",
    "TemperatureSchedule",
    "TrainContext",
    "TrainSettings",
    "TrainState",
    "WarmStart",
    "allow_code",
    "augment",
    "balanced_tasks",
    "best_partition",
    "cluster",
    "evaluate",
    "feature_overlap",
    "fit",
    "grouping_cost",
    "inference_cost",
    "normalized_gain",
    "projected_affinity",
    "search",
    "select",
    "total_error",
    "train_step",
    "training_flops",
    "widened_to",
]

# module → its public names; a module is imported when one of them is used: `dmtg_core.names` needs no torch
_MODULES = {
    "addresses": ("allow_code",),
    "grouping": ("Grouping",),
    "input_spec": ("InputSpec",),
    "loss_options": ("LossOptions",),
    "network.cost": ("Cost", "grouping_cost", "inference_cost", "training_flops", "widened_to"),
    "network.encoders": ("ENCODERS", "EncoderSpec"),
    "network.gate": ("GroupGate",),
    "network.grouping_network": ("GroupingNetwork", "GroupModel"),
    "network.spec": ("NetworkSpec",),
    "sampling": ("balanced_tasks",),
    "search.distillation": ("Teachers",),
    "search.feature_overlap": ("cluster", "feature_overlap"),
    "search.gradient_affinity": ("GradientAffinities", "projected_affinity"),
    "search.options": ("SearchOptions",),
    "search.search": ("SearchResult", "search"),
    "search.selection": ("Candidate", "Selection", "best_partition", "select"),
    "tasks": ("Task",),
    "training.aggregation": ("AGGREGATORS",),
    "training.augment": ("AUGMENTATIONS", "augment"),
    "training.context": ("LocalContext", "TrainContext"),
    "training.data": ("ArrayData", "Arrays", "Batch", "Data"),
    "training.loop": ("NonFiniteLossError", "evaluate", "fit"),
    "training.metrics": ("Metrics", "MetricSums", "normalized_gain", "total_error"),
    "training.settings": ("TemperatureSchedule", "TrainSettings"),
    "training.state": ("TrainState",),
    "training.step": ("train_step",),
    "training.warm_start": ("WarmStart",),
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module, as PEP 562 describes."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """This package, in which `search` is the function also after an import of the subpackage of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, except to a subpackage with the name of a public function."""
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
