"""The sections of a configuration: their keys, the meaning of each key, and the values it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator

from dmtg_core.addresses import FORM, PATTERN, is_address
from pipelines.config.validation import Section, Seed, Switch

# readers of raw formats, which `pipelines.data.sources` has
KINDS = (
    "celeba", "folder", "image_table", "nuclei", "nyuv2", "planted", "rooms", "table", "taskonomy", "text",
    "webdataset",
)  # fmt: skip
MOST_BYTES = 200  # of a name, which gets a suffix where it becomes the name of a file


class SourceSection(Section):
    """The raw data from which shards are created."""

    kind: str = Field(
        description=f"Reader of the raw format: {', '.join(KINDS)}; or {FORM}, a class of another package."
    )
    root: str = Field("", description="Local folder, or address in object storage, of the raw data.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the reader.")

    @property
    def given(self) -> bool:
        """Whether there is raw data to read. The planted problem and readers of other packages need no root."""
        return bool(self.root) or self.kind == "planted" or self.kind not in KINDS


class DataSection(Section):
    """The shards, and how they are created and read."""

    shards: str = Field(description="Local folder, or address in object storage, of the shards.")
    tasks: list[str] | None = Field(None, description="Tasks to train on; by default all tasks of the shards.")
    like: str = Field(
        "",
        description="Earlier shards whose tokenizer, categories, classes and units are used for new shards, so "
        "that models trained on either can be evaluated on both.",
    )
    rows_per_shard: int | None = Field(
        None, ge=1, le=10**9, description="Samples in one Parquet file; by default as many as 64 MiB hold."
    )
    compression: Literal["none", "lz4", "zstd"] = Field("none", description="Compression of the Parquet pages.")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Largest share of unusable samples with which sharding continues."
    )
    verify_checksums: bool = Field(True, description="Compare every shard with its checksum before training.")
    min_support: int = Field(
        20, ge=1, description="Labels of a class below which a note says that its results are unreliable."
    )
    cache: Literal["auto", "memory", "device", "stream"] = Field(
        "auto",
        description="Where the samples are kept: in memory (memory), on the training device (device) or "
        "nowhere, so that every epoch streams them (stream); auto chooses memory or stream by their size.",
    )
    sampler: Literal["uniform", "balanced"] = Field(
        "uniform",
        description="Samples of an epoch: each once (uniform), or as many drawn, those with rare classes more "
        "often (balanced).",
    )
    read_threads: int = Field(
        4, ge=1, le=1024, description="Row groups that a streaming worker reads at the same time."
    )
    shuffle_mib: float = Field(
        128,
        gt=0,
        le=2**30,
        description="Decoded size in MiB of the samples from which a streamed global batch is drawn. A worker "
        "holds up to three times this size. With 16 MiB for every worker, or a multiple, each reads its own "
        "part.",
    )
    cache_gib: float = Field(
        4.0,
        gt=0,
        le=2**30,
        description="Decoded size in GiB up to which data.cache=auto keeps the samples in memory.",
    )

    stem_outputs: Switch = Field(
        "auto",
        description="Compute the outputs of a frozen stem once and keep them beside the shards, in bfloat16; auto "
        "does so if nothing random happens before and the disk has room.",
    )

    @field_validator("shards")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():  # it would be the current folder
            raise ValueError("expected a folder or an address in object storage")
        return value


class TemperatureSection(Section):
    """Temperature of the gate during the search."""

    family: Literal["constant", "linear", "cosine", "exponential"] = Field(
        "constant", description="Shape of the change from start to end; constant keeps the start temperature."
    )
    start: float = Field(2.5, gt=0, description="Temperature at the beginning of the search.")
    end: float = Field(0.5, gt=0, description="Temperature at the end of the search.")
    warmup: float = Field(0.0, ge=0, lt=1, description="Share of the search that uses the start temperature.")


class GateSection(Section):
    """The gate: for each task, a distribution over the branches."""

    sampling: Literal["gumbel", "gumbel_per_sample", "softmax", "straight_through", "fixed"] = Field(
        "gumbel", description="How the weights of the branches follow from the logits at every step."
    )
    initial: Literal["uniform", "uniform_noise", "diagonal", "gaussian"] = Field(
        "uniform", description="Initial logits of the gate."
    )
    initial_scale: float = Field(0.01, description="Scale of the initial logits if they are not uniform.")
    learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of the gate; by default train.learning_rate."
    )
    entropy_weight: float = Field(0.0, description="Weight of the entropy of the gate in the loss.")
    prune: bool = Field(
        True, description="Remove heads during the search; false keeps all K·N heads until it ends, as published."
    )
    prune_threshold: float = Field(0.02, ge=0, lt=1, description="Probability below which a head is removed.")
    temperature: TemperatureSection = TemperatureSection()


class TrainSection(Section):
    """Training of the networks."""

    epochs: int = Field(20, ge=1, le=10**6, description="Epochs of a run of naive MTL.")
    batch_size: int = Field(64, ge=1, le=10**9, description="Samples of a global batch, over all workers.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="Optimiser of the encoders, the heads and the gate."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Learning rate in the first epoch.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the optimiser.")
    lr_schedule: Literal["constant", "cosine", "halving", "plateau"] = Field(
        "cosine",
        description="Schedule of the learning rate over the epochs. In the guided search, cosine is a constant "
        "rate with a decay at the end.",
    )
    lr_every: int = Field(
        15, ge=1, le=10**6, description="Epochs between two halvings of the learning rate (halving)."
    )
    lr_patience: int = Field(
        3, ge=0, le=10**6, description="Epochs without progress after which the learning rate is halved (plateau)."
    )
    lr_min: float = Field(0.0, ge=0, description="Smallest learning rate of the schedule.")
    clip_norm: float = Field(0.0, ge=0, description="Largest norm of the gradient; 0 for no limit.")
    task_weighting: Literal[
        "fixed", "uncertainty", "dwa", "famo", "geometric_mean", "imtl_l", "random", "stch", "uw"
    ] = Field(
        "fixed",
        description="Weights of the tasks in the loss: fixed ones only, in addition learned ones (uncertainty), "
        "or those of a scalarizer of torchjd (the others; these need the extra aggregators).",
    )
    aggregator: str = Field(
        "sum",
        description="How the gradients of a group's tasks are combined after every task has its branch: sum, or "
        "one of mean, upgrad, dualproj, pcgrad, cagrad, mgda, imtl_g, aligned_mtl, nash_mtl (these need the extra "
        f"aggregators), or {FORM}, a function of the Gramian of the gradients that returns their weights.",
    )
    accumulate: int = Field(
        1, ge=1, le=10**6, description="Parts in which a batch is computed, one after the other, to save memory."
    )
    recompute: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, more time."
    )
    compile: bool | None = Field(
        None, description="Compile the network with torch.compile; by default on a GPU only."
    )
    cuda_graphs: bool | None = Field(
        None,
        description="Replay the compiled parts as CUDA graphs: faster, with more memory. By default on a GPU, "
        "with one worker, and without train.accumulate, train.recompute and train.aggregator.",
    )
    sync_batchnorm: bool = Field(
        False,
        description="Batch normalisation over the batches of all workers, which then wait for each other.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Precision; bf16 is autocast of the encoders, with the gate and the losses in float32; auto "
        "chooses bf16 for networks of a million weights on a device that computes in it, else fp32.",
    )
    augment: tuple[Literal["flip"], ...] = Field(
        (), description="Augmentations of training images; flip mirrors an image left to right."
    )
    patience: int = Field(
        0,
        ge=0,
        le=10**6,
        description="Early stopping: epochs without a better validation score after which the training of a "
        "network ends; 0 trains all epochs. In the guided search the decay of the learning rate begins then; 0 is "
        "a fifth of train.epochs there, and more in a long training.",
    )
    trees: bool = Field(
        True, description="Tables: also train extra trees of scikit-learn, as a yardstick beside the result."
    )
    checkpoint_every: int = Field(
        500, ge=0, description="Steps between two checkpoints within an epoch; 0 for a checkpoint at its end only."
    )
    seed: Seed = Field(
        22, description="Seed of initial weights, data order, gate noise and every other random choice."
    )


class TrackSection(Section):
    """Tracking and model registry in MLflow."""

    uri: str = Field(
        "", description="Tracking server; empty for an SQLite file in the current folder, none for no tracking."
    )
    experiment: str = Field("dmtg", description="MLflow experiment.")
    registry_uri: str = Field("", description="Model registry, if it is not the tracking server.")
    register_models: bool = Field(True, description="Register the grouping and one model for each group.")
    base: Literal["copy", "reference"] = Field(
        "copy",
        description="Frozen pretrained weights: a copy in the registry, once for all versions that have them, or "
        "a reference to the place that they were read from.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of an HTTP endpoint for Prometheus on 127.0.0.1, while dmtg train or dmtg regroup runs; "
        "0 for none. On Ray, its own endpoint has the metrics as well.",
    )
    opentelemetry: bool = Field(
        False,
        description="Send metrics with OpenTelemetry, to the exporter that the variables OTEL_* name; its package "
        "is installed separately.",
    )


RENAMED_METHODS = {
    "reading": 'it is called "feature_overlap"',
    "undistilled": "add compare.variants={undistilled: {distil: false}}",
    "retrained": 'the groups of the feature overlap are trained from scratch by "feature_overlap"',
}


METHODS = (
    "naive_mtl", "naive_longer", "single_task", "wide", "wide_distilled", "random", "cs", "tag", "etap",
    "etap_full", "gradtag", "feature_overlap", "hoa", "exhaustive", "dmtg", "guided", "heads_alone",
    "full_finetuning", "extra_trees", "gradient_boosting",
)  # fmt: skip


def _known_method(name: str) -> str:
    if name not in METHODS and not is_address(name):
        raise ValueError(f"expected one of {', '.join(METHODS)}, or {FORM}")
    return name


Method = Annotated[
    str,
    AfterValidator(_known_method),
    WithJsonSchema({"anyOf": [{"enum": list(METHODS)}, {"type": "string", "pattern": PATTERN}]}),
]


class CompareSection(Section):
    """The methods of a comparison, and how often each is trained."""

    methods: tuple[Method, ...] = Field(
        (
            "single_task", "naive_longer", "wide", "wide_distilled", "random", "cs", "tag", "etap", "gradtag",
            "feature_overlap", "dmtg", "guided",
        ),
        description="Methods of the comparison. naive_mtl is always trained, because every gain is relative to "
        "it. The default has extra_trees and gradient_boosting as well if the input is a table, and heads_alone "
        "and full_finetuning if the encoder is pretrained and frozen. "
        f"{FORM} is a function of another package.",
    )  # fmt: skip
    seeds: tuple[Seed, ...] = Field((1, 2, 3), min_length=1, description="Values of train.seed.")
    random_draws: int = Field(3, ge=1, le=1000, description="Random groupings for each seed.")
    budgets: tuple[Annotated[float, Field(ge=1, allow_inf_nan=False)], ...] = Field(
        (),
        description="Budgets in runs of naive MTL; by default that of the search. Each method is trained with "
        "each budget, while validation improves and the budget lasts. naive_mtl, single_task, hoa, exhaustive, "
        "dmtg and trees have a training of their own length.",
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Further searches: name → changes to the search section."
    )
    groupings: dict[str, tuple[tuple[str, ...], ...]] = Field(
        default_factory=dict, description="Further groupings: name → groups of task names."
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _renamed(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            for name in value:
                if name in RENAMED_METHODS:
                    raise ValueError(f'there is no method "{name}" any more: {RENAMED_METHODS[name]}')
        return value

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        # names of rows and of cells have six digits
        return tuple(sorted({float(f"{budget:g}") for budget in value}))


class SignalSection(Section):
    """The grouping signal (`dmtg signal`): short runs of random groupings."""

    partitions: int = Field(6, ge=2, le=1000, description="Number of random groupings.")
    seeds: tuple[Seed, ...] = Field(
        (1, 2, 3), min_length=2, description="Values of train.seed; every grouping is trained with each."
    )
    share: float = Field(0.5, gt=0, le=1, description="Epochs of each run, as a share of train.epochs.")
    worth: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Smallest effect of grouping that is worth having, as gain of the losses in per cent. "
        "Grouping matters if the interval of an effect is above it, and does not if all intervals are below it.",
    )


class RunSection(Section):
    """The files of a run."""

    root: str = Field("runs", description="Local folder, or address in object storage, of the run folders.")
    name: str = Field("", description="Name of the run folder; by default it follows from the configuration.")
    folder: str = Field(
        "", description="Folder of the configuration file, to which its paths are relative; set when it is read."
    )
    trust_code: bool = Field(
        False,
        description="Import the code of other packages that shards, models and checkpoints name, also if the "
        "configuration does not name it or it has changed.",
    )
    samples: int = Field(
        3, ge=0, le=20, description="Samples on the report page, worst ones and others each; 0 for no data on it."
    )

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        other = any(mark in value for mark in "/\\") or any(not mark.isprintable() for mark in value)
        if other or value in (".", "..") or value != value.strip() or len(value.encode()) > MOST_BYTES:
            raise ValueError(f"expected a name: no path, no control characters, at most {MOST_BYTES} bytes")
        return value
