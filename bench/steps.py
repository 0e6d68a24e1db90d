"""One training step of ours against one of the published code, on the same shapes and the same tasks.

The published step has K copies of the branch, K·N heads as separate modules, tensors in NCHW and float32, a loss
call for each (branch, task), and a synchronisation with the host for each loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmtg_core import (
    ArrayData,
    Arrays,
    Batch,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    LocalContext,
    NetworkSpec,
    Task,
)
from dmtg_core.network.decoders import Doubling
from dmtg_core.network.grouping_network import pooled
from dmtg_core.training.losses import label_counts, sample_loss
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import WeighedLoss, prepare_network, step_noise, train_step
from pipelines.data.sources.taskonomy.tasks import TASKS

FIVE = ("depth_zbuffer", "normal", "segment_semantic", "keypoints2d", "edge_texture")
GROUPS_OF_FIVE = (0, 0, 1, 2, 2)  # the grouping after pruning; its choice does not change the cost


def binary(count: int, encoder: EncoderSpec, groups: int = 4) -> NetworkSpec:
    """Return a spec of `count` binary tasks on 64 × 64 images."""
    tasks = tuple(Task(f"t{n}", "binary") for n in range(count))
    return NetworkSpec(InputSpec("image", (64, 64, 3), "uint8", (127.5,), (63.0,)), tasks, encoder, groups)


SMALL = EncoderSpec("convnet", 0, {"widths": [16, 32]})
FACES = EncoderSpec("celeba_resnet")


def taskonomy(size: int = 128, groups: int = 3) -> NetworkSpec:
    """Return the spec of the published network of five dense tasks, with a stem of six layers."""
    image = InputSpec("image", (size, size, 3), "uint8", (127.5,), (63.0,))
    encoder = EncoderSpec("xception_taskonomy", 6)
    return NetworkSpec(image, [TASKS[name] for name in FIVE], encoder, groups, "xception", 128)


def arrays_of(spec: NetworkSpec, rows: int) -> Arrays:
    """Generate random samples without missing labels."""
    generator = torch.Generator().manual_seed(0)
    size = spec.input.shape[:2]

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, (rows, *shape), generator=generator)

    labels = {}
    for task in spec.tasks:
        if task.kind == "binary":
            labels[task.name] = draw(2).numpy().astype("uint8")
        elif task.classes:
            labels[task.name] = draw(task.channels, *size).numpy().astype("uint8")
        else:
            channels = (task.channels,) if task.channels > 1 else ()
            labels[task.name] = draw(255, *size, *channels).numpy().astype("uint8")
    return Arrays(draw(256, *spec.input.shape).numpy().astype("uint8"), labels, {})


def batch_of(spec: NetworkSpec, rows: int, device: str = "cpu") -> Batch:
    """Generate random samples as one batch on a device."""
    data = ArrayData({"train": arrays_of(spec, rows)}, spec.tasks, device=torch.device(device))
    return next(data.train(0, rows))


def ours(
    spec: NetworkSpec,
    rows: int,
    *,
    pruned: bool = False,
    device: str = "cpu",
    precision: str = "fp32",
    graphs: bool = False,
    batched: str = "auto",
) -> Callable[..., object]:
    """Return our step, on one batch on the device or on batches passed to it.

    With `pruned`, each task has one head. On a GPU the step is compiled, which is the default of training.
    """
    settings = TrainSettings(precision=precision, cuda_graphs=graphs, batch_branches=batched)
    context = LocalContext(device=device)
    held = batch_of(spec, rows, device)
    state = TrainState.fresh(GroupingNetwork(spec).to(context.device), settings)
    if pruned:
        state.keep(grouping_of_five(spec), settings)
    prepare_network(state.network, settings, context)
    module = WeighedLoss(state.network, precision=precision).to(context.device).train()
    noise = step_noise(state.network, settings, 0, 0, rows).to(context.device)
    return lambda batch=held: train_step(module, state.optimizer, batch, noise, 1.0, settings, context)


def grouping_of_five(spec: NetworkSpec) -> Tensor:
    """Return the mask of the pairs that stay of the five dense tasks, `(N, K)`."""
    alive = torch.zeros(len(spec.tasks), spec.groups, dtype=torch.bool)
    for n, k in enumerate(GROUPS_OF_FIVE):
        alive[n, k] = True
    return alive


def published(spec: NetworkSpec, rows: int, device: str = "cpu") -> Callable[[], object]:
    """Return the published step."""
    network = GroupingNetwork(spec).train().to(device, memory_format=torch.contiguous_format)
    heads = _separate_heads(network).to(device)
    parameters = [p for name, p in network.named_parameters() if not name.startswith(("bank", "decoders"))]
    optimizer = torch.optim.Adam([*parameters, *heads.parameters()])
    batch = batch_of(spec, rows, device)
    counts = label_counts(spec.tasks, batch.targets)
    image = network.normalise(batch.inputs).contiguous()
    size = batch.inputs.shape[1:3]

    def step() -> None:
        gate = network.gate(1.0, torch.zeros(len(spec.tasks), spec.groups, device=device))
        shared = network.stem(image)
        loss = torch.zeros((), device=device)
        for k, branch in network.branches.items():
            features = branch(shared)
            for n, task in enumerate(spec.tasks):
                head = heads[f"{k}_{n}"]
                out = head(features, size) if task.dense else head(pooled(features)).squeeze(1)
                one = _separate_loss(task, out, batch.targets[task.name]).sum() / counts[n]
                one.item()
                loss = loss + gate[n, k] * one
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _separate_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of one head. Its operators do not change with the losses of the library."""
    return _shift_after_shift(output, target) if task.loss == "l1_shift" else sample_loss(task, output, target)


