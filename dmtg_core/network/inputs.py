"""The input of stem and branches: normalised stored values, and values with scaled gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec


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
        self.quantiles = NormalQuantiles(spec) if any(spec.quantiles) else None

    def forward(self, raw: Tensor) -> Tensor:
        """Normalise. Raise ValueError if `raw` does not have the stored shape."""
        if raw.shape[1:] != self.spec.shape:
            wanted = ", ".join(map(str, self.spec.shape))
            raise ValueError(f"expected input of shape (B, {wanted}), got {tuple(raw.shape)}")
        if self.spec.kind == "tokens":
            return raw.long()
        value = (raw.float() - self.mean) / self.std
        if self.quantiles is not None:
            return self.quantiles(raw.float(), value)
        return value.permute(0, 3, 1, 2) if self.spec.kind == "image" else value  # (B, C, H, W), channels last


def random_input(spec: InputSpec, rows: int) -> Tensor:
    """Return stored input of random values, for a trial. It is the same each time."""
    shape, generator = (rows, *spec.shape), torch.Generator().manual_seed(0)
    if spec.kind == "tokens":
        raw = torch.randint(0, spec.vocabulary, shape, generator=generator)
    elif spec.dtype.startswith("float"):
        raw = torch.randn(shape, generator=generator)
    else:
        raw = torch.randint(0, 256, shape, generator=generator)
    return raw.to(getattr(torch, spec.dtype))


class NormalQuantiles(nn.Module):
    """Maps features to a normal distribution by their quantiles.

    The probability of a value is interpolated between the quantiles; a value that several quantiles share has
    the mean of their probabilities. The result is the normal quantile of the probability, as scikit-learn's
    `QuantileTransformer(output_distribution="normal")` computes it. Values outside the quantiles are mapped to
    ±`LARGEST`.
    """

    LARGEST = 5.1993375  # normal quantile of 1 - 1e-7
    edges: Tensor
    places: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        given = [(place, edges) for place, edges in enumerate(spec.quantiles) if edges]
        self.register_buffer("places", torch.tensor([place for place, _ in given]), persistent=False)
        edges = torch.tensor([edges for _, edges in given], dtype=torch.float32)
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, raw: Tensor, standardised: Tensor) -> Tensor:
        """Replace the features with quantiles in `standardised` `(B, F)` by their normal scores."""
        x = raw.index_select(1, self.places).T.contiguous()  # (N, B)
        last = self.edges.shape[1] - 1
        first = torch.searchsorted(self.edges, x)  # first quantile that is not smaller
        after = torch.searchsorted(self.edges, x, right=True)  # first quantile that is larger
        # equal to some quantiles: the mean of their probabilities; between two: a straight line
        low, high = (after - 1).clamp(0, last), first.clamp(0, last)
        left, right = self.edges.gather(1, low), self.edges.gather(1, high)
        share = ((x - left) / (right - left)).nan_to_num(0.5, 0.5, 0.5).clamp(0, 1)
        share = torch.where(after > first, 0.5, share)
        score = torch.special.ndtri((low + share * (high - low)) / last).clamp(-self.LARGEST, self.LARGEST)
        return standardised.index_copy(1, self.places, score.T)


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
    """Return `x` with its gradient scaled. In the state of a text encoder, scale each part but masks and ids."""
    if isinstance(x, tuple):
        return tuple(scaled(part, factor) if part.is_floating_point() else part for part in x)
    return _ScaleGradient.apply(x, factor)
