"""The settings and trials of a sweep, with names and configurations. The same command has the same trials."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.registry.tracking import shown
from pipelines.storage import Location, locate

TRIALS, STOPPED, FAILED = "trials", "stopped.json", "failed.json"
GROUPS, STEM, TEMPERATURE, RATE = "network.groups", "network.stem", "gate.temperature", "gate.learning_rate"
NAMES = {GROUPS: "groups", STEM: "stem", RATE: "rate"}  # in labels; other keys have their own names
LONGEST = 140  # characters of a label, which is a part of a folder name
OTHER = re.compile(r"[^A-Za-z0-9.+-]+")
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
        """Number of epochs that the trial reports at most, or with a budget nearly so.

        With a budget it is a number of epochs of naive MTL, which few networks train in less time.
        """
        settings, options = self.config.settings(), self.config.search_options()
        budget = options.runs(self.config.network.groups)
        if budget is None:
            return max(options.starts, 1) * settings.search_epochs + settings.epochs - settings.search_epochs
        return math.ceil(budget * settings.epochs) + 1

    @property
    def budget(self) -> float | None:
        """The most training of the search in runs of naive MTL; None for a search of fixed length."""
        return self.config.search_options().runs(self.config.network.groups)

    @property
    def prelude(self) -> int:
        """Largest number of epochs in the first rung, whose scores are those of different candidates.

        An epoch of one encoder costs at least 1 / K of one of a gate with K branches, and a rung has the same cost
        for all candidates. A wide encoder costs about as much as K branches, unless they share a frozen one.
        """
        settings, options, network = self.config.settings(), self.config.search_options(), self.config.network
        if options.runs(network.groups) is None:
            return 0
        cheap = network.groups if network.branch != "copy" or not options.wide else 1
        return max(round(options.rung * settings.epochs), 1) * (options.starts + 1 + cheap)


def sweep_name(config: Config) -> str:
    """Name of the folder of a sweep, from the configuration and the sweep section."""
    values = [config.digest(), config.sweep.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return config.run.name or f"{config.name}-sweep-{digest}"


def label(setting: Mapping[str, Any]) -> str:
    """A setting as text that a folder name can hold."""
    names = [key.rpartition(".")[2] for key in setting]
    parts = []
    for key, value in setting.items():
        name = key.rpartition(".")[2]
        name = NAMES.get(key) or (name if names.count(name) == 1 else key)
        parts.append(_temperature(value) if key == TEMPERATURE else f"{name}{_text(value)}")
    text = "_".join(parts)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}-{_digest(text)}"


def _text(value: Any) -> str:
    """A value as text of letters, digits, points and dashes."""
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
        return "x".join(map(str, value))
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    plain = OTHER.sub("-", text).strip("-")
    return plain if plain == text else f"{plain}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _temperature(values: Mapping[str, Any]) -> str:
    if values["family"] == "constant":
        return f"constant{values['start']:g}"
    warmup = f"w{values['warmup']:g}" if values["warmup"] else ""
    return f"{values['family']}{values['start']:g}-{values['end']:g}{warmup}"


def trials_folder(config: Config, folder: str = "") -> Location:
    """The folder of the run folders of all trials; `folder` is that of the sweep."""
    return locate(config.run.root) / (folder or sweep_name(config)) / TRIALS


def seeds_of(config: Config) -> tuple[int, ...]:
    """The seeds of every setting."""
    return tuple(dict.fromkeys(config.sweep.seeds or (config.train.seed,)))


def naive_trials(config: Config, folder: str = "", *, shared_start: bool = True) -> list[Trial]:
    """Naive MTL with every seed.

    Args:
        config: Configuration of the sweep.
        folder: Name of the folder of the sweep; by default that of the configuration.
        shared_start: Whether naive MTL can start from the models of `network.start_from`. It cannot start from
            several models.
    """
    # as naive MTL of the core: one branch from the first epoch to the last
    over = {"gate.sampling": "fixed", "search.method": "dmtg", "search.starts": 1, "search.group_epochs": 0}
    over |= {} if shared_start else {"network.start_from": []}
    return [_trial(config, {GROUPS: 1}, seed, folder, over) for seed in seeds_of(config)]


def setting_trials(config: Config, setting: Setting, folder: str = "") -> list[Trial]:
    """The trials of a setting, one for each seed; the other arguments as in `naive_trials`.

    Raises:
        UserError: If the setting is no configuration.
    """
    try:
        return [_trial(config, setting, seed, folder) for seed in seeds_of(config)]
    except UserError as error:
        raise UserError(
            f"setting {label(setting)}: {error.what}", where="sweep", remedy=error.remedy, wrong_use=True
        ) from error


def _trial(
    config: Config, setting: Setting, seed: int, folder: str, naive: Mapping[str, Any] | None = None
) -> Trial:
    name = f"{NAIVE if naive else label(setting)}_seed{seed}"
    over = dict(setting) | {
        "train.seed": seed,
        "search.baseline": False,
        "track.register_models": False,
        "run.root": str(trials_folder(config, folder)),
        "run.name": name,
        # if resources are available, another trial is worth more than another worker of a running trial
        "ray.workers": config.ray.fewest,
    }
    return Trial(name, setting, seed, naive is not None, with_values(config, over | dict(naive or {})))


def with_values(config: Config, over: Mapping[str, Any]) -> Config:
    """A configuration with other values under some dotted keys, without the sections sweep and regroup."""
    values = config.model_dump(mode="json", exclude={"sweep", "regroup"})
    for key, value in over.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            inner = section.get(part)
            section[part] = section = dict(inner) if isinstance(inner, dict) else {}
        section[last] = value
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
