"""The sections of a configuration: their keys, what each is for, and what values it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dmtg_core.network.encoders import ENCODERS
from dmtg_core.training.aggregation import AGGREGATORS
from pipelines.config.validation import Section


class SourceSection(Section):
    """Raw data to make shards from."""

    kind: str = Field(
        description="reader of the raw format: celeba, folder, nuclei, planted, rooms, table, taskonomy or text"
    )
    root: str = Field("", description="local folder or s3:// address of the raw data")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the reader")

    @property
    def given(self) -> bool:
        """Whether there is something to read: the planted problem is made from its options alone."""
        return bool(self.root) or self.kind == "planted"


class DataSection(Section):
    """Shards and how they are read."""

    shards: str = Field(description="local folder or s3:// address of the shards")
    tasks: list[str] | None = Field(None, description="tasks to train on; all that the shards hold by default")
    like: str = Field(
        "",
        description="earlier shards, whose tokenizer, categories, classes and units new ones are made with, so "
        "that a model of either can be judged on both",
    )
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

    @field_validator("shards")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():  # it would be the current folder
            raise ValueError("expected a folder or an s3:// address")
        return value


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

    family: Literal["constant", "linear", "cosine", "exponential"] = Field(
        "constant", description="how it goes from start to end; a constant one stays at start"
    )
    start: float = Field(2.5, gt=0, description="when the search begins")
    end: float = Field(0.5, gt=0, description="when the search ends")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the search spent at the start temperature")


class GateSection(Section):
    """The distribution over branches."""

    sampling: Literal["gumbel", "gumbel_per_sample", "softmax", "straight_through", "fixed"] = Field(
        "gumbel", description="how the weights of the branches are drawn at every step"
    )
    initial: Literal["uniform", "uniform_noise", "diagonal", "gaussian"] = Field(
        "uniform", description="logits that the gate starts from"
    )
    initial_scale: float = Field(0.01, description="size of these logits, where they are not uniform")
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
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="of encoders, heads and gate")
    learning_rate: float = Field(1e-3, gt=0, description="of the first epoch")
    weight_decay: float = Field(0.0, ge=0, description="of the optimiser")
    lr_schedule: Literal["constant", "cosine", "halving", "plateau"] = Field(
        "cosine", description="how the learning rate falls over the epochs"
    )
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
    cuda_graphs: bool = Field(False, description="compiled parts as CUDA graphs: speed for memory")
    sync_batchnorm: bool = Field(False, description="normalise over the batches of all workers (GPUs only)")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast of the encoders, with gate and losses in float32"
    )
    augment: tuple[Literal["flip"], ...] = Field((), description="done to training images: flip left to right")
    checkpoint_every: int = Field(
        500, ge=0, description="steps between two checkpoints within an epoch; 0 for none but at its end"
    )
    seed: int = Field(22, description="of initial weights, data order, gate noise and anything else that is drawn")


class SearchSection(Section):
    """How the grouping is searched for."""

    method: Literal["guided", "dmtg"] = Field(
        "guided",
        description="guided: a gate that starts at groups of tasks which read the same, undecided ones and one "
        "wide encoder beside it, the best on validation data is kept; dmtg: undecided gates, as published",
    )
    starts: int = Field(
        1, ge=0, description="undecided gates; with dmtg, at least one, the best on validation data is fine-tuned"
    )
    wide: bool = Field(
        True, description="guided: one wide encoder, at the inference cost of all groups, may be the result"
    )
    affinity_share: float = Field(
        0.1, gt=0, le=1, description="guided: share of train.epochs that tasks are compared for, at least"
    )
    affinity_limit: float = Field(
        0.3,
        gt=0,
        le=1,
        description="guided: the same at most; it ends when the groups that follow no longer change",
    )
    probability: float = Field(
        0.9, gt=0, lt=1, description="guided: with which a task begins in the group that was proposed"
    )
    within: float = Field(
        0.03,
        ge=0,
        description="guided: how much worse a candidate's validation score may be at the end of the search and "
        "yet be the result, beside what the best one's changes in an epoch; up to twice as much it teaches",
    )
    retrain: bool = Field(
        True,
        description="guided: before the wide encoder is kept, train the groups of the best gate from scratch",
    )
    distil_share: float = Field(
        1.0,
        ge=0,
        description="guided: for how many more epochs, as a share of train.epochs, the best candidate learns from "
        "the mean prediction of all that were trained to their end; 0 for none",
    )
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
    registry_uri: str = Field("", description="model registry where it is not the tracking server")
    register_models: bool = Field(True, description="register the grouping and one model a group")


class SweepSection(Section):
    """What a sweep varies, every value with every other; an empty list keeps what the configuration says."""

    groups: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="values of network.groups")
    stems: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="values of network.stem")
    temperatures: tuple[TemperatureSection, ...] = Field((), description="values of gate.temperature")
    gate_learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="values of gate.learning_rate"
    )
    seeds: tuple[int, ...] = Field(
        (), description="values of train.seed; a setting is judged by the mean over them"
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="settings to draw at random from all combinations, each with every seed; null for all",
    )
    stop_early: bool = Field(True, description="stop poor trials on the way (asynchronous successive halving)")
    grace_epochs: int = Field(3, ge=1, description="epochs of a trial before it can be stopped")
    reduction: int = Field(3, ge=2, description="of so many trials that came as far, one goes on")


class CompareSection(Section):
    """What a comparison trains beside the search, and how often."""

    methods: tuple[
        Literal[
            "naive_mtl", "single_task", "wide", "wide_distilled", "random", "cs", "tag", "etap", "gradtag",
            "feature_overlap", "hoa", "exhaustive", "dmtg", "guided", "undistilled", "retrained",
        ],
        ...,
    ] = Field(
        (
            "single_task", "wide", "wide_distilled", "random", "cs", "tag", "etap", "gradtag", "dmtg", "guided",
            "undistilled", "retrained",
        ),
        description="what is compared; naive_mtl always is, for all are measured against it",
    )  # fmt: skip
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="values of train.seed")
    random_draws: int = Field(3, ge=1, description="random groupings of every seed")
    equal_budget: bool = Field(
        True,
        description="beside guided: wide encoder, random grouping, the best affinity's groups and its own groups "
        "from scratch (those that are among the methods) for as many epochs as its search costs",
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="further searches: name → changes to the search section"
    )
    groupings: dict[str, tuple[tuple[str, ...], ...]] = Field(
        default_factory=dict, description="groupings of your own: name → groups of task names"
    )


class SignalSection(Section):
    """The pre-flight: short runs of random groupings."""

    partitions: int = Field(6, ge=2, description="random groupings")
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=2, description="values of train.seed, each with each")
    share: float = Field(0.5, gt=0, le=1, description="share of train.epochs that they are trained for")


class RegroupSection(Section):
    """The nightly job: where new data comes from, and what a challenger has to do to replace the champion."""

    shards: str = Field(
        "",
        description="folder that holds a data set for each date, in <date> or date=<date>, or a JSON file with a "
        'list of {"date": …, "shards": …}; the newest one is taken. Empty: data.shards',
    )
    evaluation: str = Field(
        "", description="shards whose split champion and challenger are judged on; empty: those of the night"
    )
    split: Literal["test", "val"] = Field("test", description="split that they are judged on")
    margin: float = Field(0.5, ge=0, description="per cent by which the mean error has to fall, at least")
    confidence: float = Field(
        0.95, gt=0, lt=1, description="of the bootstrap interval, which has to be above zero"
    )
    resamples: int = Field(2000, ge=100, description="of the bootstrap")
    limit: float | None = Field(
        5.0, ge=0, description="per cent by which the error of any task may rise; null for no limit"
    )
    limits: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="the same for single tasks"
    )
    warm_start: bool = Field(True, description="start from the champion's weights where they fit")
    lease_s: float = Field(120, ge=5, description="silence of another regroup job after which it counts as dead")
    webhook: str = Field("", description="http(s) address that is sent the verdict as JSON")


class RunSection(Section):
    """Where a run leaves its files."""

    root: str = Field("runs", description="local folder or s3:// address that holds run folders")
    name: str = Field("", description="name of the run folder; by default it follows from the configuration")
    samples: int = Field(
        3, ge=0, le=20, description="samples on the page, of the worst and of the others; 0 for no data in it"
    )


class RaySection(Section):
    """Where and how Ray runs (ray_config.yaml)."""

    address: str = Field("", description="address of a cluster; empty for RAY_ADDRESS, else a local one")
    workers: int | tuple[int, int] = Field(
        2, description="data-parallel training workers; two numbers, the fewest and the most, follow the cluster"
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of a training worker")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of a training worker; 1 for training on GPUs")
    data_cpus: float = Field(2, gt=0, description="CPUs that Ray Data can count on beside the workers")
    object_store_mib: int | None = Field(
        None, ge=80, description="shared memory of a local cluster; by default a third of the machine's memory"
    )
    tune_cpus: float = Field(0.5, gt=0, description="CPUs of the process that drives a trial of a sweep")
    trials: int | None = Field(
        None, ge=1, description="trials of a sweep at a time; by default as many as there is room for"
    )
    autoscaling: bool = Field(
        False, description="the cluster adds machines that are needed, so what it has now says nothing about room"
    )
    storage: str = Field(
        "", description="local folder or s3:// address that relative run.root and data.shards are below"
    )
    tracking_uri: str = Field("", description="MLflow server, where track.uri names none")
    registry_uri: str = Field("", description="MLflow model registry, where it is not the tracking server")
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
