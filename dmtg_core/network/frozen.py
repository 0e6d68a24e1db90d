"""Frozen stages: weights that training does not change, shared by all copies of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import nn

Part = TypeVar("Part", bound=nn.Module)
IN_USE: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()  # frozen parts of the networks of this process


class Frozen(nn.Sequential):
    """Stages whose weights do not change. They are always in evaluation mode.

    A copy of a network has the same frozen stages, not copies of them.
    """

    trained = False

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__(*stages)
        self.requires_grad_(requires_grad=False)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode: dropout is off, and running statistics do not change."""
        return super().train(mode and self.trained)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        """Return the stages themselves."""
        return self


def in_memory_once(part: Part, structure: str) -> Part:
    """Return the part of this process with the same weights, if there is one, else `part` itself.

    Args:
        part: A frozen part. Nothing may change its weights from now on.
        structure: Description of what the code of the part depends on, besides its weights.
    """
    return cast("Part", IN_USE.setdefault(f"{digest([part])} {structure}", part))


def digest(parts: Iterable[nn.Module]) -> str:
    """Return the SHA-256 of names, shapes and values of all weights and running statistics, in hex digits."""
    total = hashlib.sha256()
    for number, part in enumerate(parts):
        for name, tensor in part.state_dict().items():
            total.update(f"{number}.{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def copies(stages: Iterable[nn.Module], count: int) -> list[nn.Sequential]:
    """Return `count` independent copies of stages with equal weights."""
    first = nn.Sequential(*stages)
    return [first, *(deepcopy(first) for _ in range(count - 1))]
