"""Loading of configurations: YAML files and `section.key=value` overrides, validated before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from pipelines.config.code import allow_named, check_allowed
from pipelines.config.network_section import NetworkSection
from pipelines.config.paths import anchored, as_written, placed
from pipelines.config.ray_section import RaySection
from pipelines.config.regroup_section import RegroupSection
from pipelines.config.search_section import SearchSection, runs_of
from pipelines.config.sections import (
    CompareSection,
    DataSection,
    GateSection,
    RunSection,
    SignalSection,
    SourceSection,
    TrackSection,
    TrainSection,
)
from pipelines.config.sweep_section import SweepSection
from pipelines.config.validation import Section, checked, clip
from pipelines.config.yaml_text import DEEPEST, LARGEST_TEXT, load_yaml
from pipelines.errors import UserError
from pipelines.recipes import RECIPES, recipes

if TYPE_CHECKING:  # a configuration is read without torch
    from dmtg_core.input_spec import InputSpec
    from dmtg_core.network.encoders import EncoderSpec
    from dmtg_core.network.spec import NetworkSpec
    from dmtg_core.search.options import SearchOptions
    from dmtg_core.tasks import Task
    from dmtg_core.training.settings import TrainSettings


BY_NAME = ("regroup.limits", "compare.groupings", "sweep.space")  # their keys can have dots


@contextmanager
def _excluding(where: str) -> Iterator[None]:
    """Turn the core's error about options that exclude each other into a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=where, remedy="correct the configuration", wrong_use=True) from error


class Config(Section):
    """A whole configuration."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$", max_length=100, description="Name of the run and of the registered models."
    )
    source: SourceSection | None = None
    data: DataSection
    network: NetworkSection = NetworkSection()
    gate: GateSection = GateSection()
    train: TrainSection = TrainSection()
    search: SearchSection = SearchSection()
    sweep: SweepSection = SweepSection()
    compare: CompareSection = CompareSection()
    signal: SignalSection = SignalSection()
    regroup: RegroupSection = RegroupSection()
    track: TrackSection = TrackSection()
    run: RunSection = RunSection()
    ray: RaySection = RaySection()

    def digest(self) -> str:
        """Eight hex digits that change with every value that can change the result of a run."""
        values = self.model_dump(
            mode="json", include={"name", "source", "data", "network", "gate", "train", "search"}
        )
        if not self.train.patience:  # runs of earlier versions keep their names
            del values["train"]["patience"]
        del values["train"]["trees"]  # a figure beside the result
        del values["network"]["batch_branches"]  # another order of the same computation
        if self.network.rescale_gradients != "published":  # runs of earlier versions keep their names
            values["network"]["rescale_gradients"] = self.network.rescale_gradients == "tasks"
        if self.data.stem_outputs == "auto":
            del values["data"]["stem_outputs"]
        if self.data.sampler == "uniform":
            del values["data"]["sampler"]
        if self.network.branch != "lora":
            del values["network"]["adapter"]
        if self.network.branch == "copy":
            del values["network"]["branch"]
        values = as_written(values, self.run.folder)  # the same from every working directory
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def run_name(self) -> str:
        """Name of the run folder: the same command always has the same folder."""
        return self.run.name or f"{self.name}-{self.digest()}"

    def settings(self) -> TrainSettings:
        """The settings of the core's training.

        Raises:
            UserError: For options that exclude each other.
        """
        from dmtg_core.training.settings import TemperatureSchedule, TrainSettings

        allow_named(self.model_dump())
        shared = {k: v for k, v in self.train.model_dump().items() if k in TrainSettings.__dataclass_fields__}
        with _excluding("train, gate"):
            return TrainSettings(
                **shared,
                batch_branches=self.network.batch_branches,
                search_share=self.search.share,
                average=self.search.average,
                gate_learning_rate=self.gate.learning_rate,
                temperature=TemperatureSchedule(**self.gate.temperature.model_dump()),
                entropy_weight=self.gate.entropy_weight,
                prune_threshold=self.gate.prune_threshold if self.gate.prune else 0.0,
            )

    def search_options(self, where: str = "search") -> SearchOptions:
        """The options of the core's search.

        Args:
            where: Place that an error names.

        Raises:
            UserError: For options that exclude each other.
        """
        from dmtg_core.search.options import SearchOptions

        held = self.search.model_dump() | {"budget": runs_of(self.search.budget, self.network.groups)}
        with _excluding(where):
            return SearchOptions(**{name: held[name] for name in SearchOptions.__dataclass_fields__})

    def check_options(self) -> None:
        """Check the options of training and search before data is read and workers start.

        Raises:
            UserError: As `settings` and `search_options`.
        """
        self.settings()
        self.search_options()
        with _excluding("network.encoder, network.options"):
            self.encoder_spec().check()

    def encoder_spec(self) -> EncoderSpec:
        """The specification of the core's encoder."""
        from dmtg_core.network.encoders import EncoderSpec

        network = self.network
        allow_named(self.model_dump())
        adapter = network.adapter.model_dump() if network.branch == "lora" else None
        return EncoderSpec(network.encoder, network.stem, dict(network.options), network.branch, adapter)

    def network_spec(self, spec: InputSpec, tasks: Sequence[Task]) -> NetworkSpec:
        """The specification of the core's network."""
        from dmtg_core.network.spec import NetworkSpec

        found = NetworkSpec(
            input=spec,
            tasks=tuple(tasks),
            encoder=self.encoder_spec(),
            groups=self.network.groups,
            decoder=self.network.decoder,
            decoder_width=self.network.decoder_width,
            sampling=self.gate.sampling,
            initial=self.gate.initial,
            initial_scale=self.gate.initial_scale,
            rescale_gradients=self.network.rescale_gradients,
            task_weighting=self.train.task_weighting,
            seed=self.train.seed,
        )
        check_allowed(found.code, trust_code=self.run.trust_code)
        return found


