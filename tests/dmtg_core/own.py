"""Code that tests name by its address: losses, metrics, encoders, an aggregator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = __name__


def absolute(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().reshape(len(target), -1).sum(1)


def cross(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def flags(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target, reduction="none")


def known_pixels(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().nansum((1, 2, 3))


def one_number(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


def distance(prediction: Tensor, label: Tensor) -> Tensor:
    return (prediction - label).abs()


def wrong_class(prediction: Tensor, label: Tensor) -> Tensor:
    return (prediction.argmax(1) != label).double()


def weigh_first(gramian: Tensor) -> Tensor:
    weights = torch.zeros(len(gramian), dtype=gramian.dtype)
    weights[0] = 1
    return weights


def weigh_nothing(gramian: Tensor) -> float:
    return 1.0


class Net(nn.Module):
    def __init__(self, inputs: int, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Layers(nn.Sequential):
    def __init__(self, spec, width: int = 8) -> None:
        super().__init__(nn.Linear(*spec.shape, width), nn.ReLU(), nn.Linear(width, width))


class AnyOptions(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.layer = nn.Linear(options["inputs"], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Pair(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def stages(spec, *, width: int = 8) -> list[nn.Module]:
    return [nn.Linear(*spec.shape, width), nn.Linear(width, width)]


def no_stages(spec) -> int:
    return 3
