"""Encoders as lists of stages, split into a stem that all groups share and a branch for each group.

An encoder is a function `(input, **options) -> list of modules` in `ENCODERS`, or code of another package by its
address, see `dmtg_core.addresses` and `encoders.own`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmtg_core.addresses import checked_name, full_name, is_address
from dmtg_core.data_checks import check_choice
from dmtg_core.input_spec import InputSpec
from dmtg_core.network.adapters import AdapterBranch, AdapterOptions, SharedStages
from dmtg_core.network.encoders.basic import convnet, mlp
from dmtg_core.network.encoders.own import own_options, own_output, own_stages
from dmtg_core.network.encoders.pretrained_images import timm
from dmtg_core.network.encoders.pretrained_text import transformers, with_config
from dmtg_core.network.encoders.resnet import celeba_resnet, resnet
from dmtg_core.network.encoders.tabular import tabm
from dmtg_core.network.encoders.text import embedding_bag, text_transformer
from dmtg_core.network.encoders.vit import vit, vit_b_16
from dmtg_core.network.encoders.xception import xception_taskonomy
from dmtg_core.network.frozen import Frozen, copies, in_memory_once
from dmtg_core.network.inputs import Normalise, random_input

# name → (function that builds the stages of one encoder, kind of its input)
ENCODERS: Mapping[str, tuple[Callable[..., list[nn.Module]], str]] = {
    "mlp": (mlp, "features"),
    "tabm": (tabm, "features"),
    "convnet": (convnet, "image"),
    "resnet18": (resnet(18), "image"),
    "resnet34": (resnet(34), "image"),
    "resnet50": (resnet(50), "image"),
    "celeba_resnet": (celeba_resnet, "image"),
    "xception_taskonomy": (xception_taskonomy, "image"),
    "vit": (vit, "image"),
    "vit_b_16": (vit_b_16, "image"),
    "timm": (timm, "image"),
    "embedding_bag": (embedding_bag, "tokens"),
    "text_transformer": (text_transformer, "tokens"),
    "transformers": (transformers, "tokens"),
}

# encoder → options that set its widths, either one for each stage or a single one for all stages
WIDTHS: Mapping[str, tuple[str, ...]] = {
    "mlp": ("widths",),
    "tabm": ("width",),
    "convnet": ("widths",),
    "celeba_resnet": ("width",),
    "xception_taskonomy": ("widths", "features"),
    "vit": ("width",),
    "embedding_bag": ("embedding", "widths"),
    "text_transformer": ("width",),
}

# options that are sizes: a positive whole number, or a list of them
SIZES = (
    "widths", "width", "features", "embedding", "layers", "heads", "patch", "blocks", "members", "frequencies",
)  # fmt: skip
LISTS = ("widths",)
LARGEST_SIZE = 2**20

# encoder → packages that it needs in addition to those of this one
LIBRARIES: Mapping[str, tuple[str, ...]] = {"timm": ("timm",), "transformers": ("transformers",)}

# options that select pretrained weights
PRETRAINED = ("weights", "path")

# what a branch is: stages of its own, or stages of its own after a frozen stem, or updates of frozen stages
BRANCHES = ("copy", "last", "lora")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the parameters that are created inside. The caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _check_size(what: str, value: object, *, several: bool) -> None:
    numbers = list(value) if several and isinstance(value, Sequence) and not isinstance(value, str) else [value]
    whole = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= LARGEST_SIZE]
    if not numbers or len(whole) < len(numbers) or several != isinstance(value, Sequence):
        wanted = "a list of positive whole numbers" if several else "a positive whole number"
        raise ValueError(f"{what} must be {wanted}, each at most {LARGEST_SIZE}, got {value!r}")


@dataclass(frozen=True)
class EncoderSpec:
    """The name of an encoder, its options, and the size of its stem.

    Args:
        name: A key of `ENCODERS`, an address, or the short name of an entry point, which becomes its address.
        stem: Number of stages that all groups share; 0 for an empty stem.
        options: Keyword arguments of the encoder function.
        branch: "copy" for branches that are trained with their stem. "last" for copies of the stages after a
            frozen stem. "lora" for low-rank updates of the stages after the stem, which are all frozen.
        adapter: Options of `AdapterOptions`, for "lora".

    Raises:
        ValueError: If the options name files that are missing or not those of a model, or for an unknown
            `branch`.
    """

    name: str
    stem: int = 0
    options: Mapping[str, Any] | None = None
    branch: str = "copy"
    adapter: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice("branch", self.branch, BRANCHES)
        object.__setattr__(self, "name", full_name("encoder", self.name, ENCODERS))
        if self.adapter is not None and self.branch != "lora":
            raise ValueError(f"options of an adapter need branch 'lora', got branch {self.branch!r}")
        if self.name == "transformers":
            object.__setattr__(self, "options", with_config(self.options or {}))

    def check(self) -> None:
        """Check name and options without an input, before anything is built.

        Raises:
            ValueError: For an unknown name, an unknown option, a size that is not a positive whole number, and for
                code of an address that cannot be imported.
        """
        checked_name("encoder", self.name, ENCODERS)
        AdapterOptions.of(self.adapter)
        if self.frozen and not self.stem:
            raise ValueError(f"branch {self.branch!r} needs a stem, the frozen stages before the branches; got 0")
        known = self._known_options()
        for name, value in (self.options or {}).items():
            if known is not None and name not in known:
                valid = ", ".join(known) or "none"
                raise ValueError(f"encoder {self.name} has no option {name!r}, its options are: {valid}")
            if name in SIZES and self.name in ENCODERS:
                _check_size(f"option {name} of encoder {self.name}", value, several=name in LISTS)

    def _known_options(self) -> list[str] | None:
        """The names of the options; None if there can be others."""
        if is_address(self.name):
            return own_options(self.name)
        return list(inspect.signature(ENCODERS[self.name][0]).parameters)[1:]

    @property
    def frozen(self) -> bool:
        """Whether the stem is frozen."""
        return self.branch != "copy"

    @property
    def pretrained(self) -> bool:
        """Whether the initial weights are read from files."""
        return bool(self.source)

    @property
    def source(self) -> str:
        """The file, folder or name of the initial weights; empty for random ones."""
        return next((str(value) for key in PRETRAINED if (value := (self.options or {}).get(key))), "")

    def with_source(self, source: str) -> EncoderSpec:
        """Return the same encoder with initial weights from another place."""
        held = {key: source for key in PRETRAINED if (self.options or {}).get(key)}
        return replace(self, options={**(self.options or {}), **held})

    @property
    def can_widen(self) -> bool:
        """Whether `widened` can change the encoder."""
        return self.branch == "lora" or (self.branch == "copy" and self.name in WIDTHS)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields ready for JSON, without those of branches for branch "copy"."""
        values: dict[str, Any] = {"name": self.name, "stem": self.stem, "options": dict(self.options or {})}
        if self.branch == "lora":
            return values | {"branch": self.branch, "adapter": AdapterOptions.of(self.adapter).to_dict()}
        return values | ({"branch": self.branch} if self.frozen else {})

    def without_weights(self) -> EncoderSpec:
        """Return the same architecture with random initial weights, which needs no files of weights."""
        kept = {key: value for key, value in (self.options or {}).items() if key not in PRETRAINED}
        return replace(self, options=kept)

    def widened(self, factor: float) -> EncoderSpec:
        """Return a copy with all widths multiplied by `factor`.

        The widths of the stem do not change if the encoder has a width for each stage. Widths are rounded to
        integers, or to multiples of the number of attention heads. With branch "lora" the rank is multiplied.

        Raises:
            ValueError: If the widths of the encoder are fixed.
        """
        if self.branch == "lora":
            adapter = AdapterOptions.of(self.adapter)
            wider = replace(adapter, rank=max(round(adapter.rank * factor), 1))  # alpha stays, as in the paper
            return replace(self, adapter=wider.to_dict())
        if not self.can_widen:
            raise ValueError(f"encoder {self.name} has fixed widths; those of {', '.join(WIDTHS)} can be changed")
        build, _ = ENCODERS[self.name]
        held = {name: option.default for name, option in inspect.signature(build).parameters.items()}
        held |= self.options or {}
        unit, widened, stage = held.get("heads", 1), {}, 0

        def scaled(width: int) -> int:
            nonlocal stage
            stage += 1
            kept = stage <= self.stem and WIDTHS[self.name] != ("width",)
            return width if kept else max(round(width * factor / unit), 1) * unit

        for name in WIDTHS[self.name]:
            several = isinstance(held[name], Sequence)
            widened[name] = [scaled(width) for width in held[name]] if several else scaled(held[name])
        return replace(self, options={**(self.options or {}), **widened})

    def stages(self, spec: InputSpec) -> list[nn.Module]:
        """Build the stages of one encoder with initial weights.

        Raises:
            ValueError: For an unknown name or option, an input of the wrong kind, or a stem of too many stages.
        """
        self.check()
        try:
            stages = self._built(spec)
        except TypeError as error:
            raise ValueError(f"encoder {self.name}: {error}") from error
        if not 0 <= self.stem < len(stages):
            raise ValueError(
                f"encoder {self.name}: the stem takes 0 to {len(stages) - 1} of its stages, got {self.stem}"
            )
        return stages

    def _built(self, spec: InputSpec) -> list[nn.Module]:
        if is_address(self.name):
            return own_stages(self.name, spec, self.options or {})
        build, kind = ENCODERS[self.name]
        if spec.kind != kind:
            raise ValueError(f"encoder {self.name} reads {kind} input, got {spec.kind}")
        return build(spec, **(self.options or {}))


