"""Decoders of dense tasks, from a feature map to a map of the input's size.

To add a decoder, write a module that is built from `(features, channels, stride, width)`, and add one line to
`DECODERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class DenseDecoder(nn.Module):
    """A decoder that doubles the resolution with sub-pixel convolutions (Shi et al. 2016).

    A convolution computes four times the channels, which are rearranged into a map of twice the size. All
    operations are at the lower resolution. The training step is cheap if many decoders are trained at once.

    Args:
        features: Channels of the feature map.
        channels: Channels of the output.
        stride: Input pixels a feature pixel spans, a power of two.
        width: Channels of the first convolution, halved with every doubling down to 16.
    """

    def __init__(self, features: int, channels: int, stride: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(features, width, 3, padding=1, bias=False), *_activated(width)]
        doublings = int(math.log2(stride))
        for _ in range(doublings - 1):
            narrower = max(width // 2, 16)
            layers += [nn.Conv2d(width, 4 * narrower, 3, padding=1, bias=False), *_activated(4 * narrower)]
            layers.append(nn.PixelShuffle(2))
            width = narrower
        last = nn.Conv2d(width, channels * (4 if doublings else 1), 3, padding=1)
        self.body = nn.Sequential(*layers, last, *([nn.PixelShuffle(2)] if doublings else []))

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """`(B, F, h, w)` to `(B, C, *size)`."""
        return _resized(self.body(features), size)


class Doubling(nn.Module):
    """A 2×2 transposed convolution with stride 2 and without bias, computed as one matrix product.

    Each output pixel depends on one input pixel. The product is `(B, H, W, C) · (C, 2·2·O)`; its blocks of four
    are then rearranged. The memory format is channels last. Weights have the shape and the initial values of
    `nn.ConvTranspose2d`.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, 2, 2))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, O, 2H, 2W)`."""
        batch, _, height, width = x.shape
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C, 2·2·O), a view of a weight that is channels last
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)  # (B·H·W, C)
        four = (pixels @ weight).view(batch, height, width, 2, 2, -1)  # (B, H, W, 2, 2, O)
        return four.transpose(2, 3).reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


class XceptionDecoder(nn.Module):
    """The decoder of Standley et al. 2020, used in the published experiments on Taskonomy.

    Each doubling of the resolution is a transposed convolution. All but the last are followed by a 3×3
    convolution of the same width. A final 3×3 convolution computes the output. Its cost is many times that of
    `DenseDecoder` with the same width. The published biases before a batch norm are omitted, because the norm
    cancels them.

    Args:
        features: Channels of the feature map.
        channels: Channels of the output.
        stride: Input pixels a feature pixel spans, a power of two.
        width: Channels after the first doubling: 128 in the experiments of Gao et al. 2024, 256 in those of
            Standley et al. The next doublings have 1/2, 3/8, and all further ones 1/4 of these channels.
    """

    def __init__(self, features: int, channels: int, stride: int, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        doublings = int(math.log2(stride))
        for i in range(doublings):
            narrower = max(width * (8, 4, 3, 2)[min(i, 3)] // 8, 1)
            layers += [Doubling(features, narrower), *_activated(narrower)]
            if i < doublings - 1:
                layers += [nn.Conv2d(narrower, narrower, 3, padding=1, bias=False), *_activated(narrower)]
            features = narrower
        self.body = nn.Sequential(*layers, nn.Conv2d(features, channels, 3, padding=1))

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """`(B, F, h, w)` to `(B, C, *size)`."""
        return _resized(self.body(features), size)


# name → decoder of a dense task, built from (features, channels, stride, width)
DECODERS: Mapping[str, Callable[[int, int, int, int], nn.Module]] = {
    "subpixel": DenseDecoder,
    "xception": XceptionDecoder,
}


def _resized(out: Tensor, size: tuple[int, int]) -> Tensor:
    if out.shape[2:] == size:
        return out
    # the size of the input is no multiple of the stride
    return nn.functional.interpolate(out, size=size, mode="bilinear", align_corners=False)


def _activated(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
