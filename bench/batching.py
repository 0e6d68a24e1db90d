"""Training steps with all branches in one pass against one after the other: operators and time of the CPU."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from bench.operators import Operators
from bench.steps import batch_of, binary, ours, taskonomy
from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.network.batched.choice import small

TASKS = tuple(Task(f"t{n}", "binary") for n in range(4))
TABLE = InputSpec("features", (20,))
IMAGE = InputSpec("image", (32, 32, 3), "uint8", (127.5,), (63.0,))
TOKENS = InputSpec("tokens", (16,), "int32", vocabulary=256)
VIT = EncoderSpec("vit", 2, {"patch": 8, "width": 48, "layers": 4})
TEXT = EncoderSpec("text_transformer", 1, {"width": 32, "layers": 2})

# name → (network, batch)
CASES = {
    "mlp 64, 32, K = 3": (NetworkSpec(TABLE, TASKS, EncoderSpec("mlp"), 3), 64),
    "mlp 64, 32, K = 12": (NetworkSpec(TABLE, TASKS, EncoderSpec("mlp"), 12), 64),
    "mlp 512, 512, 256, K = 3": (
        NetworkSpec(TABLE, TASKS, EncoderSpec("mlp", 0, {"widths": [512, 512, 256]}), 3), 64,
    ),
    "convnet 16, 32, K = 3": (NetworkSpec(IMAGE, TASKS, EncoderSpec("convnet", 0, {"widths": [16, 32]}), 3), 16),
    "celeba_resnet 8, K = 8": (NetworkSpec(IMAGE, TASKS, EncoderSpec("celeba_resnet", 0, {"width": 8}), 8), 8),
    "vit 48, K = 3": (NetworkSpec(IMAGE, TASKS, VIT, 3), 8),
    "text_transformer 32, K = 3": (NetworkSpec(TOKENS, TASKS, TEXT, 3), 8),
    "celeba_resnet 64, K = 4, 64×64": (binary(4, EncoderSpec("celeba_resnet")), 4),
    "xception_taskonomy, K = 3, five dense tasks": (taskonomy(64), 2),
}  # fmt: skip
PAIRS, SECONDS = 9, 0.3  # of the time


def kernels(step: Callable[[], object]) -> tuple[int, int]:
    """Count the operators of a step, and those that are no views."""
    step()
    with Operators() as found:
        step()
    views = ("detach", "view", "_unsafe_view", "t.", "transpose", "unbind", "split", "select", "slice", "permute",
             "expand", "unsqueeze", "squeeze", "as_strided", "alias", "_reshape_alias")  # fmt: skip
    computing = sum(number for name, number in found.by_name.items() if not name.startswith(views))
    return sum(found.by_name.values()), computing


def seconds(step: Callable[[], object], count: int) -> float:
    """Time of the CPU for some steps. Other work on the machine changes it less than the time of a clock."""
    started = time.process_time()
    for _ in range(count):
        step()
    return time.process_time() - started


def main() -> None:
    """Print a line for each case, or for those whose names begin with an argument."""
    torch.set_num_threads(1)
    print("network | batch | operators | without views | one pass ÷ one after the other | auto")
    for name, (spec, rows) in CASES.items():
        if not name.startswith(tuple(sys.argv[1:]) or ""):
            continue
        apart, together = (ours(spec, rows, batched=batched) for batched in ("off", "on"))
        (all_apart, apart_computing), (all_together, computing) = kernels(apart), kernels(together)
        count = max(round(SECONDS / max(seconds(apart, 1), 1e-3)), 1)
        ratios = [seconds(together, count) / seconds(apart, count) for _ in range(PAIRS)]
        chosen = "one pass" if small(GroupingNetwork(spec), len(batch_of(spec, rows).inputs)) else "apart"
        counts = f"{all_apart} → {all_together} | {apart_computing} → {computing}"
        print(f"{name} | {rows} | {counts} | {statistics.median(ratios):.2f} | {chosen}", flush=True)


if __name__ == "__main__":
    main()
