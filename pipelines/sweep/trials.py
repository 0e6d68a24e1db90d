"""What a sweep tries: settings, trials, their names and configurations. The same words give the same ones."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmtg_core.network.encoders import WIDTHS
from pipelines.config.loading import Config
from pipelines.config.sections import SweepSection
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.registry.tracking import shown
from pipelines.storage import Location, locate

TRIALS, STOPPED, FAILED = "trials", "stopped.json", "failed.json"
GROUPS, STEM, TEMPERATURE, RATE = "network.groups", "network.stem", "gate.temperature", "gate.learning_rate"
NAIVE = "naive_mtl"
Setting = dict[str, Any]  # key of the configuration → value, network.groups always among them


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    Args:
        name: Of its run folder: the setting and the seed in readable words.
        setting: What it tries; of naive MTL one group.
        seed: Its `train.seed`.
        naive: Whether it is naive MTL, which the others of its seed are measured against.
        config: Its whole configuration.
    """

    name: str
    setting: Setting
    seed: int
    naive: bool
    config: Config

    @property
    def label(self) -> str:
        """The setting in words."""
        return NAIVE if self.naive else label(self.setting)

    @property
    def run(self) -> Location:
        """Its run folder."""
        return (locate(self.config.run.root) / self.config.run.name).retrying()

    @property
    def reports(self) -> int:
        """Epochs that it reports at most: those of every candidate, if all go on."""
        settings, options = self.config.settings(), self.config.search_options()
        gated = options.starts * settings.search_epochs
        if options.method == "dmtg" or self.config.network.groups == 1:
            return gated + settings.epochs - settings.search_epochs
        others = 1 + (options.wide and self.config.network.encoder in WIDTHS)
        later = options.distilled(settings).epochs if options.distil_share else 0
        return self.prelude + (options.starts + others) * settings.epochs + later

    @property
    def prelude(self) -> int:
        """Epochs that it reports before the first candidate, at most."""
        settings, options = self.config.settings(), self.config.search_options()
        guided = options.method == "guided" and self.config.network.groups > 1
        return options.affinity_epochs(settings)[1] if guided else 0


def sweep_name(config: Config) -> str:
    """Name of a sweep's folder: it follows from configuration and sweep section."""
    values = [config.digest(), config.sweep.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return config.run.name or f"{config.name}-sweep-{digest}"


def settings(config: Config) -> list[Setting]:
    """The settings that are tried: all combinations, or `sweep.samples` of them, always the same ones.

    One group is left out: that is naive MTL, which is trained anyway.

    Raises:
        UserError: When nothing is left to try, or nothing to compare.
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
        why = "" if found else ": one group is naive MTL, which every sweep trains beside the others"
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
    """A setting in words that a folder can be called."""
    words = [f"groups{setting[GROUPS]}"]
    if STEM in setting:
        words.append(f"stem{setting[STEM]}")
    if TEMPERATURE in setting:
        words.append(_temperature(setting[TEMPERATURE]))
    if RATE in setting:
        words.append(f"rate{setting[RATE]:g}")
    return "_".join(words)


def _temperature(values: Mapping[str, Any]) -> str:
    if values["family"] == "constant":
        return f"constant{values['start']:g}"
    warmup = f"w{values['warmup']:g}" if values["warmup"] else ""
    return f"{values['family']}{values['start']:g}-{values['end']:g}{warmup}"


def trials(config: Config, *, shared_start: bool = True) -> list[Trial]:
    """All trials of a sweep: first naive MTL, then every setting, each with every seed.

    Args:
        config: The configuration of the sweep.
        shared_start: Whether naive MTL can start from the models of `network.start_from`; it cannot from several.

    Raises:
        UserError: As `settings`.
    """
    seeds = dict.fromkeys(config.sweep.seeds or (config.train.seed,))
    naive: list[tuple[Setting, bool]] = [({GROUPS: 1}, True)]
    tried = [*naive, *((setting, False) for setting in settings(config))]
    return [_trial(config, setting, seed, first, shared_start) for setting, first in tried for seed in seeds]


def _trial(config: Config, setting: Setting, seed: int, naive: bool, shared_start: bool) -> Trial:
    name = f"{NAIVE if naive else label(setting)}_seed{seed}"
    over = dict(setting) | {
        "train.seed": seed,
        "search.baseline": False,
        "track.register_models": False,
        "run.root": str(locate(config.run.root) / sweep_name(config) / TRIALS),
        "run.name": name,
        # with room for more workers another trial does more than another worker of one that runs
        "ray.workers": config.ray.fewest,
    }
    if naive:  # as the core's own naive MTL: one branch from the first epoch to the last
        over |= {"gate.sampling": "fixed", "search.method": "dmtg", "search.starts": 1, "search.group_epochs": 0}
        over |= {} if shared_start else {"network.start_from": []}
    return Trial(name, setting, seed, naive, laid_over(config, over))


def laid_over(config: Config, over: Mapping[str, Any]) -> Config:
    """A configuration with other values under some dotted keys, without what is for sweeps and nights."""
    values = config.model_dump(mode="json", exclude={"sweep", "regroup"})
    for key, value in over.items():
        section, name = key.split(".")
        values[section] = values[section] | {name: value}
    return checked(Config, values)


def best_config(config: Config, setting: Setting) -> dict[str, Any]:
    """What `dmtg train` takes to train a setting as this configuration would be: the content of `best.yaml`.

    Of the ray and regroup sections only what differs from its defaults is kept: of ray nothing that has been
    applied, of regroup no webhook, whose address often is a secret.
    """
    chosen = shown(laid_over(config, setting))
    for section in ("sweep", "regroup", "ray"):
        del chosen[section]
    chosen["run"] = {"root": str(locate(config.run.root))}
    chosen["data"]["shards"] = str(locate(config.data.shards))
    applied = {"storage", "tracking_uri", "registry_uri"}
    ray = config.ray.model_dump(mode="json", exclude_defaults=True, exclude=applied)
    regroup = config.regroup.model_dump(mode="json", exclude_defaults=True, exclude={"webhook"})
    return chosen | ({"ray": ray} if ray else {}) | ({"regroup": regroup} if regroup else {})
