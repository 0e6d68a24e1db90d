"""Small encoders: an MLP for features and a residual network for images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec


def mlp(spec: InputSpec, *, widths: Sequence[int] = (64, 32), dropout: float = 0.0) -> list[nn.Module]:
    """Linear layers with ReLU, one stage for each width.

    Args:
        spec: An input of features.
        widths: Widths of the layers.
        dropout: Share of the values of each layer that are dropped during training.
    """
    return layers([*spec.shape, *widths], dropout)


def layers(sizes: Sequence[int], dropout: float) -> list[nn.Module]:
    """Return a stage of a linear layer, ReLU and dropout for each pair of neighbouring sizes."""
    drop = [nn.Dropout(dropout)] if dropout else []
    return [nn.Sequential(nn.Linear(a, b), nn.ReLU(), *drop) for a, b in pairwise(sizes)]


def convnet(
    spec: InputSpec, *, widths: Sequence[int] = (32, 64, 128), dense_stride: int = 0, dropout: float = 0.0
) -> list[nn.Module]:
    """A small residual network with one stage for each width. Each stage halves the resolution.

    Args:
        spec: An image input.
        widths: Channels of the stages.
        dense_stride: Stride from which the resolution is no longer halved, for dense targets; 0 for no limit.
        dropout: Share of the channels of the last stage that are dropped during training. Channels are dropped as
            a whole (Tompson et al., CVPR 2015), because the mean over the pixels would undo the dropping of
            pixels. Earlier stages have none, because it changes the variances of batch normalisation.
    """
    stages: list[nn.Sequential] = []
    channels, stride = spec.shape[-1], 1
    for width in widths:
        step = 2 if dense_stride == 0 or stride < dense_stride else 1
        stages.append(nn.Sequential(_ConvBlock(channels, width, step), _ConvBlock(width, width, 1)))
        channels, stride = width, stride * step
    if dropout:
        stages[-1].append(nn.Dropout2d(dropout))
    return list(stages)


class _ConvBlock(nn.Module):
    """Two 3×3 convolutions with a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        # pooled, not strided (He et al. 2019, ResNet-D): all pixels are used, and oneDNN's gradient of a strided
        # 1×1 convolution writes out of bounds for three channels-last input channels (torch 2.15)
        pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        project = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.shortcut = nn.Sequential(pool, project)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu_()
