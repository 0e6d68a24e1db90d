"""The calls of modules in one pass of a library's model, from which its structure is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments, its output, and when it began and ended."""

    module: nn.Module
    args: tuple[Any, ...]
    output: Any
    begun: int
    ended: int

    @property
    def result(self) -> Any:
        """The output, or its first part."""
        return self.output[0] if isinstance(self.output, tuple) else self.output


class Skipped(nn.Module):
    """In the place of a module that runs in another stage: returns its first argument."""

    def forward(self, x: Tensor, *_args: Any, **_options: Any) -> Tensor:
        """Return `x`."""
        return x


def calls_of(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[list[Call], Tensor]:
    """Return all calls of modules inside `compute`, in the order of their ends, and its result.

    Raises:
        ValueError: If the computation fails.
    """
    calls: list[Call] = []
    begun: list[int] = []
    clock = iter(range(10**9))

    def begin(_module: nn.Module, _args: Any) -> None:
        begun.append(next(clock))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(Call(module, args, output, begun.pop(), next(clock)))

    hooks = [module.register_forward_pre_hook(begin) for module in model.modules()]
    hooks += [module.register_forward_hook(end) for module in model.modules()]
    try:
        return calls, compute()
    except Exception as error:  # each model has errors of its own
        raise ValueError(f"its forward does not take the input alone ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()


def leading_to(calls: Iterable[Call], last: Call, output: Tensor) -> list[nn.Module]:
    """Return the modules whose outputs lead from the output of `last` to `output`.

    Raises:
        ValueError: If something else than modules with one argument leads there.
    """
    modules: list[nn.Module] = []
    later = [call for call in calls if call.begun > last.ended]
    while output is not last.result:
        makers = [call for call in later if call.output is output and call.args[0] is not output]
        if not makers or len(makers[0].args) != 1:
            raise ValueError("its output is not that of a module after the last layer")
        modules.insert(0, makers[-1].module)
        (output,) = makers[-1].args
    return modules


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the module of this name in a model."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
