"""The input of stem and branches: normalised stored values, and values with scaled gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.tasks import InputSpec


class Normalise(nn.Module):
    """Stored input to network input.

    `(B, H, W, C)` to float32 `(B, C, H, W)`, `(B, F)` to float32, token ids `(B, L)` to int64.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """Normalise. Raise ValueError if `raw` does not have the stored shape."""
        if raw.shape[1:] != self.spec.shape:
            wanted = ", ".join(map(str, self.spec.shape))
            raise ValueError(f"expected input of shape (B, {wanted}), got {tuple(raw.shape)}")
        if self.spec.kind == "tokens":
            return raw.long()
        value = (raw.float() - self.mean) / self.std
        return value.permute(0, 3, 1, 2) if self.spec.kind == "image" else value  # (B, C, H, W), channels last


class _ScaleGradient(torch.autograd.Function):
    """The identity with its gradient multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scaled(x: Any, factor: float) -> Any:
    """Return `x` with its gradient scaled. For the pair (tokens, mask) of a text encoder, scale the tokens'."""
    if isinstance(x, tuple):
        return (_ScaleGradient.apply(x[0], factor), *x[1:])
    return _ScaleGradient.apply(x, factor)