def load_config(path: str, overrides: Sequence[str] = (), ray_config: str = "") -> Config:
    """The configuration of a YAML file, a stored object or a recipe, with overrides.

    Relative paths of a file are relative to its folder, those of overrides and recipes to the working directory;
    with `ray.storage`, the paths of results are relative to that.

    The key `base:` of a file names a recipe, or a file relative to it. The file is merged into its base, and the
    overrides are merged into the result. Sections and other dictionaries are merged key by key; any other value,
    null included, replaces the value of the base. Options belong to one encoder or one reader: a different
    `network.encoder` or `source.kind` discards the options of the base.

    Args:
        path: Path, address in object storage (`s3://…`) or name of a recipe.
        overrides: Values for single keys, as `section.key=value`.
        ray_config: File with the `ray` section; by default `ray_config.yaml` in the current folder, if it exists.

    Raises:
        UserError: For a file or base that is missing or not YAML, bases that form a cycle, an override without
            "=", and any wrong key or value.
    """
    over: dict[str, Any] = {}
    for override in overrides:
        _apply(over, override)
    values = _overlaid(_with_ray(path, ray_config, beside=True), over)
    if isinstance(values.get("ray"), dict) and values["ray"].get("storage"):
        values = _overlaid(_with_ray(path, ray_config, beside=False), over)
    return checked(Config, placed(values))


def _with_ray(path: str, ray_config: str, *, beside: bool) -> dict[str, Any]:
    """The values of a file, its bases and the file of the `ray` section; `beside` as in `_with_bases`."""
    values = _stored(path) if "://" in path else _with_bases(_find(path), (), beside=beside)
    ray_file = Path(ray_config or "ray_config.yaml")
    if ray_config or ray_file.exists():
        values["ray"] = {**_read_yaml(ray_file), **(values.get("ray") or {})}
    return values


def load_ray(ray_config: str = "") -> RaySection:
    """The `ray` section for a command without a configuration, from `ray_config` or `ray_config.yaml`.

    Raises:
        UserError: For a file that is missing, not YAML, or has a wrong key or value.
    """
    file = Path(ray_config or "ray_config.yaml")
    held = _read_yaml(file) if ray_config or file.exists() else {}
    return checked(RaySection, held, "ray")


def load_track(uri: str = "", ray_config: str = "") -> TrackSection:
    """The `track` section for a command without a configuration: `uri`, else the server of `ray_config.yaml`.

    Raises:
        UserError: For a file that is missing, not YAML, or has a wrong key or value.
    """
    section = load_ray(ray_config)
    return TrackSection(uri=uri or section.tracking_uri, registry_uri="" if uri else section.registry_uri)


