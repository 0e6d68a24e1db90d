"""The estimate before a training starts: runs of naive MTL, time and memory on this machine, and other budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dmtg_core.names import listed
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.estimate import Plan, measure, networks, plan, seconds_of
from dmtg_core.search.options import SearchOptions
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.settings import TrainSettings
from pipelines.training.measures.latency import name_of

MINUTES, HOURS = 90.0, 90 * 60.0  # seconds from which a time is shown in minutes, and in hours


def estimated(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    options: SearchOptions,
    context: TrainContext,
    *,
    baseline: bool,
    champion: bool,
    validation: int,
) -> dict[str, Any]:
    """The estimate as JSON values; `text` has it in lines. All workers call it.

    Args:
        spec, data, settings, options, context, baseline: As for the core's `search`.
        champion: As for the core's `plan`.
        validation: Batches of the validation split on each worker.
    """
    found = networks(spec, options)

    def planned(runs: float | None) -> Plan:
        changed = replace(options, budget=runs)
        return plan(spec, settings, changed, baseline=baseline, champion=champion, found=found)

    ours, other = planned(options.budget), {}
    if ours.budget is not None:
        budgets = {"half": 0.5 * ours.budget, "double": 2 * ours.budget}
        other = {name: planned(runs) for name, runs in budgets.items() if runs >= 1}
    averaged = (
        settings if ours.budget is not None else replace(settings, average=0)
    )  # only a guided search averages
    timed, memory = measure(found, data, averaged, context)
    steps = data.steps(settings.batch_size)
    epochs = {name: epoch.seconds(steps, validation) for name, epoch in timed.items()}
    values = values_of(ours) | {
        "seconds": seconds_of(ours, settings, epochs),
        "memory_bytes": memory,
        "device": name_of(context.device),
        "workers": context.world_size,
        "epoch_seconds": epochs,
        **{name: values_of(one) for name, one in other.items()},
    }
    return values | {"text": lines_of(values)}


def values_of(found: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {
        "runs": found.runs + found.baseline, "budget": found.budget, "baseline": found.baseline,
        "left_out": list(found.left_out), "overlap_epochs": found.overlap_epochs, "rung_epochs": dict(found.rung),
        "longest_epochs": found.longest, "rung_runs": found.rung_runs, "best_epochs": found.epochs,
        "further_networks": found.members,
    }  # fmt: skip


def lines_of(values: Mapping[str, Any]) -> list[str]:
    """The estimate as lines of text."""
    memory = values["memory_bytes"]
    used = f", memory {memory / 2**30:.1f} GiB" if memory is not None else ""
    baseline = " with the baseline" if values["baseline"] else ""
    time = f"{duration(values['seconds'])} on {values['device']}{used}"
    lines = [f"estimate: at most {values['runs']:.3g} runs of naive MTL{baseline}; at most {time}"]
    if values["budget"] is None:
        return lines
    lines.append(f"search.budget={values['budget']:.3g}: {_described(values)}")
    for name in ("half", "double"):
        if name in values:
            change = _change(values, values[name])
            lines.append(f"search.budget={values[name]['budget']:.3g} {change}")
    return lines


def _described(values: Mapping[str, Any]) -> str:
    """What a budget does."""
    left = f" (without {listed(values['left_out'])})" if values["left_out"] else ""
    apart = values["overlap_epochs"]
    text = f"feature overlap in a wider encoder after {_epochs(apart)}; " if apart else ""
    text += f"{_rung(values['rung_epochs'])}{left}; "
    first, count = next(iter(values["rung_epochs"].items()))
    if (longest := values["longest_epochs"]) > count:
        text += f"{first} for up to {longest} epochs until its groups are stable; "
    text += f"about {_epochs(values['best_epochs'])} for the best one; "
    return text + _distillation(values["further_networks"])


def _change(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What another budget leaves out or adds."""
    verb = "leaves out" if other["budget"] < ours["budget"] else "adds"
    few, many = sorted((ours, other), key=lambda one: float(one["budget"]))
    parts = [name for name in many["rung_epochs"] if name not in few["rung_epochs"]]
    if many["overlap_epochs"] > few["overlap_epochs"]:
        parts.append("a wider encoder for the feature overlap")
    if (more := min(many["rung_epochs"][name] - count for name, count in few["rung_epochs"].items())) > 0:
        parts.append(f"{_epochs(more)} of the first rung")
    if many["best_epochs"] > few["best_epochs"]:
        parts.append(f"{_epochs(many['best_epochs'] - few['best_epochs'])} of the best network")
    if more := many["further_networks"] - few["further_networks"]:
        added = f"{more} more network{'s' * (more > 1)} to distil from"
        parts.append(added if few["further_networks"] else _distillation(many["further_networks"]))
    return f"{verb} {', '.join(parts)}" if parts else f"{verb} nothing"


def _rung(epochs: Mapping[str, int]) -> str:
    """The epochs of candidates; those with the same number are together."""
    names = {count: [name for name, own in epochs.items() if own == count] for count in epochs.values()}
    return "; ".join(
        f"{listed(same)} for {_epochs(count)}{' each' * (len(same) > 1)}" for count, same in names.items()
    )


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _distillation(further: int) -> str:
    return f"a distillation from {further + 1} networks" if further else "no distillation"


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < MINUTES:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < HOURS else f"{seconds / 3600:.1f} h"
