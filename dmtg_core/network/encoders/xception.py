"""The Xception variant of Standley et al. 2020, used in the published experiments on Taskonomy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec

WIDTHS = (32, 64, 128, 256, 728, 728, 728, 728, 728, 728, 728, 728, 728)


def xception_taskonomy(spec: InputSpec, *, widths: Sequence[int] = WIDTHS, features: int = 512) -> list[nn.Module]:
    """The Xception variant with one stage for each layer of the paper, and a last stage for the features.

    The thirteen layers are two convolutions and eleven blocks of separable convolutions. A stem of 0, 2, 3, 6 or 9
    stages has the layers that the paper shares under that number. The main results of the paper have a stem of 6.
    At 256×256 the features are 512 maps of 16×16.

    Args:
        spec: An image input.
        widths: Channels of the layers. The first layer and each block that changes the width halve the resolution.
            The half-size networks of Standley et al. have 24, 48, 96, 192 and nine times 512.
        features: Channels of the last stage.
    """
    first, second = widths[:2]
    stages: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(spec.shape[-1], first, 3, stride=2, padding=1, bias=False), *_activated(first)),
        nn.Sequential(nn.Conv2d(first, second, 3, padding=1, bias=False), *_activated(second)),
    ]
    stages += [_Block(a, b) for a, b in pairwise(widths[1:])]
    stages.append(nn.Sequential(*_separable(widths[-1], features)))
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stages


class _Block(nn.Module):
    """Separable convolutions with a shortcut: two that halve the resolution, or three that keep the shape.

    The published block before the first change of width omits its first ReLU, because its input is not negative.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        halves = inputs != outputs
        body = _separable(inputs, outputs)
        for _ in range(1 if halves else 2):
            body += _separable(outputs, outputs, inplace=True)
        shortcut: list[nn.Module] = []
        if halves:
            body.append(_Halving(outputs, outputs, 2, stride=2))
            shortcut = [nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs)]
        self.body, self.shortcut = nn.Sequential(*body), nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


class _Halving(nn.Conv2d):
    """A 2×2 convolution with stride 2. Like the shortcut, it keeps the last row and column of an odd size."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] % 2, x.shape[3] % 2
        return super().forward(nn.functional.pad(x, (0, width, 0, height)) if height or width else x)


def _separable(inputs: int, outputs: int, *, inplace: bool = False) -> list[nn.Module]:
    # the first ReLU of a block must not change its input: the shortcut and the other branches read it
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return [nn.ReLU(inplace), depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]


def _activated(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
