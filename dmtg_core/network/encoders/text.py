"""Text encoders that are trained from scratch on token ids.

A stage passes a tuple to the next: tokens `(B, L, F)`, and a mask, bool `(B, L)`, of the tokens that are read.
Pretrained models add further tensors. On a CPU L is the length of the longest text of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders.basic import layers as dense_layers

Tokens = tuple[Tensor, ...]  # (B, L, F), (B, L), and further tensors whose first axis is that of the samples


def embedding_bag(
    spec: InputSpec, *, embedding: int = 64, widths: Sequence[int] = (64, 32), dropout: float = 0.0
) -> list[nn.Module]:
    """The mean of the tokens' embeddings, and linear layers with ReLU. The mean is a stage, and so is each layer.

    Args:
        spec: A token input. The mean of a text that is only padding is zero.
        embedding: Width of an embedding.
        widths: Widths of the layers.
        dropout: Share of the values of each layer that are dropped during training.
    """
    bag = nn.EmbeddingBag(spec.vocabulary, embedding, mode="mean", padding_idx=spec.padding)
    return [bag, *dense_layers([embedding, *widths], dropout)]


def text_transformer(
    spec: InputSpec, *, width: int = 128, layers: int = 4, heads: int = 4, dropout: float = 0.0
) -> list[nn.Module]:
    """A pre-norm transformer with learned positions, with a stage for the embedding and one for each layer.

    The last stage ends in a norm and the mean over the tokens that are not padding. A text that is only padding
    is read as one padding token.

    Args:
        spec: A token input.
        width: Channels of a token, a multiple of `heads`.
        layers: Number of transformer layers. Each has a hidden layer of four times `width`.
        heads: Attention heads of a layer.
        dropout: Share of values dropped during training.

    Raises:
        ValueError: If `heads` does not divide the width, or if there is no layer.
    """
    if layers < 1 or width % heads:
        raise ValueError(
            f"encoder text_transformer needs a layer and a width that its heads divide, "
            f"got {layers} layers, width {width}, {heads} heads"
        )
    blocks = [_Layer(width, heads, dropout) for _ in range(layers)]
    end = nn.Sequential(blocks[-1], _Norm(width), Mean())
    return [_Embedding(spec, width, dropout), *blocks[:-1], end]


def read(ids: Tensor, padding: int = 0) -> Tensor:
    """Return the mask of the tokens of `(B, L)` that are read: all that are not padding.

    Attention over no token is not a number. A text that is only padding therefore keeps its first token.
    """
    present = ids != padding
    empty = ~present.any(1, keepdim=True)  # (B, 1)
    return torch.cat([present[:, :1] | empty, present[:, 1:]], 1)


def without_padding(ids: Tensor, padding: int = 0) -> Tensor:
    """Return ids `(B, L)` without the last columns that are padding in all texts. One column stays.

    Only on a CPU: a GPU would wait for the length. A compiled or exported module keeps all columns, since its
    shapes must not depend on values.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return ids
    used = (ids != padding).any(0).nonzero()
    return ids[:, : int(used[-1]) + 1 if len(used) else 1]


class Mean(nn.Module):
    """The mean over the tokens that are read, `(B, F)`."""

    def forward(self, state: Tokens) -> Tensor:
        """`(B, L, F)` and `(B, L)` to `(B, F)`."""
        tokens, mask = state[:2]
        return (tokens * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


class _Embedding(nn.Module):
    """The embedding of ids `(B, L)` with positions."""

    def __init__(self, spec: InputSpec, width: int, dropout: float) -> None:
        super().__init__()
        self.padding = spec.padding
        self.tokens = nn.Embedding(spec.vocabulary, width, padding_idx=spec.padding)
        self.positions = nn.Parameter(torch.empty(spec.shape[0], width))
        self.dropout = nn.Dropout(dropout)
        for weight in (self.tokens.weight, self.positions):
            nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            self.tokens.weight[spec.padding].zero_()

    def forward(self, ids: Tensor) -> Tokens:
        ids = without_padding(ids, self.padding)
        return self.dropout(self.tokens(ids) + self.positions[: ids.shape[1]]), read(ids, self.padding)


class _Layer(nn.Module):
    """Attention and a hidden layer, each with a norm before it and a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )

    def forward(self, state: Tokens) -> Tokens:
        tokens, mask = state
        return self.layer(tokens, src_key_padding_mask=~mask), mask


class _Norm(nn.Module):
    """A layer norm of the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, state: Tokens) -> Tokens:
        tokens, mask = state
        return self.norm(tokens), mask
