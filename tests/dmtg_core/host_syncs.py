"""Finds operations that make the host wait for a GPU, on any device."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "unique",
    "_unique2", "unique_consecutive", "unique_dim", "allclose", "bincount", "argwhere", "repeat_interleave",
}  # fmt: skip


class HostSyncs(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.seen[name] += 1
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for part in args
            if isinstance(part, list | tuple)
            for index in part
        )
        if name in SYNCS or by_mask:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))
