"""Residual networks: torchvision's, and the small one that the method was published with for CelebA."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dmtg_core.tasks import InputSpec


def resnet(depth: int) -> Callable[..., list[nn.Module]]:
    """The encoder function of torchvision's ResNet of `depth` layers."""

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


def celeba_resnet(spec: InputSpec, *, width: int = 64) -> list[nn.Module]:
    """The network of the paper's experiments on CelebA (Gao et al. 2024), in two stages.

    A 3×3 convolution to 64 channels with pooling, then one residual block with pooling. Every pixel of the last
    map is a feature of its own: 64·15·15 = 14,400 of them at 64×64, so there is no map for dense tasks. A stem of
    1 is what the authors' "shared" configurations share, 0 what the others do.

    Args:
        spec: An image input of at least 5×5 pixels.
        width: Channels; 64 are published.

    Raises:
        ValueError: For a smaller image, of which the pooling leaves nothing.
    """
    if min(spec.shape[:2]) < 5:
        raise ValueError(f"encoder celeba_resnet needs images of 5×5 pixels or more, got {spec.shape}")
    first = nn.Sequential(*_normed(spec.shape[-1], width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2))
    stages: list[nn.Module] = [first, nn.Sequential(_Residual(width), nn.AvgPool2d(2), nn.Flatten())]
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
    return stages


class _Residual(nn.Module):
    """Two 3×3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_normed(width, width), nn.ReLU(inplace=True), *_normed(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + x).relu_()


def _normed(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
