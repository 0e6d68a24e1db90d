"""Residual networks: those of torchvision, and the small one of the published experiments on CelebA."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec


def resnet(depth: int) -> Callable[..., list[nn.Module]]:
    """Return the encoder function of torchvision's ResNet with `depth` layers."""

    def stages(spec: InputSpec, *, weights: str | None = None) -> list[nn.Module]:
        from torchvision import models  # the import takes longer than that of torch, in every worker

        net = getattr(models, f"resnet{depth}")(weights=weights)
        if spec.shape[-1] != 3:
            net.conv1 = nn.Conv2d(spec.shape[-1], 64, 7, stride=2, padding=3, bias=False)
        first = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        return [first, net.layer1, net.layer2, net.layer3, net.layer4]

    stages.__doc__ = f"torchvision's ResNet-{depth} in five stages; `weights` names weights of torchvision."
    return stages


def celeba_resnet(spec: InputSpec, *, width: int = 64) -> list[nn.Module]:
    """The network of the paper's experiments on CelebA (Gao et al. 2024), in two stages.

    The first stage is a 3×3 convolution to 64 channels with pooling, the second a residual block with pooling. The
    last map is flattened: 64·15·15 = 14,400 features at 64×64. There is no map for dense tasks. The authors'
    "shared" configurations have a stem of 1, all others a stem of 0.

    Args:
        spec: An image input of at least 5×5 pixels.
        width: Channels. The published value is 64.

    Raises:
        ValueError: For a smaller image, which the pooling reduces to nothing.
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
    """Two 3×3 convolutions with an identity shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_normed(width, width), nn.ReLU(inplace=True), *_normed(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + x).relu_()


def _normed(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
