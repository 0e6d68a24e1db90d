"""TabM: an MLP for tables with weight-sharing members and embeddings of numbers."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial, wraps
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.inputs import Normalise

EXTRA = "pip install 'dmtg[tables]'"
MANY_ROWS = 1_000  # rows from which the embedding of a number is piecewise linear
SHARED_ROWS = 3_000  # rows from which members share the first layer
WIDE_ROWS = 20_000  # rows from which layers are twice as wide
MOST_EMBEDDED = 512  # values of the embeddings of all numbers, for at least 2 each


def tabm_options(rows: int, numbers: int) -> dict[str, Any]:
    """Options of `tabm` for the size of a table.

    A piecewise-linear embedding follows steep functions, which need many rows. Small tables have a smoother one,
    which is periodic with low frequencies. A table of many numbers has fewer values for each. From `SHARED_ROWS`
    rows the first layer is shared and the members are half as many, which takes half of the time and has no
    larger error; smaller tables need the differences of 16 members. The number of blocks does not depend on the
    size. The limits were chosen on tables of `bench.tables`, and on molecules with descriptors as features.

    Args:
        rows: Rows of the table; the training rows if they are known.
        numbers: Features that are numbers.
    """
    most = max(MOST_EMBEDDED // max(numbers, 1), 2)
    if rows < MANY_ROWS:
        return {"numbers": "periodic", "embedding": min(8, most), "frequencies": 16, "frequency_scale": 0.02}
    options = {"numbers": "piecewise_linear", "bins": 48, "embedding": min(16, most)}
    if rows >= SHARED_ROWS:
        options |= {"members": 8, "shared_input": True}
    return options | {"width": 256} if rows >= WIDE_ROWS else options


@dataclass(frozen=True)
class _Tabm:
    spec: InputSpec
    _: KW_ONLY
    width: int = 128
    blocks: int = 3
    members: int = 16
    numbers: str = "periodic"
    bins: int = 48
    embedding: int = 8
    frequencies: int = 16
    frequency_scale: float = 0.02
    shared_input: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.numbers not in ("periodic", "piecewise_linear"):
            raise ValueError(f"numbers must be periodic or piecewise_linear, got {self.numbers!r}")
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")

    def stages(self) -> list[nn.Module]:
        library, width, spec = _library("tabm"), self.width, self.spec
        numbers = [place for place, edges in enumerate(spec.quantiles) if edges]
        flags = [place for place in range(spec.shape[0]) if place not in set(numbers)]
        chunks = [self.embedding] * len(numbers) + [1] * len(flags)
        layer = partial(library.LinearBatchEnsemble, k=self.members)
        hidden = [_Block(layer(width, width, scaling_init="ones"), self.dropout) for _ in range(self.blocks - 1)]
        codes = _Codes(spec, width) if self.shared_input and any(spec.codes) else None
        if self.shared_input:
            shared = _SharedLinear(library, sum(chunks), width, self.members, codes is not None)
            first: nn.Module = _Block(shared, self.dropout)
        else:
            start = ("normal" if numbers else "random-signs", "ones")
            plain = layer(sum(chunks), width, scaling_init=start, first_scaling_init_chunks=chunks)
            first = nn.Sequential(library.EnsembleView(k=self.members), _Block(plain, self.dropout))
        return [_Columns(self._embed(numbers), numbers, flags, codes), first, *hidden]

    def _embed(self, numbers: list[int]) -> nn.Module | None:
        if not numbers:
            return None
        if self.numbers == "piecewise_linear":
            return _PiecewiseLinear(_edges(self.spec, numbers, self.bins), self.embedding)
        return _library("rtdl_num_embeddings").PeriodicEmbeddings(
            len(numbers), self.embedding, n_frequencies=self.frequencies,
            frequency_init_scale=self.frequency_scale, lite=False,
        )  # fmt: skip


@wraps(_Tabm)  # gives the function its signature: the options
def tabm(spec: InputSpec, **options: Any) -> list[nn.Module]:
    """An ensemble of `members` MLPs with common weights (TabM, Gorishniy et al., ICLR 2025, section 3).

    The first stage embeds the numbers (Gorishniy et al., NeurIPS 2022): by a linear layer on sine and cosine of
    learned frequencies with ReLU (section 3.3), or by a continuous function that is linear within each bin of
    training rows (section 3.2; version B of `PiecewiseLinearEmbeddings` in the authors' package). Each further
    stage is a linear layer with ReLU, dropout, and a residual connection where both widths are equal. Its members
    differ by scales of inputs and outputs and by biases (BatchEnsemble, Wen et al. 2020, equation 5). Features
    with `InputSpec.quantiles` are numbers; other features, such as the flags of categories, are used as they are.
    A number with `InputSpec.codes` is a category as well: each code has a vector, which is added in the first
    layer and starts at zero.

    The stages after the first map `(B, members, F)` to `(B, members, F)`. The loss of a task is the mean of the
    losses of its members. A prediction is the mean of the members' predictions, see
    `dmtg_core.network.members.average`.

    Args:
        spec: An input of features.
        width: Features of each hidden layer.
        blocks: Number of hidden layers.
        members: Size of the ensemble; 1 for a plain MLP.
        numbers: Embedding of the numbers: "periodic" or "piecewise_linear".
        bins: Largest number of bins of a piecewise-linear embedding.
        embedding: Values of the embedding of a number.
        frequencies: Frequencies of a periodic embedding.
        frequency_scale: Standard deviation of the initial frequencies, in 1 / normalised unit.
        shared_input: Whether the members have no scales of the first layer's inputs. Its product is then computed
            once for all members, and the scales of its outputs start as random signs.
        dropout: Share of values dropped during training.

    Raises:
        ValueError: If the packages `tabm` and `rtdl_num_embeddings` are not installed, or if an option has no such
            value.
    """
    return _Tabm(spec, **options).stages()


class _Columns(nn.Module):
    """Embedded numbers, the other features, and the vectors of codes: `(B, F)` to `(B, F')`."""

    numbers: Tensor
    flags: Tensor

    def __init__(
        self, embed: nn.Module | None, numbers: list[int], flags: list[int], codes: nn.Module | None
    ) -> None:
        super().__init__()
        self.embed, self.codes = embed, codes
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.int64), persistent=False)
        self.register_buffer("flags", torch.tensor(flags, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is None:
            return x
        parts = [self.embed(x.index_select(1, self.numbers)).flatten(1)]  # (B, F_n · D)
        if len(self.flags):
            parts.append(x.index_select(1, self.flags))
        if self.codes is not None:
            parts.append(self.codes(x))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class _PiecewiseLinear(nn.Module):
    """Embeddings of numbers that are linear within each bin: `(B, F)` to `(B, F, D)`.

    A number outside all bins has the embedding of the nearest edge, because nothing is known beyond.
    """

    least: Tensor
    most: Tensor

    def __init__(self, edges: list[Tensor], size: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*just two bin edges")  # numbers most of which are equal
            make = _library("rtdl_num_embeddings").PiecewiseLinearEmbeddings
            self.embed = make(edges, size, activation=False, version="B")
        self.register_buffer("least", torch.stack([one[0] for one in edges]), persistent=False)
        self.register_buffer("most", torch.stack([one[-1] for one in edges]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.clamp(self.least, self.most))


class _Codes(nn.Module):
    """The sum of the vectors of the codes of a row: `(B, F)` to `(B, width)`.

    A normalised number is a code if it equals the code's normalised value up to rounding errors.
    """

    TOLERANCE = 1e-5
    values: Tensor
    places: Tensor
    last: Tensor
    starts: Tensor

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__()
        columns = {place: codes for place, codes in enumerate(spec.codes) if codes}
        places, scores = list(columns), _scores(spec, columns)
        counts = torch.tensor(list(map(len, scores))).unsqueeze(1)
        values = torch.full((len(places), int(counts.max())), torch.inf)
        for row, known in zip(values, scores, strict=True):
            row[: len(known)] = known
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("last", counts - 1, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.vectors = nn.Parameter(torch.zeros(int(counts.sum()), width))

    def forward(self, x: Tensor) -> Tensor:
        score = x.index_select(1, self.places).T.contiguous()  # (C, B)
        least = score - self.TOLERANCE
        if torch.compiler.is_exporting():  # ONNX has no search
            nearest = (self.values.unsqueeze(2) < least.unsqueeze(1)).sum(1)
        else:
            nearest = torch.searchsorted(self.values, least)
        nearest = nearest.minimum(self.last)
        known = (self.values.gather(1, nearest) - score).abs() <= self.TOLERANCE
        found = nn.functional.embedding(nearest + self.starts, self.vectors)  # (C, B, width)
        return (found * known.unsqueeze(2)).sum(0)


def _scores(spec: InputSpec, columns: Mapping[int, Sequence[float]]) -> list[Tensor]:
    """The different normalised values of features, in ascending order."""
    rows = torch.zeros(max(map(len, columns.values())), spec.shape[0])
    for place, values in columns.items():
        rows[: len(values), place] = torch.tensor(values)
    scores = Normalise(spec)(rows)
    return [scores[: len(values), place].unique() for place, values in columns.items()]


def _edges(spec: InputSpec, places: Sequence[int], bins: int) -> list[Tensor]:
    """At most `bins + 1` edges of each feature, in normalised units, with as many training rows between two."""
    last = len(spec.quantiles[places[0]]) - 1
    chosen = np.linspace(0, last, min(bins, last) + 1).round().astype(int).tolist()
    found = _scores(spec, {place: [spec.quantiles[place][one] for one in chosen] for place in places})
    return [edges if len(edges) > 1 else torch.cat([edges, edges + 1]) for edges in found]  # or a constant


class _SharedLinear(nn.Module):
    """A first layer with one product for all members: `(B, F)` to `(B, members, width)`.

    The last `width` inputs are added to the product, if there are vectors of codes.
    """

    def __init__(self, library: ModuleType, inputs: int, width: int, members: int, coded: bool) -> None:
        super().__init__()
        self.inputs, self.coded = inputs, coded
        self.in_features, self.out_features = 0, width  # no residual connection: the input has no members
        self.linear = nn.Linear(inputs, width, bias=False)
        self.scales = nn.Parameter(torch.empty(members, width))
        library.init_scaling_(self.scales, "random-signs", None)
        start = torch.empty(width).uniform_(-(inputs**-0.5), inputs**-0.5)  # one start for all, as in `tabm`
        self.bias = nn.Parameter(start.repeat(members, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x[:, : self.inputs])
        if self.coded:
            hidden = hidden + x[:, self.inputs :]
        return torch.addcmul(self.bias, hidden.unsqueeze(1), self.scales)


class _Block(nn.Module):
    """A linear layer of all members with ReLU, dropout and, for equal widths, a residual connection."""

    def __init__(self, linear: nn.Module, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = nn.Dropout(dropout)
        self.residual = linear.in_features == linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).relu()  # (B, members, F)
        if self.training:
            # one mask for all members, because a mask for each takes a third of a step
            out = out * self.dropout(out.new_ones(out.shape[0], 1, out.shape[2]))
        return x + out if self.residual else out


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"encoder tabm needs the package {name}: {EXTRA}") from error