def _shift_after_shift(output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of the best of nine shifts, each with operators of its own, `(B,)`."""
    inner = target[:, :, 1:-1, 1:-1]
    known = ~inner.isnan()
    inner = inner.masked_fill(~known, 0.0)
    height, width = inner.shape[2:]
    with torch.no_grad():
        shifts = [output[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        sums = [((shift - inner).abs() * known).flatten(1).sum(1) for shift in shifts]
        best = torch.stack(sums).argmin(0)  # (B,)
        moved = _moved(inner, best // 3, best % 3)
        weight = _moved(known.to(inner.dtype), best // 3, best % 3)
    return ((output - moved).abs() * weight).flatten(1).sum(1)


def _moved(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Place each image of `(B, C, H, W)` at `row`, `column` `(B,)` in a zero image that is two pixels larger."""
    height, width = image.shape[2] + 2, image.shape[3] + 2
    padded = nn.functional.pad(image, (2, 2, 2, 2))
    rows = torch.arange(height, device=image.device) + 2 - row.unsqueeze(1)  # (B, H + 2)
    columns = torch.arange(width, device=image.device) + 2 - column.unsqueeze(1)  # (B, W + 2)
    batch = torch.arange(len(image), device=image.device)
    moved = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def _separate_heads(network: GroupingNetwork) -> nn.ModuleDict:
    """Build a module for each (branch, task)."""
    heads = nn.ModuleDict({f"{k}_{n}": _transposing(one) for (k, n), one in network.decoders.items()})
    for k, kept in network.bank.kept.items():
        for task in kept:
            features = network.bank.weights[k].shape[1]
            heads[f"{k}_{network.tasks.index(task)}"] = nn.Linear(features, task.channels)
    return heads


def _transposing(decoder: nn.Module) -> nn.Module:
    """Replace the doublings of a decoder by PyTorch's transposed convolutions."""
    for parent in list(decoder.modules()):
        for name, module in parent.named_children():
            if isinstance(module, Doubling):
                plain = nn.ConvTranspose2d(*module.weight.shape[:2], 2, stride=2, bias=False)
                plain.load_state_dict(module.state_dict())
                parent.add_module(name, plain)
    return decoder.to(memory_format=torch.contiguous_format)


def floor(spec: NetworkSpec, rows: int) -> Callable[[], object]:
    """Return a step of stem, K branches, N heads and optimiser, without gate and losses."""
    settings, batch = TrainSettings(), batch_of(spec, rows)
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    state.keep(grouping_of_five(spec), settings)
    network = state.network.train()

    def step() -> None:
        outputs = network.forward_pairs(batch.inputs)
        state.optimizer.zero_grad()
        torch.autograd.backward(list(outputs.dense.values()), [torch.ones_like(o) for o in outputs.dense.values()])
        state.optimizer.step()

    return step


def timed(step: Callable[[], object], calls: int = 3) -> Callable[[], float]:
    """Measure the seconds of a call."""

    def cost() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - started) / calls

    return cost


Costs = tuple[Callable[[], float], Callable[[], float]]


def against_published(spec: NetworkSpec, rows: int, calls: int, *, pruned: bool = False) -> Costs:
    """Compare the published step with ours."""
    return timed(published(spec, rows), calls), timed(ours(spec, rows, pruned=pruned), calls)


# name → (bound, value, function that returns numerator and denominator of the ratio)
ROWS: dict[str, tuple[str, float, Callable[[], Costs]]] = {
    "step_binary40": ("at_least", 1.2, lambda: against_published(binary(40, SMALL), 64, 3)),
    "step_celeba40": ("at_least", 1.5, lambda: against_published(binary(40, FACES), 16, 3)),
    "growth_step": (
        "at_most", 1.3, lambda: (timed(ours(binary(100, SMALL), 64)), timed(ours(binary(10, SMALL), 64))),
    ),
    "step_xception": ("at_least", 1.2, lambda: against_published(taskonomy(), 2, 1)),
    "step_xception_pruned": ("at_least", 1.7, lambda: against_published(taskonomy(), 2, 1, pruned=True)),
    "pruned_over_floor": (
        "at_most", 1.15, lambda: (timed(ours(taskonomy(), 2, pruned=True), 1), timed(floor(taskonomy(), 2), 1)),
    ),
}  # fmt: skip