def heads_alone(encoder: EncoderSpec) -> EncoderSpec:
    """Return a spec of the same encoder of which nothing is trained: low-rank updates of rank 0."""
    return replace(encoder, stem=max(encoder.stem, 1), branch="lora", adapter={"rank": 0})


@dataclass(frozen=True)
class Features:
    """Shape of the output of a branch.

    Args:
        channels: Number of features.
        stride: Input pixels that a feature pixel spans; 0 if the features are not a map.
        members: Weight-sharing members of the encoder, the second axis of its output `(B, members, F)`; 0 for an
            encoder without members.
    """

    channels: int
    stride: int
    members: int = 0


class Standardise(nn.Module):
    """Mean 0 and variance 1 over the features of a sample, a layer norm without weights."""

    def forward(self, features: Tensor) -> Tensor:
        """`(B, F)` to the same."""
        return nn.functional.layer_norm(features, features.shape[-1:])


class Encoder(NamedTuple):
    """The modules of an encoder.

    Args:
        stem: The stages that all branches share, before the branches.
        branches: The branches.
        features: Shape of the output of a branch.
        shared: The frozen stages of branches that are low-rank updates, else None.
    """

    stem: nn.Sequential
    branches: list[nn.Module]
    features: Features
    shared: SharedStages | None


