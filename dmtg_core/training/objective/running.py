"""Running statistics as few large tensors, which a step copies and restores if it is refused."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by dtype and dimension: one large tensor takes less time than many small ones."""
    kinds: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.dim()), []).append(tensor)
    return list(kinds.values())


def flat(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors of one dimension into one flat tensor. Running statistics need no view for it."""
    if tensors[0].dim() == 0:
        return torch.stack(tensors)
    return torch.cat(tensors if tensors[0].dim() == 1 else [tensor.reshape(-1) for tensor in tensors])


def refill(tensors: list[Tensor], values: Tensor) -> None:
    """Copy a flat tensor back into tensors, the inverse of `flat`."""
    if tensors[0].dim() == 0:
        torch._foreach_copy_(tensors, list(values.unbind()))
        return
    parts: Iterable[Tensor] = values.split([tensor.numel() for tensor in tensors])
    if tensors[0].dim() > 1:
        parts = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, list(parts))
