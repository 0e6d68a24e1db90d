"""`Numbered`: modules or parameters with numbers as keys, in ascending order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

from torch import nn

Key = TypeVar("Key", int, tuple[int, int])
Item = TypeVar("Item", nn.Module, nn.Parameter)


class Numbered(nn.Module, Generic[Key, Item]):
    """Modules or parameters in ascending order of their keys: branch numbers, or pairs (branch, task).

    `nn.ParameterDict` and `nn.ModuleDict` have strings as keys, and `nn.ParameterDict` sorts them: "10" comes
    before "2". In a state dictionary branch 10 is "10", and branch 3 with task 4 is "3_4".

    Args:
        items: Number → module or parameter, in any order.
    """

    def __init__(self, items: Mapping[Key, Item]) -> None:
        super().__init__()
        self._names: dict[Key, str] = {key: _name(key) for key in sorted(items)}
        for key, name in self._names.items():
            setattr(self, name, items[key])

    def __getitem__(self, key: Key) -> Item:
        """Return the item of a number, or raise KeyError."""
        name = self._names[key]
        return cast("Item", self._modules[name] if name in self._modules else self._parameters[name])

    def __setitem__(self, key: Key, item: Item) -> None:
        """Replace an existing item.

        Raises:
            KeyError: If the number does not exist.
        """
        setattr(self, self._names[key], item)

    def __delitem__(self, key: Key) -> None:
        delattr(self, self._names.pop(key))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def values(self) -> list[Item]:
        """Return the items by ascending number."""
        return [self[key] for key in self]

    def items(self) -> list[tuple[Key, Item]]:
        """Return pairs (number, item) by ascending number."""
        return [(key, self[key]) for key in self]


def _name(key: int | tuple[int, int]) -> str:
    return "_".join(map(str, key)) if isinstance(key, tuple) else str(key)
