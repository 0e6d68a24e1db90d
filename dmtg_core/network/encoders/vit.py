"""Vision transformers built from torchvision's modules, split between their blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec


def vit(
    spec: InputSpec, *, patch: int = 16, width: int = 192, layers: int = 12, heads: int = 3
) -> list[nn.Module]:
    """A vision transformer (Dosovitskiy et al. 2021), by default the tiny one of Touvron et al. 2021.

    The first stage embeds the patches and adds their positions. Each block is a stage. The last stage includes the
    final norm. The class token is in all blocks, as pretrained weights expect, and is dropped at the end. The
    features are the map of the patches, `(B, width, H/patch, W/patch)`. Heads of sample-wise tasks average them.

    Args:
        spec: An image input. `patch` divides its sides.
        patch: Side of a patch in pixels.
        width: Channels of a token, a multiple of `heads`.
        layers: Number of blocks.
        heads: Attention heads of a block.

    Raises:
        ValueError: If the sizes do not fit each other.
    """
    from torchvision.models import VisionTransformer  # slow to import

    if width % heads:
        raise ValueError(f"encoder vit: width {width} is no multiple of its {heads} heads")
    net = VisionTransformer(
        image_size=patch, patch_size=patch, num_layers=layers, num_heads=heads, hidden_dim=width,
        mlp_dim=4 * width, num_classes=1,
    )  # fmt: skip
    return _stages(net, spec, pretrained=False)


def vit_b_16(spec: InputSpec, *, weights: str | None = None) -> list[nn.Module]:
    """ViT-B/16 of torchvision in thirteen stages like those of `vit`, for the paper's experiments at 256×256.

    The embedding of the patches is the first stage. A stem of 7 has it and the six blocks that the paper shares.

    Args:
        spec: An image input. Its sides are multiples of 16.
        weights: Name of weights of torchvision. Their positions are interpolated to the size of the input.

    Raises:
        ValueError: If a side of the image is no multiple of 16.
    """
    from torchvision import models  # slow to import

    return _stages(models.vit_b_16(weights=weights), spec, pretrained=weights is not None)


def _stages(net: Any, spec: InputSpec, *, pretrained: bool) -> list[nn.Module]:
    height, width, channels = spec.shape
    patch = net.patch_size
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch}×{patch} pixels do not fill an image of {height}×{width}")
    grid = (height // patch, width // patch)
    blocks = list(net.encoder.layers)
    return [_Patches(net, channels, grid, pretrained), *blocks[:-1], nn.Sequential(blocks[-1], _Map(net, grid))]


class _Patches(nn.Module):
    """The embedding of patches with positions, class token first: `(B, C, H, W)` to `(B, 1 + h·w, F)`."""

    def __init__(self, net: Any, channels: int, grid: tuple[int, int], pretrained: bool) -> None:
        super().__init__()
        self.project = net.conv_proj
        if channels != 3:
            self.project = nn.Conv2d(channels, net.hidden_dim, net.patch_size, stride=net.patch_size)
        self.class_token = net.class_token
        self.positions = nn.Parameter(_positions(net.encoder.pos_embedding.detach(), grid, pretrained))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.project(x).flatten(2).transpose(1, 2)  # (B, h·w, F)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], 1) + self.positions


def _positions(trained: Tensor, grid: tuple[int, int], pretrained: bool) -> Tensor:
    """Position embedding `(1, 1 + h·w, F)`: random as in torchvision, or `trained` interpolated to the grid."""
    if not pretrained:
        return trained.new_empty(1, 1 + grid[0] * grid[1], trained.shape[2]).normal_(std=0.02)
    side = round((trained.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return trained
    square = trained[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, F, side, side)
    resized = nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([trained[:, :1], resized.flatten(2).transpose(1, 2)], 1)


class _Map(nn.Module):
    """The map of the normalised tokens without the class token: `(B, 1 + h·w, F)` to `(B, F, h, w)`."""

    def __init__(self, net: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm = net.encoder.ln
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.norm(tokens)
        return normed[:, 1:].transpose(1, 2).unflatten(2, self.grid)
