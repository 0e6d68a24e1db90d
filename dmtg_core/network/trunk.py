"""The output of a frozen stem as stored samples, so that it is computed once and not in each epoch.

Stored outputs are bfloat16 tensors, which no raw input is. `GroupingNetwork.features` accepts both. An output
that is one tensor is stored as it is. Of the output of a text encoder, the tokens `(B, L, F)` are stored with
their ids in two further columns, `(B, L, F + 2)`. The mask and all else follows from the ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dmtg_core.network.grouping_network import GroupingNetwork

ID_COLUMNS = 2  # an id has 32 bits


@torch.no_grad()
def stored_output(network: GroupingNetwork, raw: Tensor) -> Tensor:
    """Compute the output of the stem for stored inputs `(B, …)`, ready to be stored.

    Raises:
        ValueError: If the stem is not frozen.
    """
    if not network.frozen:
        raise ValueError("only the output of a frozen stem can be stored: set branch to last or lora")
    out: Tensor | tuple[Tensor, ...] = network.stem(network.normalise(raw))
    if isinstance(out, Tensor):
        return out.to(torch.bfloat16).contiguous()
    ids = network.normalise(raw).int().contiguous().view(torch.bfloat16)  # (B, 2·L)
    return torch.cat([out[0].to(torch.bfloat16), ids.view(*raw.shape, ID_COLUMNS)], -1)


def is_stored_output(stored: Tensor) -> bool:
    """Whether a batch has outputs of the stem and not raw inputs."""
    return stored.dtype == torch.bfloat16


def restored_output(stem: nn.Sequential, stored: Tensor, *, text: bool) -> Any:
    """Return the output of the stem from `stored_output`.

    Args:
        stem: The stem.
        stored: `(B, …)`.
        text: Whether the input is token ids.
    """
    if not text:
        return stored.float()
    tokens, ids = stored.split([stored.shape[-1] - ID_COLUMNS, ID_COLUMNS], -1)
    first = stem[0](ids.contiguous().view(torch.int32).squeeze(-1).long())
    return tokens.float(), *first[1:]
