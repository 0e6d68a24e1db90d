"""Encoders as lists of stages, cut into a stem that all groups share and a branch that each group has.

A new encoder is a function `(input, **options) -> list of modules` and one line in `ENCODERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.tasks import InputSpec


def mlp(spec: InputSpec, *, widths: Sequence[int] = (64, 32)) -> list[nn.Module]:
    """Linear layers with ReLU: one stage a width."""
    sizes = [*spec.shape, *widths]
    return [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]


def convnet(spec: InputSpec, *, widths: Sequence[int] = (32, 64, 128), dense_stride: int = 0) -> list[nn.Module]:
    """A small residual network: one stage a width, each halving the resolution.

    Args:
        spec: An image input.
        widths: Channels of the stages.
        dense_stride: Resolution is not halved below this stride (0: always halved), for dense targets.
    """
    stages: list[nn.Module] = []
    channels, stride = spec.shape[-1], 1
    for width in widths:
        step = 2 if dense_stride == 0 or stride < dense_stride else 1
        stages.append(nn.Sequential(_ConvBlock(channels, width, step), _ConvBlock(width, width, 1)))
        channels, stride = width, stride * step
    return stages


class _ConvBlock(nn.Module):
    """Two 3×3 convolutions with a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        # pooled, not strided (He et al. 2019, ResNet-D): it loses no pixel, and oneDNN's gradient of a strided
        # 1×1 convolution writes out of bounds for three channels-last input channels (torch 2.15)
        pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        project = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.shortcut = nn.Sequential(pool, project)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(depth: int) -> Callable[..., list[nn.Module]]:
    def stages(spec: InputSpec, *, weights: str | None = None) -> list[nn.Module]:
        from torchvision import models  # takes longer to import than torch itself, in every worker

        net = getattr(models, f"resnet{depth}")(weights=weights)
        if spec.shape[-1] != 3:
            net.conv1 = nn.Conv2d(spec.shape[-1], 64, 7, stride=2, padding=3, bias=False)
        first = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        return [first, net.layer1, net.layer2, net.layer3, net.layer4]

    stages.__doc__ = (
        f"torchvision's ResNet-{depth} in five stages; `weights` names weights that torchvision has at hand."
    )
    return stages


# name → (stages of one encoder, kind of input it reads)
ENCODERS: Mapping[str, tuple[Callable[..., list[nn.Module]], str]] = {
    "mlp": (mlp, "features"),
    "convnet": (convnet, "image"),
    "resnet18": (_resnet(18), "image"),
    "resnet34": (_resnet(34), "image"),
    "resnet50": (_resnet(50), "image"),
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Parameters made inside depend on `seed` alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder by name, and where it is cut.

    Args:
        name: A key of `ENCODERS`.
        stem: How many stages all groups share; 0 for an empty stem.
        options: Keyword arguments of the encoder function.
    """

    name: str
    stem: int = 0
    options: Mapping[str, Any] | None = None

    def stages(self, spec: InputSpec) -> list[nn.Module]:
        """Freshly initialised stages of one encoder.

        Raises:
            ValueError: For an unknown name or option, an input of the wrong kind, or a cut outside the encoder.
        """
        if self.name not in ENCODERS:
            raise ValueError(f"unknown encoder {self.name!r}, expected one of {', '.join(ENCODERS)}")
        build, kind = ENCODERS[self.name]
        if spec.kind != kind:
            raise ValueError(f"encoder {self.name} reads {kind} input, got {spec.kind}")
        try:
            stages = build(spec, **(self.options or {}))
        except TypeError as error:
            raise ValueError(f"encoder {self.name}: {error}") from error
        if not 0 <= self.stem < len(stages):
            raise ValueError(
                f"encoder {self.name}: the stem takes 0 to {len(stages) - 1} of its stages, got {self.stem}"
            )
        return stages


@dataclass(frozen=True)
class Features:
    """Shape of what a branch gives: channels, and pixels of the input a feature pixel spans (0: no map)."""

    channels: int
    stride: int


def build_encoder(
    encoder: EncoderSpec, spec: InputSpec, groups: int, seed: int
) -> tuple[nn.Sequential, list[nn.Sequential], Features]:
    """The shared stem, `groups` independently initialised branches, and the shape of their features.

    Raises:
        ValueError: As `EncoderSpec.stages`.
    """
    with seeded(seed):
        first = encoder.stages(spec)
        stem = nn.Sequential(*first[: encoder.stem])
        branches = [nn.Sequential(*first[encoder.stem :])]
        branches += [nn.Sequential(*encoder.stages(spec)[encoder.stem :]) for _ in range(groups - 1)]
    return stem, branches, _features(spec, stem, branches[0])


@torch.no_grad()
def _features(spec: InputSpec, stem: nn.Module, branch: nn.Module) -> Features:
    shape = (1, spec.shape[2], *spec.shape[:2]) if spec.kind == "image" else (1, *spec.shape)
    modes = [(m, m.training) for part in (stem, branch) for m in part.modules()]
    stem.eval(), branch.eval()  # normalisation layers must not learn from the probe
    out = branch(stem(torch.zeros(shape)))
    for module, mode in modes:
        module.training = mode
    return Features(out.shape[1], spec.shape[0] // out.shape[2] if out.dim() == 4 else 0)
