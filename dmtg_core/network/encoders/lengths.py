"""Texts of similar length are computed together, so that little of a batch is padding.

All texts of a batch have as many columns as the longest. Where most texts are short, most columns of a batch are
padding. The texts are therefore ordered by length and computed in parts, each with the columns that it needs. The
samples of a batch, and their order, do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ENCODERS = ("text_transformer", "transformers")  # those that compute no more columns than the longest text has
TEXTS = 8  # least number of texts of a part: the calls of a part take as long as some texts
PARTS = 16  # largest number of parts


def lengths(ids: Tensor, padding: int) -> Tensor:
    """Return for each text of ids `(B, L)` the number of columns up to its last token, `(B,)`."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return ((ids != padding) * places).amax(1)


def in_parts(
    compute: Callable[[Tensor], Sequence[Tensor]], batch: Tensor, ids: Tensor, padding: int
) -> list[Tensor]:
    """Compute tensors whose first axis is that of the samples, for texts of similar length together.

    The shapes of a compiled or exported module must not depend on values: it computes the batch as it is.

    Args:
        compute: Computes the tensors of some samples.
        batch: All samples, `(B, …)`.
        ids: Their tokens, `(B, L)`.
        padding: Id of padding.

    Returns:
        What `compute(batch)` returns, up to rounding.
    """
    if torch.compiler.is_compiling() or len(batch) < 2 * TEXTS:
        return list(compute(batch))
    parts = min(len(batch) // TEXTS, PARTS)
    order = lengths(ids, padding).argsort(stable=True)
    found = [compute(batch[places]) for places in order.tensor_split(parts)]
    back = order.argsort()
    return [torch.cat(several)[back] for several in zip(*found, strict=True)]
