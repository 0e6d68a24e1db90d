"""The output of a frozen stem as stored samples, so that it is computed once and not in each epoch.

Stored outputs are bfloat16 tensors, which no raw input is. `GroupingNetwork.features` accepts both. An output
that is one tensor is stored as it is. Of the output of a text encoder, the tokens `(B, L, F)` are stored with
their ids in two further columns, `(B, L, F + 2)`. The mask and all else follows from the ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ID_COLUMNS = 2  # an id has 32 bits


def to_store(output: Tensor | tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """Return the output of a stem, ready to be stored.

    Args:
        output: Output of the stem for B samples.
        ids: Input of the stem; token ids `(B, L)` if the output is a tuple.
    """
    if isinstance(output, Tensor):
        return output.to(torch.bfloat16).contiguous()
    columns = ids.int().contiguous().view(torch.bfloat16).view(*ids.shape, ID_COLUMNS)
    tokens = nn.functional.pad(output[0], (0, 0, 0, ids.shape[1] - output[0].shape[1]))
    return torch.cat([tokens.to(torch.bfloat16), columns], -1)


def is_stored_output(stored: Tensor) -> bool:
    """Whether a batch has outputs of the stem and not raw inputs."""
    return stored.dtype == torch.bfloat16


def restored_output(stem: nn.Sequential, stored: Tensor, *, text: bool) -> Any:
    """Return the output of the stem from what `to_store` returned.

    Args:
        stem: The stem.
        stored: `(B, …)`.
        text: Whether the input is token ids.
    """
    if not text:
        return stored.float()
    first = stem[0](stored_ids(stored).long())
    return stored[:, : first[0].shape[1], :-ID_COLUMNS].float(), *first[1:]


def stored_ids(stored: Tensor) -> Tensor:
    """Return the token ids `(B, L)` of stored outputs of a text encoder, `(B, L, F + 2)`."""
    return stored[..., -ID_COLUMNS:].contiguous().view(torch.int32).squeeze(-1)