def build_encoder(encoder: EncoderSpec, spec: InputSpec, groups: int, seed: int) -> Encoder:
    """Build the stem and `groups` branches. They have independent initial weights with branch "copy".

    The features of a library's model are standardised for the heads: their scale depends on the model, and heads
    on small features hardly learn at the learning rates of an encoder.

    Raises:
        ValueError: As `EncoderSpec.stages`, and if no layer is a target of the adapters.
    """
    options = AdapterOptions.of(encoder.adapter)
    shared, branches = None, list[nn.Module]()
    with seeded(seed):
        stages = _standardised(encoder, encoder.stages(spec))
        first, rest = stages[: encoder.stem], stages[encoder.stem :]
        stem = Frozen(*first) if encoder.frozen else nn.Sequential(*first)
        features = _features(encoder.name, spec, stem, nn.Sequential(*rest))
        if encoder.branch == "lora":
            shared = SharedStages(rest, options, stem(Normalise(spec)(random_input(spec, 1))))
            branches += [AdapterBranch(shared, options) for _ in range(groups)]
        elif encoder.branch == "last":
            branches += copies(rest, groups)
        else:
            branches += [nn.Sequential(*rest)]
            others = (_standardised(encoder, encoder.stages(spec)) for _ in range(groups - 1))
            branches += [nn.Sequential(*other[encoder.stem :]) for other in others]
    return Encoder(stem, branches, features, shared)


def _standardised(encoder: EncoderSpec, stages: list[nn.Module]) -> list[nn.Module]:
    if encoder.name in LIBRARIES:
        stages[-1] = nn.Sequential(stages[-1], Standardise())
    return stages


def frozen_once(
    encoder: EncoderSpec, spec: InputSpec, stem: nn.Sequential, shared: SharedStages | None
) -> tuple[nn.Sequential, SharedStages | None]:
    """Return the frozen parts that this process already has, or these. See `in_memory_once`."""
    plain = replace(encoder, branch="copy", adapter=None).without_weights()
    structure = json.dumps([plain.to_dict(), spec.to_dict()], sort_keys=True)
    stem = in_memory_once(stem, structure)
    if shared is not None:
        shared = in_memory_once(shared, f"{structure} {shared.options.structure()}")
    return stem, shared


@torch.no_grad()
def _features(name: str, spec: InputSpec, stem: nn.Module, branch: nn.Module) -> Features:
    shape = (1, spec.shape[2], *spec.shape[:2]) if spec.kind == "image" else (1, *spec.shape)
    probe = torch.full(shape, spec.padding, dtype=torch.int64 if spec.kind == "tokens" else torch.float32)
    modes = [(m, m.training) for part in (stem, branch) for m in part.modules()]
    stem.eval(), branch.eval()  # the probe must not change running statistics
    out = own_output(name, stem, branch, probe) if is_address(name) else branch(stem(probe))
    for module, mode in modes:
        module.training = mode
    if out.dim() == 3:
        return Features(out.shape[2], 0, out.shape[1])
    return Features(out.shape[1], spec.shape[0] // out.shape[2] if out.dim() == 4 else 0)
