"""TabM: an MLP for tables with weight-sharing members and periodic embeddings of numbers."""

from __future__ import annotations

import importlib
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.tasks import InputSpec

EXTRA = "pip install 'dmtg[tables]'"
MANY_ROWS = 2_000  # rows from which numbers have a finer embedding
MOST_EMBEDDED = 512  # values of the embeddings of all numbers, for at least 2 each


def tabm_options(rows: int, numbers: int) -> dict[str, Any]:
    """Options of `tabm` for the size of a table. Width, blocks and members do not depend on it.

    A finer embedding of a number can follow steeper functions, which small data do not determine: its frequencies
    are higher and its values more from `MANY_ROWS` rows. A table of many numbers has fewer values for each. The
    limits were chosen on the development tables of `bench.tables`.

    Args:
        rows: Rows of the table; the training rows if they are known.
        numbers: Features that are numbers.
    """
    embedding, frequencies, scale = (8, 16, 0.02) if rows < MANY_ROWS else (16, 32, 0.1)
    embedding = max(min(embedding, MOST_EMBEDDED // max(numbers, 1)), 2)
    return {"embedding": embedding, "frequencies": frequencies, "frequency_scale": scale}


def tabm(
    spec: InputSpec,
    *,
    width: int = 128,
    blocks: int = 3,
    members: int = 16,
    embedding: int = 8,
    frequencies: int = 16,
    frequency_scale: float = 0.02,
    dropout: float = 0.1,
) -> list[nn.Module]:
    """An ensemble of `members` MLPs with common weights (TabM, Gorishniy et al., ICLR 2025, section 3).

    The first stage embeds the numbers (Gorishniy et al., NeurIPS 2022, section 3.3: a linear layer on sine and
    cosine of learned frequencies, then ReLU). Each further stage is a linear layer with ReLU, dropout, and a
    residual connection where both widths are equal. Its members differ by scales of inputs and outputs and by
    biases (BatchEnsemble, Wen et al. 2020, equation 5). Features with `InputSpec.quantiles` are numbers; other
    features, such as the flags of categories, are used as they are.

    The stages after the first map `(B, members, F)` to `(B, members, F)`. The loss of a task is the mean of the
    losses of its members. A prediction is the mean of the members' predictions, see
    `dmtg_core.network.members.average`.

    Args:
        spec: An input of features.
        width: Features of each hidden layer.
        blocks: Number of hidden layers.
        members: Size of the ensemble; 1 for a plain MLP.
        embedding: Values of the embedding of a number.
        frequencies: Frequencies of the embedding of a number.
        frequency_scale: Standard deviation of the initial frequencies, in 1 / normalised unit.
        dropout: Share of values dropped during training.

    Raises:
        ValueError: If the packages `tabm` and `rtdl_num_embeddings` are not installed.
    """
    library, embeddings = _library("tabm"), _library("rtdl_num_embeddings")
    numbers = [place for place, edges in enumerate(spec.quantiles) if edges]
    flags = [place for place in range(spec.shape[0]) if place not in set(numbers)]
    embed = None
    if numbers:
        embed = embeddings.PeriodicEmbeddings(
            len(numbers), embedding, n_frequencies=frequencies, frequency_init_scale=frequency_scale, lite=False
        )
    chunks = [embedding] * len(numbers) + [1] * len(flags)
    sizes = [sum(chunks), *[width] * blocks]
    layers = [
        library.LinearBatchEnsemble(
            inputs, outputs, k=members, scaling_init=(("normal" if numbers else "random-signs"), "ones")
            if number == 0 else "ones", first_scaling_init_chunks=chunks if number == 0 else None,
        )
        for number, (inputs, outputs) in enumerate(pairwise(sizes))
    ]  # fmt: skip
    stages: list[nn.Module] = [_Block(layer, dropout) for layer in layers]
    stages[0] = nn.Sequential(library.EnsembleView(k=members), stages[0])
    return [_Columns(embed, numbers, flags), *stages]


class _Columns(nn.Module):
    """Embedded numbers, then the other features: `(B, F)` to `(B, F')`."""

    numbers: Tensor
    flags: Tensor

    def __init__(self, embed: nn.Module | None, numbers: list[int], flags: list[int]) -> None:
        super().__init__()
        self.embed = embed
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.int64), persistent=False)
        self.register_buffer("flags", torch.tensor(flags, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is None:
            return x
        embedded = self.embed(x.index_select(1, self.numbers)).flatten(1)  # (B, F_n · D)
        return torch.cat([embedded, x.index_select(1, self.flags)], 1) if len(self.flags) else embedded


class _Block(nn.Module):
    """A linear layer of all members with ReLU, dropout and, for equal widths, a residual connection."""

    def __init__(self, linear: nn.Module, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = nn.Dropout1d(dropout)
        self.residual = linear.in_features == linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).relu()  # (B, members, F)
        # one mask for all members: a mask each takes a third of a step
        out = self.dropout(out.transpose(1, 2)).transpose(1, 2)
        return x + out if self.residual else out


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"encoder tabm needs the package {name}: {EXTRA}") from error