def recipe_config(name: str) -> Config:
    """A recipe as it ships, without the values of `ray_config.yaml`."""
    return checked(Config, _with_bases(_find(name), ()))


def _find(path: str, folder: Path = Path()) -> Path:
    for candidate in (folder / path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    nearest = difflib.get_close_matches(path, recipes(), n=3)
    meant = f"did you mean {', '.join(nearest)}? Otherwise " if nearest else ""
    raise UserError(
        f"no configuration file {path!r}",
        where=str((folder / path).absolute()),
        remedy=f"{meant}give a YAML file, or a recipe: {', '.join(recipes())}",
        wrong_use=True,
    )


def _with_bases(file: Path, above: tuple[Path, ...], *, beside: bool = False) -> dict[str, Any]:
    """The values of a file merged into those of its base, which may have a base too.

    Args:
        above: The chain of files whose base this file is, the first one first.
        beside: Whether relative paths of a file that is no recipe are relative to its folder.
    """
    chain = (*above, file.resolve())
    if chain[-1] in above:
        raise UserError(
            f"the bases form a cycle: {' → '.join(one.name for one in chain)}",
            where=str(file),
            remedy="remove the base of one of the files",
            wrong_use=True,
        )
    values = _read_yaml(file)
    base = values.pop("base", None)
    if beside and RECIPES not in file.parents:
        values = anchored(values, file)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(
            f"base: expected the name of a recipe or a file, got {base!r}",
            where=str(file),
            remedy="name one recipe or one file",
            wrong_use=True,
        )
    return _overlaid(_with_bases(_find(base, file.parent), chain, beside=beside), values)


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above` merged into those of `below`, as `load_config` describes; neither is changed."""
    merged = _merged(below, above)
    for section, owner, default in (("network", "encoder", NetworkSection().encoder), ("source", "kind", None)):
        old, new = below.get(section), merged.get(section)
        own = isinstance(above.get(section), dict)
        if (
            own
            and isinstance(old, dict)
            and isinstance(new, dict)
            and new.get(owner, default) != old.get(owner, default)
        ):
            new["options"] = above[section].get("options", {})
    return merged


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        held = below.get(key)
        merged[key] = _merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(_text(path))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the configuration: {_reason(error)}", where=str(path), remedy="correct the file",
            wrong_use=True,
        ) from error  # fmt: skip
    return _sections(values, str(path))


def _text(path: Path) -> str:
    """The text of a file; one that is too large is not read to its end."""
    with path.open(encoding="utf-8") as file:
        return file.read(LARGEST_TEXT + 1)


def _stored(address: str) -> dict[str, Any]:
    """The values of a file in object storage, such as one that a sweep writes; its base can be a recipe."""
    from pipelines.storage import locate  # imports Arrow, which a local file does not need

    try:
        values = _sections(load_yaml(locate(address).read_text()), address)
    except (FileNotFoundError, PermissionError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the configuration: {_reason(error)}", where=address,
            remedy="correct the address or the file",
            wrong_use=True,
        ) from error  # fmt: skip
    base = values.pop("base", None)
    return values if base is None else _overlaid(_with_bases(_find(str(base)), ()), values)


def _reason(error: Exception) -> str:
    """The error of a file, as one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"not valid YAML in line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0]


def _sections(values: object, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(
            f"expected sections with keys, got {type(values).__name__}",
            where=where,
            remedy="start from a recipe",
            wrong_use=True,
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"expected section.key=value, got {override!r}",
            where="command line",
            remedy="write an override, for example train.epochs=10",
            wrong_use=True,
        )
    owner = next((name for name in BY_NAME if key.startswith(f"{name}.")), "")
    *path, last = [*owner.split("."), key.removeprefix(f"{owner}.")] if owner else key.split(".", DEEPEST)
    section = values
    for part in path:
        inner = section.get(part)
        section[part] = section = dict(inner) if isinstance(inner, dict) else {}
    try:
        section[last] = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"the value is not YAML: {clip(text)}",
            where=f"command line, {key}",
            remedy="close every bracket and quote, and quote the override for the shell",
            wrong_use=True,
        ) from error
