"""Strict configuration: YAML plus `section.key=value` words, checked before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dmtg_core.aggregation import AGGREGATORS
from dmtg_core.encoders import ENCODERS, EncoderSpec
from dmtg_core.network import NetworkSpec
from dmtg_core.schedules import TemperatureSchedule
from dmtg_core.settings import TrainSettings
from dmtg_core.tasks import InputSpec, Task
from pipelines.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


S = TypeVar("S", bound=BaseModel)


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def checked(model: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """`values` as a `model`, or one error that names every key that is wrong.

    Args:
        where: Prefix of the keys in the message, as the user would write it (`source.options`).

    Raises:
        UserError: With the nearest valid keys for an unknown one.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [_problem(model, dict(found), where) for found in error.errors()]
        raise UserError(
            "; ".join(problem for problem, _ in problems),
            where=where or "configuration",
            remedy="; ".join(dict.fromkeys(remedy for _, remedy in problems)),
            wrong_use=True,
        ) from error


def _problem(model: type[BaseModel], found: dict[str, Any], where: str) -> tuple[str, str]:
    path = [str(part) for part in found["loc"]]
    name = ".".join([where, *path] if where else path)
    if found["type"] != "extra_forbidden":
        return f"{name}: {found['msg']}, got {found['input']!r}", "correct the value"
    valid = list(_keys_at(model, path[:-1]))
    nearest = difflib.get_close_matches(path[-1], valid, n=3) or valid
    return f"unknown key {name}", f"did you mean {', '.join(nearest)}?"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section that `path` leads to from `model`."""
    for part in path:
        field = model.model_fields.get(part)
        inner = [] if field is None else [field.annotation, *get_args(field.annotation)]
        sections = [t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)]
        if not sections:
            break
        model = sections[0]
    return list(model.model_fields)


class SourceSection(Section):
    """Raw data to make shards from."""

    kind: str = Field(
        description="reader of the raw format: celeba, folder, nuclei, rooms, table, taskonomy or text"
    )
    root: str = Field("", description="local folder or s3:// address of the raw data")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the reader")


class DataSection(Section):
    """Shards and how they are read."""

    shards: str = Field(description="local folder or s3:// address of the shards")
    tasks: list[str] | None = Field(None, description="tasks to train on; all that the shards hold by default")
    rows_per_shard: int | None = Field(None, ge=1, description="samples in one Parquet file; by default 64 MiB")
    compression: Literal["none", "lz4", "zstd"] = Field("none", description="compression of the Parquet pages")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of unusable samples that stops sharding")
    verify_checksums: bool = Field(True, description="compare every shard with its checksum before training")
    min_support: int = Field(20, ge=1, description="labels of a class below which a result says little")
    cache: Literal["auto", "memory", "device", "stream"] = Field(
        "auto",
        description="keep the samples in shared memory or on the training device, stream them every epoch, or "
        "choose between memory and stream by their size",
    )
    read_threads: int = Field(4, ge=1, description="shard parts that a streaming worker reads at once")
    shuffle_mib: float = Field(
        128,
        gt=0,
        description="decoded size of what a streamed global batch is drawn from; a worker holds up to three times "
        "that. At 16 MiB for every worker, or a multiple, each reads a part of its own",
    )
    cache_gib: float = Field(4.0, gt=0, description="decoded size up to which auto keeps samples in memory")


class NetworkSection(Section):
    """The encoder, where it is cut, and the number of groups."""

    encoder: str = Field("convnet", description=f"one of {', '.join(ENCODERS)}")
    stem: int = Field(0, ge=0, description="stages of the encoder that all groups share")
    groups: int = Field(3, ge=1, description="K, the most groups there can be")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the encoder")
    decoder: Literal["subpixel", "xception"] = Field("subpixel", description="decoder of the dense tasks")
    decoder_width: int = Field(64, ge=1, description="channels of the decoder's first layer")
    rescale_gradients: bool = Field(False, description="scale gradients by 1/√N into branches, 1/√K into the stem")
    start_from: tuple[str, ...] = Field(
        (),
        description="folders of finished runs, or of single models, whose weights the network starts from: one "
        "model for all branches, or a model for each",
    )

    @field_validator("start_from", mode="before")
    @classmethod
    def _one_place(cls, value: object) -> object:
        return [value] if isinstance(value, str) and value else value or []


class TemperatureSection(Section):
    """Temperature of the gate over the search."""

    family: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    start: float = Field(2.5, gt=0)
    end: float = Field(0.5, gt=0)
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the search spent at the start temperature")


class GateSection(Section):
    """The distribution over branches."""

    sampling: Literal["gumbel", "gumbel_per_sample", "softmax", "straight_through", "fixed"] = "gumbel"
    initial: Literal["uniform", "uniform_noise", "diagonal", "gaussian"] = "uniform"
    initial_scale: float = 0.01
    learning_rate: float | None = Field(None, gt=0, description="of the gate; train.learning_rate by default")
    entropy_weight: float = Field(0.0, description="factor of the gate's entropy in the loss")
    prune: bool = Field(
        True, description="remove heads during the search; off keeps all K·N until it ends, as published"
    )
    prune_threshold: float = Field(0.02, ge=0, lt=1, description="probability under which a head is removed")
    temperature: TemperatureSection = TemperatureSection()


class TrainSection(Section):
    """The training run."""

    epochs: int = Field(20, ge=1, description="search and fine-tuning together")
    batch_size: int = Field(64, ge=1, description="samples of a global batch, over all workers")
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    lr_schedule: Literal["constant", "cosine", "halving", "plateau"] = "cosine"
    lr_every: int = Field(15, ge=1, description="epochs between two halvings (halving)")
    lr_patience: int = Field(3, ge=0, description="epochs without progress before one (plateau)")
    lr_min: float = Field(0.0, ge=0, description="the learning rate falls no further")
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 for no limit")
    task_weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed", description="learn weights of the tasks beside the fixed ones, or not"
    )
    aggregator: str = Field(
        "sum",
        description="how gradients of a group's tasks are combined once they have their branch: sum, or one of "
        f"{', '.join(AGGREGATORS)} (needs the extra aggregators)",
    )
    accumulate: int = Field(1, ge=1, description="parts that a batch is computed in, to save memory")
    recompute: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    compile: bool | None = Field(None, description="torch.compile; by default on a GPU only")
    sync_batchnorm: bool = Field(False, description="normalise over the batches of all workers (GPUs only)")
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: tuple[Literal["flip"], ...] = Field((), description="done to training images: flip left to right")
    checkpoint_every: int = Field(
        500, ge=0, description="steps between two checkpoints within an epoch; 0 for none but at its end"
    )
    seed: int = 22


class SearchSection(Section):
    """How the grouping is searched for."""

    starts: int = Field(1, ge=1, description="searches; the best on validation data is fine-tuned")
    share: float = Field(0.5, gt=0, le=1, description="share of the epochs in which the gate learns")
    group_epochs: int = Field(
        0, ge=0, description="epochs that each group then trains on its own, all groups at once if there is room"
    )
    group_learning_rate: float | None = Field(None, gt=0, description="for these; a tenth of train.learning_rate")
    baseline: bool = Field(True, description="train naive MTL beside it")


class TrackSection(Section):
    """MLflow."""

    uri: str = Field(
        "", description="tracking server; empty for an SQLite file in the current folder, none for no tracking"
    )
    experiment: str = Field("dmtg", description="MLflow experiment")
    register_models: bool = Field(True, description="register the grouping and one model a group")


class RunSection(Section):
    """Where a run leaves its files."""

    root: str = Field("runs", description="local folder or s3:// address that holds run folders")
    name: str = Field("", description="name of the run folder; by default it follows from the configuration")


class RaySection(Section):
    """Where and how Ray runs (ray_config.yaml)."""

    address: str = Field("", description="address of a cluster; empty for RAY_ADDRESS, else a local one")
    workers: int | tuple[int, int] = Field(
        2, description="data-parallel training workers; two numbers, the fewest and the most, follow the cluster"
    )
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    data_cpus: float = Field(2, gt=0, description="CPUs that Ray Data can count on beside the workers")
    object_store_mib: int | None = Field(
        None, ge=80, description="shared memory of a local cluster; by default a third of the machine's memory"
    )
    max_failures: int = Field(2, ge=0, description="times that lost workers are replaced")
    timeout_s: int = Field(300, ge=1, description="longest wait of a worker for the others")
    resize_every_s: float = Field(60, gt=0, description="time between two looks at whether more workers have room")
    hung_after_s: float = Field(
        1800, ge=0, description="time without a batch after which a worker is given up; 0 for never"
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _one_or_two(cls, value: object) -> object:
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        counts = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n >= 1]
        if len(counts) != len(numbers) or len(counts) not in (1, 2) or counts != sorted(counts):
            raise ValueError("expected a number from 1 on, or two such numbers [fewest, most]")
        return tuple(counts) if len(counts) == 2 else counts[0]

    @property
    def fewest(self) -> int:
        """With fewer workers than that, training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """There are never more workers than that."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Config(Section):
    """A whole configuration."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="name of the run and of the registered models")
    source: SourceSection | None = None
    data: DataSection
    network: NetworkSection = NetworkSection()
    gate: GateSection = GateSection()
    train: TrainSection = TrainSection()
    search: SearchSection = SearchSection()
    track: TrackSection = TrackSection()
    run: RunSection = RunSection()
    ray: RaySection = RaySection()

    def digest(self) -> str:
        """Eight hex digits that change with everything that can change a run's result."""
        values = self.model_dump(
            mode="json", include={"name", "source", "data", "network", "gate", "train", "search"}
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def run_name(self) -> str:
        """Name of the run folder: the same words always lead to the same folder."""
        return self.run.name or f"{self.name}-{self.digest()}"

    def settings(self) -> TrainSettings:
        """What the core's training takes.

        Raises:
            UserError: For batch normalisation over workers that have no GPUs.
        """
        if self.train.sync_batchnorm and not self.ray.gpus_per_worker:
            raise UserError(
                "batch normalisation over all workers needs workers on GPUs",
                where="train.sync_batchnorm=true, ray.gpus_per_worker=0",
                remedy="set train.sync_batchnorm=false, or give each worker a GPU",
                wrong_use=True,
            )
        shared = {k: v for k, v in self.train.model_dump().items() if k in TrainSettings.__dataclass_fields__}
        return TrainSettings(
            **shared,
            search_share=self.search.share,
            gate_learning_rate=self.gate.learning_rate,
            temperature=TemperatureSchedule(**self.gate.temperature.model_dump()),
            entropy_weight=self.gate.entropy_weight,
            prune_threshold=self.gate.prune_threshold if self.gate.prune else 0.0,
        )

    def encoder_spec(self) -> EncoderSpec:
        """What the core's encoder takes."""
        return EncoderSpec(self.network.encoder, self.network.stem, dict(self.network.options))

    def network_spec(self, spec: InputSpec, tasks: Sequence[Task]) -> NetworkSpec:
        """What the core's network takes."""
        return NetworkSpec(
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


def load_config(path: str, words: Sequence[str] = (), ray_config: str = "") -> Config:
    """The configuration of a YAML file (or of a recipe by its name) with `section.key=value` words laid over it.

    A file may say `base:` and name a recipe, or a file relative to itself; it is then laid over that one, and so
    are the words over the file. Sections and other dictionaries are merged key by key; anything else, null
    included, replaces what is below it. Options are those of one encoder, or of one reader: another
    `network.encoder` or `source.kind` starts without the options below it.

    Args:
        ray_config: File with the `ray` section; by default `ray_config.yaml` in the current folder, if any.

    Raises:
        UserError: For a file or base that is missing or not YAML, bases that go round in a circle, a word
            without "=", and any wrong key or value.
    """
    values = _with_bases(_find(path), ())
    ray_file = Path(ray_config or "ray_config.yaml")
    if ray_config or ray_file.exists():
        values["ray"] = {**_read_yaml(ray_file), **(values.get("ray") or {})}
    over: dict[str, Any] = {}
    for word in words:
        _apply(over, word)
    return checked(Config, _laid_over(values, over))


def recipes() -> list[str]:
    """Names of the recipes that ship; one in a folder is called `<folder>/<name>`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def _find(path: str, folder: Path = Path()) -> Path:
    for candidate in (folder / path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"no configuration file {path!r}",
        where=str((folder / path).absolute()),
        remedy=f"give a YAML file, or a recipe: {', '.join(recipes())}",
        wrong_use=True,
    )


def _with_bases(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file laid over those of its base, which may have one too.

    Args:
        above: The files whose base it is, the first one first.
    """
    chain = (*above, file.resolve())
    if chain[-1] in above:
        raise UserError(
            f"the bases go round in a circle: {' → '.join(one.name for one in chain)}",
            where=str(file),
            remedy="let one of the files do without a base",
            wrong_use=True,
        )
    values = _read_yaml(file)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(
            f"base: expected the name of a recipe or a file, got {base!r}",
            where=str(file),
            remedy="name one base",
            wrong_use=True,
        )
    return _laid_over(_with_bases(_find(base, file.parent), chain), values)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above` over those of `below`, as `load_config` says; neither is changed."""
    merged = _merged(below, above)
    for section, owner, default in (("network", "encoder", NetworkSection().encoder), ("source", "kind", None)):
        old, new = below.get(section), merged.get(section)
        if isinstance(old, dict) and isinstance(new, dict) and new.get(owner, default) != old.get(owner, default):
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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read the configuration: {error}", where=str(path), remedy="correct the file", wrong_use=True
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"expected sections with keys, got {type(values).__name__}",
            where=str(path),
            remedy="start from a recipe",
            wrong_use=True,
        )
    return values


def _apply(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(
            f"expected section.key=value, got {word!r}",
            where="command line",
            remedy="write for example train.epochs=10",
            wrong_use=True,
        )
    *path, last = key.split(".")
    section = values
    for part in path:
        inner = section.get(part)
        section[part] = section = dict(inner) if isinstance(inner, dict) else {}
    section[last] = yaml.safe_load(text)
