"""The settings and trials of a sweep, with names and configurations. The same command has the same trials."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.config.loading import Config
from pipelines.config.sections import SweepSection
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.registry.tracking import shown
from pipelines.storage import Location, locate

TRIALS, STOPPED, FAILED = "trials", "stopped.json", "failed.json"
GROUPS, STEM, TEMPERATURE, RATE = "network.groups", "network.stem", "gate.temperature", "gate.learning_rate"
NAIVE = "naive_mtl"
Setting = dict[str, Any]  # key of the configuration → value; network.groups is always present


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    Args:
        name: Name of the run folder: setting and seed.
        setting: The setting; one group for naive MTL.
        seed: Value of `train.seed`.
        naive: Whether it is naive MTL, the reference of all trials with the same seed.
        config: Configuration of the trial.
    """

    name: str
    setting: Setting
    seed: int
    naive: bool
    config: Config

    @property
    def label(self) -> str:
        """The setting as text."""
        return NAIVE if self.naive else label(self.setting)

    @property
    def run(self) -> Location:
        """The run folder."""
        return (locate(self.config.run.root) / self.config.run.name).retrying()

    @property
    def reports(self) -> int:
        """Largest number of epochs that the trial reports.

        No epoch of a search with a budget is cheaper than one of naive MTL. Its first epoch can cost more than the
        budget.
        """
        settings, options = self.config.settings(), self.config.search_options()
        budget = options.runs(self.config.network.groups)
        if budget is None:
            return max(options.starts, 1) * settings.search_epochs + settings.epochs - settings.search_epochs
        return math.ceil(budget * settings.epochs) + 1

    @property
    def prelude(self) -> int:
        """Largest number of epochs in the first rung, whose scores are those of different candidates."""
        settings, options = self.config.settings(), self.config.search_options()
        if options.runs(self.config.network.groups) is None:
            return 0
        return max(round(options.rung * settings.epochs), 1) * (options.starts + 2)


def sweep_name(config: Config) -> str:
    """Name of the folder of a sweep, from the configuration and the sweep section."""
    values = [config.digest(), config.sweep.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return config.run.name or f"{config.name}-sweep-{digest}"


def settings(config: Config) -> list[Setting]:
    """The settings of a sweep: all combinations, or `sweep.samples` of them, drawn with a fixed seed.

    One group is left out: it is naive MTL, which every sweep trains.

    Raises:
        UserError: If there is no setting, or nothing to compare.
    """
    sweep = config.sweep
    lists: dict[str, Iterable[Any]] = {
        GROUPS: sweep.groups or (config.network.groups,),
        STEM: sweep.stems,
        TEMPERATURE: [value.model_dump() for value in sweep.temperatures],
        RATE: sweep.gate_learning_rates,
    }
    varied = {key: list(values) for key, values in lists.items() if values}
    combined = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    found = list({label(setting): setting for setting in combined if setting[GROUPS] > 1}.values())
    if not found or (len(found) == 1 and len(sweep.seeds) < 2):
        why = "" if found else ": one group is naive MTL, which every sweep trains"
        raise UserError(
            f"the sweep has nothing to compare{why}",
            where="sweep",
            remedy=f"give several values to one of sweep.{', sweep.'.join(list(SweepSection.model_fields)[:5])}",
            wrong_use=True,
        )
    if sweep.samples is None or sweep.samples >= len(found):
        return found
    drawn = np.random.default_rng(0).choice(len(found), sweep.samples, replace=False)
    return [found[i] for i in sorted(drawn)]


def label(setting: Mapping[str, Any]) -> str:
    """A setting as text that a folder name can hold."""
    parts = [f"groups{setting[GROUPS]}"]
    if STEM in setting:
        parts.append(f"stem{setting[STEM]}")
    if TEMPERATURE in setting:
        parts.append(_temperature(setting[TEMPERATURE]))
    if RATE in setting:
        parts.append(f"rate{setting[RATE]:g}")
    return "_".join(parts)


def _temperature(values: Mapping[str, Any]) -> str:
    if values["family"] == "constant":
        return f"constant{values['start']:g}"
    warmup = f"w{values['warmup']:g}" if values["warmup"] else ""
    return f"{values['family']}{values['start']:g}-{values['end']:g}{warmup}"


def trials(config: Config, *, shared_start: bool = True, folder: str = "") -> list[Trial]:
    """All trials of a sweep: naive MTL, then all settings, each with every seed.

    Args:
        config: Configuration of the sweep.
        shared_start: Whether naive MTL can start from the models of `network.start_from`. It cannot start from
            several models.
        folder: Name of the folder of the sweep; by default that of the configuration.

    Raises:
        UserError: As `settings`.
    """
    seeds = dict.fromkeys(config.sweep.seeds or (config.train.seed,))
    naive: list[tuple[Setting, bool]] = [({GROUPS: 1}, True)]
    tried = [*naive, *((setting, False) for setting in settings(config))]
    root = locate(config.run.root) / (folder or sweep_name(config)) / TRIALS
    return [_trial(config, setting, seed, first, shared_start, root) for setting, first in tried for seed in seeds]


def _trial(config: Config, setting: Setting, seed: int, naive: bool, shared_start: bool, root: Location) -> Trial:
    name = f"{NAIVE if naive else label(setting)}_seed{seed}"
    over = dict(setting) | {
        "train.seed": seed,
        "search.baseline": False,
        "track.register_models": False,
        "run.root": str(root),
        "run.name": name,
        # if resources are available, another trial is worth more than another worker of a running trial
        "ray.workers": config.ray.fewest,
    }
    if naive:  # as naive MTL of the core: one branch from the first epoch to the last
        over |= {"gate.sampling": "fixed", "search.method": "dmtg", "search.starts": 1, "search.group_epochs": 0}
        over |= {} if shared_start else {"network.start_from": []}
    return Trial(name, setting, seed, naive, with_values(config, over))


def with_values(config: Config, over: Mapping[str, Any]) -> Config:
    """A configuration with other values under some dotted keys, without the sections sweep and regroup."""
    values = config.model_dump(mode="json", exclude={"sweep", "regroup"})
    for key, value in over.items():
        section, name = key.split(".")
        values[section] = values[section] | {name: value}
    return checked(Config, values)


def best_config(config: Config, setting: Setting) -> dict[str, Any]:
    """The content of `best.yaml`: a configuration with which `dmtg train` trains a setting.

    Of the sections ray and regroup it keeps the values that differ from the defaults, without the values of ray
    that have been applied and without the webhook, whose address is often a secret.
    """
    chosen = shown(with_values(config, setting))
    for section in ("sweep", "regroup", "ray"):
        del chosen[section]
    chosen["run"] = {"root": str(locate(config.run.root)), "folder": config.run.folder}
    chosen["data"]["shards"] = str(locate(config.data.shards))
    applied = {"storage", "tracking_uri", "registry_uri"}
    ray = config.ray.model_dump(mode="json", exclude_defaults=True, exclude=applied)
    regroup = config.regroup.model_dump(mode="json", exclude_defaults=True, exclude={"webhook"})
    return chosen | ({"ray": ray} if ray else {}) | ({"regroup": regroup} if regroup else {})
