"""Operators that a training step dispatches: ours against the published step, and where ours go.

The host of a GPU dispatches every operator. With small batches it is slower than the device, and its operators
determine the time of a step. A count depends on neither machine nor load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from bench.steps import Costs, ours, published, taskonomy

SIZE, ROWS_OF_BATCH = 32, 2  # neither changes a count
# part of a step → end of the names of its modules
MODULES = {
    "stem": ".network.stem", "encoders": ".network.branches.", "heads": ".network.decoders.",
    "bank": ".network.bank", "losses": ".pair_losses", "gate": ".network.gate", "input": ".network.normalise",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the dispatched operators by the part of the step, and by name. `record_function` is not one.

    Args:
        tracker: Knows the module that is computed, forward or backward. Without it, nothing is counted by part.
    """

    def __init__(self, tracker: ModuleTracker | None = None) -> None:
        super().__init__()
        self.tracker = tracker
        self.by_part: Counter[str] = Counter()
        self.by_name: Counter[str] = Counter()
        self._section = ["step"]  # names of the open `record_function` blocks

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator and compute it."""
        name = str(func)
        if name.startswith("profiler._record_function_enter"):
            self._section.append(args[0])
        elif name.startswith("profiler._record_function_exit"):
            self._section.pop()
        else:
            self.by_name[name.removeprefix("aten.")] += 1
            self.by_part[self._part()] += 1
        return func(*args, **(kwargs or {}))

    def _part(self) -> str:
        running = self.tracker.parents if self.tracker else set()
        for part, module in MODULES.items():
            if any(module in name for name in running):
                return part
        return self._section[-1]


def count(step: Callable[[], object]) -> float:
    """Count the operators of a step. The first step, which also creates state, is not counted."""
    step()
    with Operators() as found:
        step()
    return float(sum(found.by_name.values()))


def count_by_part(*, pruned: bool) -> Counter[str]:
    """Count the operators of our step of five dense tasks by its parts."""
    step = ours(taskonomy(SIZE), ROWS_OF_BATCH, pruned=pruned)
    step()
    with ModuleTracker() as tracker, Operators(tracker) as found:
        step()
    return found.by_part


def against_published(*, pruned: bool) -> Costs:
    """Compare our step of five dense tasks with the published step: counts in place of seconds."""
    spec = taskonomy(SIZE)
    return (
        lambda: count(ours(spec, ROWS_OF_BATCH, pruned=pruned)),
        lambda: count(published(spec, ROWS_OF_BATCH)),
    )


ROWS: dict[str, tuple[str, float, Callable[[], Costs]]] = {
    "operators": ("at_most", 0.25, lambda: against_published(pruned=True)),
    "operators_unpruned": ("at_most", 0.5, lambda: against_published(pruned=False)),
}


def main() -> None:
    """Print where the operators of our step go."""
    torch.set_num_threads(1)
    for pruned in (True, False):
        parts = count_by_part(pruned=pruned)
        print(f"{'pruned' if pruned else 'unpruned'}: {sum(parts.values())} operators")
        for part, number in parts.most_common():
            print(f"  {part:14} {number:6}")
        one_pass = count(ours(taskonomy(SIZE), ROWS_OF_BATCH, pruned=pruned, batched="on"))
        print(f"  all, with the branches in one pass: {one_pass:.0f}")


if __name__ == "__main__":
    main()
