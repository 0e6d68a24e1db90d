"""Layers that compute K branches at once, for the layers of torch whose own code cannot.

Values of K branches have one of two layouts. *Rows*: the samples of branch 0, then those of branch 1, and so on,
`(K·B, …, F)`. *Channels*: the channels of branch 0, then those of branch 1, and so on: `(B, K·C, H, W)` for maps,
`(B, …, K·F)` for vectors and tokens. An input that all branches share has neither.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

SHARED, ROWS, CHANNELS = "shared", "rows", "channels"


class NotBatchableError(ValueError):
    """Branches cannot be computed in one pass. The message names the layer and the reason."""


class RowLayer(nn.Module):
    """A layer whose input has any of the layouts and whose output has rows.

    A trial pass sets the layout with `see`. It is the same in all later passes.

    Args:
        branches: K.
        features: F, the size of the last dimension of one branch's input.
    """

    def __init__(self, branches: int, features: int) -> None:
        super().__init__()
        self.branches, self.features = branches, features
        self.layout = ROWS

    def see(self, x: Tensor, rows: int) -> None:
        """Set the layout of the input `x` of a pass with `rows` samples."""
        if x.shape[-1] == self.branches * self.features:
            self.layout = CHANNELS
        else:
            self.layout = SHARED if x.shape[0] == rows else ROWS

    def by_branch(self, x: Tensor) -> Tensor:
        """Any layout to `(K, rows of a branch, F)`."""
        if self.layout == SHARED:
            return x.reshape(1, -1, self.features).expand(self.branches, -1, -1)
        if self.layout == CHANNELS:
            x = x.unflatten(-1, (self.branches, self.features)).movedim(-2, 0)
        return x.reshape(self.branches, -1, self.features)

    @staticmethod
    def as_rows(y: Tensor, x: Tensor) -> Tensor:
        """`(K, rows of a branch, O)` to `(K·B, …, O)` with the middle dimensions of the input `x`."""
        return y.reshape(-1, *x.shape[1:-1], y.shape[-1])


class Linear(RowLayer):
    """`nn.Linear` as one batched product. Its weight is `(K, O, F)`, its bias `(K, 1, O)` or None."""

    KINDS: ClassVar = {"weight": "stack", "bias": "row"}
    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Linear, branches: int) -> Linear:
        """Build the layer for K branches like `layer`."""
        return cls(branches, layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Any layout with F to rows with O."""
        given = (self.by_branch(x), self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            given = (given[0].to(kind), given[1].to(kind), None if given[2] is None else given[2].to(kind))
        return self.as_rows(_Product.apply(*given), x)


class _Product(torch.autograd.Function):
    """`x Wᵀ + b` for each branch.

    That of `torch.baddbmm` has a gradient of W in the order of Wᵀ, which would be copied for each parameter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        transposed = weight.transpose(1, 2)
        return torch.bmm(x, transposed) if bias is None else torch.baddbmm(bias, x, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (gradient,), needed = ctx.saved_tensors, gradients, ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if needed[0] else None,
            torch.bmm(gradient.transpose(1, 2), x) if needed[1] else None,
            gradient.sum(1, keepdim=True) if needed[2] else None,
        )


class LayerNorm(RowLayer):
    """`nn.LayerNorm` over the last dimension. Weight and bias are `(K, 1, F)` or None."""

    KINDS: ClassVar = {"weight": "row", "bias": "row"}
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float

    @classmethod
    def of(cls, layer: nn.LayerNorm, branches: int) -> LayerNorm:
        """Build the layer for K branches like `layer`."""
        if len(layer.normalized_shape) != 1:
            raise NotBatchableError(f"layer norm over {len(layer.normalized_shape)} dimensions")
        built = cls(branches, layer.normalized_shape[0])
        built.eps = layer.eps
        return built

    def forward(self, x: Tensor) -> Tensor:
        """Any layout to rows."""
        out = nn.functional.layer_norm(self.by_branch(x), (self.features,), eps=self.eps)  # (K, B·…, F)
        if self.weight is not None:
            out = out * self.weight if self.bias is None else torch.addcmul(self.bias, out, self.weight)
        return self.as_rows(out, x)


class BatchNormRows(RowLayer):
    """`nn.BatchNorm1d` of vectors `(B, F)`: the statistics of each branch are over its own rows."""

    def __init__(self, norm: nn.BatchNorm1d, branches: int) -> None:
        super().__init__(branches, norm.num_features)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Any layout to rows."""
        if x.dim() != 2:
            raise NotBatchableError("BatchNorm1d of sequences")
        columns = self.by_branch(x).transpose(0, 1).flatten(1)  # (B, K·F)
        return self.as_rows(self.norm(columns).unflatten(1, (self.branches, -1)).transpose(0, 1), x)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of tokens to themselves, without dropout. It returns no attention weights."""

    KINDS: ClassVar = {
        "in_proj_weight": ("project.weight", "stack"), "in_proj_bias": ("project.bias", "row"),
        "out_proj.weight": ("out.weight", "stack"), "out_proj.bias": ("out.bias", "row"),
    }  # fmt: skip

    def __init__(self, layer: nn.MultiheadAttention, branches: int) -> None:
        super().__init__()
        plain = layer.batch_first and layer.bias_k is None and not layer.add_zero_attn
        if not plain or layer.in_proj_weight is None:
            raise NotBatchableError("attention with options of its own")
        self.heads, self.branches = layer.num_heads, branches
        self.project, self.out = Linear(branches, layer.embed_dim), Linear(branches, layer.embed_dim)
        self.batch_first = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        """`(K·B, L, F)` to the same. Tokens whose mask is True, or -inf, are not read."""
        if key is not query or value is not query or options.get("attn_mask") is not None:
            raise NotBatchableError("attention to other tokens, or with a mask of pairs")
        qkv = self.project(query)  # (K·B, L, 3·F)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (K·B, heads, L, F / heads)
        mask = key_padding_mask
        if mask is not None:
            mask = (mask.logical_not() if mask.dtype == torch.bool else mask)[:, None, None, :]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2)), None
