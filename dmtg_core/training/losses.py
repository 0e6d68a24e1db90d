"""Losses as sums over the labels of each sample, for all live heads at once.

All functions return a sum for each sample. The caller divides by the number of labels in the global batch. Missing
labels (see `dmtg_core.tasks`) do not change sums or counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmtg_core.network.grouping_network import PairOutputs
from dmtg_core.tasks import Task

# (output, target) → error of each element; targets have no NaN
_ELEMENTWISE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "binary_cross_entropy": lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="none"),
    "mse": lambda o, t: F.mse_loss(o, t, reduction="none"),
    "l1": lambda o, t: F.l1_loss(o, t, reduction="none"),
    "smooth_l1": lambda o, t: F.smooth_l1_loss(o, t, reduction="none"),
}


def valid(task: Task, target: Tensor) -> Tensor:
    """Mask of the labels: bool of the shape of `target`, without the class axis for class probabilities."""
    if not task.classes:
        return ~target.isnan()
    if target.is_floating_point():
        return torch.ones_like(target.select(1, 0), dtype=torch.bool)
    return target != task.ignore_index


def label_counts(tasks: Sequence[Task], targets: Mapping[str, Tensor]) -> Tensor:
    """Count the labels of each task in a batch, float32 `(N,)`: pixels × channels for dense regression."""
    return torch.stack([label_count(task, targets[task.name]) for task in tasks]).float()


def label_count(task: Task, target: Tensor) -> Tensor:
    """Count the labels of one task in a batch, int64 `()`."""
    return _interior(task, valid(task, target)).sum()


def _interior(task: Task, mask: Tensor) -> Tensor:
    return mask[..., 1:-1, 1:-1] if task.loss == "l1_shift" else mask


def masked_elementwise(loss: str, output: Tensor, target: Tensor) -> Tensor:
    """Compute the error of each element; 0 if the target is NaN. Shapes broadcast."""
    known = ~target.isnan()
    return _ELEMENTWISE[loss](output, target.masked_fill(~known, 0.0).expand_as(output)) * known


def shifted_l1(output: Tensor, target: Tensor) -> Tensor:
    """Compute the smallest L1 loss over nine shifts of each output image by at most one pixel, summed over pixels.

    This is the "rotate loss" of Standley et al. (2020) for depth and normals. Labels that are rendered from a mesh
    can differ from the photograph by one pixel. As in their code, one shift is selected for each image: a shift
    for each pixel would reward outputs that alternate between values. The border has no full neighbourhood and is
    omitted.

    Args:
        output, target: `(B, C, H, W)`. NaN in the target means not annotated.

    Returns:
        `(B,)`, to be divided by the number of annotated values inside the border.
    """
    inner = target[:, :, 1:-1, 1:-1]
    known = ~inner.isnan()
    inner = inner.masked_fill(~known, 0.0)  # an infinite label stays: the step is refused
    height, width = inner.shape[2:]
    with torch.no_grad():
        sums = [
            ((output[:, :, y : y + height, x : x + width] - inner).abs() * known).flatten(1).sum(1)
            for y in range(3)
            for x in range(3)
        ]
        best = torch.stack(sums).argmin(0)  # (B,)
        # the target is shifted, not the output: the backward pass has a single difference
        row, column = best // 3, best % 3
        moved, weight = _moved(inner, row, column), _moved(known.to(inner.dtype), row, column)
    return ((output - moved).abs() * weight).flatten(1).sum(1)


def _moved(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Place each image of `(B, C, H, W)` at `row`, `column` `(B,)` in a zero image that is two pixels larger."""
    height, width = image.shape[2] + 2, image.shape[3] + 2
    padded = F.pad(image, (2, 2, 2, 2))
    rows = torch.arange(height, device=image.device) + 2 - row.unsqueeze(1)  # (B, H + 2)
    columns = torch.arange(width, device=image.device) + 2 - column.unsqueeze(1)  # (B, W + 2)
    batch = torch.arange(len(image), device=image.device)
    moved = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def dense_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss sum of each sample, `(B,)`, of a dense output `(B, C, H, W)`."""
    output = _full(output)
    if task.loss == "l1_shift":
        return shifted_l1(output, target)
    return _by_label(task, output, target).flatten(1).sum(1)


def _full(output: Tensor) -> Tensor:
    """Convert an output to float32. Keep float64."""
    return output if output.dtype == torch.float64 else output.float()


def sample_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss sum of each sample, `(B,)`, of an output of `GroupingNetwork.forward`."""
    if task.dense:
        return dense_loss(task, output, target)
    return _by_label(task, _full(output), target).reshape(len(target), -1).sum(1)


def _by_label(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of each label. Targets are class ids or complete class probabilities `(B, C, …)`."""
    if not task.classes:
        return masked_elementwise(task.loss, output, target)
    if target.is_floating_point():
        return F.cross_entropy(output, target, reduction="none")
    return F.cross_entropy(output, target, ignore_index=task.ignore_index, reduction="none")


class PairLosses(nn.Module):
    """The loss of each live pair (branch, task) on each sample.

    Heads with the same loss and width are computed together, so that N small tasks need a few tensor operations
    instead of N. Build a new object after pruning.

    Args:
        tasks: The N tasks.
        pairs: `GroupingNetwork.pairs`.
    """

    def __init__(self, tasks: Sequence[Task], pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.dense = [(k, n) for k, n in pairs if tasks[n].dense]
        families: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
        row = 0
        for place, (_, n) in enumerate(pairs):
            if not tasks[n].dense:
                task = tasks[n]
                families.setdefault((task.loss, task.channels), []).append((place, row, n))
                row += task.channels
        self.families = list(families)
        places: list[int] = []
        for number, ((_, channels), members) in enumerate(families.items()):
            places += [place for place, _, _ in members]
            rows = torch.tensor([[first + c for c in range(channels)] for _, first, _ in members])
            self.register_buffer(f"rows_{number}", rows.flatten(), persistent=False)
            unique = sorted({n for _, _, n in members})
            self.register_buffer(
                f"target_{number}", torch.tensor([unique.index(n) for _, _, n in members]), persistent=False
            )
        self.members = [sorted({n for _, _, n in members}) for members in families.values()]
        places += range(len(places), len(pairs))
        # families are computed one after the other; this is the order of the pairs
        order = torch.tensor(places).argsort()
        self.in_order: list[int] = order.tolist()
        self.register_buffer("order", order, persistent=False)

    def forward(self, outputs: PairOutputs, targets: Mapping[str, Tensor]) -> Tensor:
        """Compute loss sums `(P, B)` in the order of the pairs. Divide them by `label_counts`."""
        return torch.cat(self._parts(outputs, targets)).index_select(0, self.get_buffer("order"))

    def separate(self, outputs: PairOutputs, targets: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute the rows of `forward` as tensors `(B,)`. The backward pass of a row uses only its decoder."""
        rows = [row for part in self._parts(outputs, targets) for row in part.unbind()]
        return [rows[place] for place in self.in_order]

    def _parts(self, outputs: PairOutputs, targets: Mapping[str, Tensor]) -> list[Tensor]:
        parts = [self._family(number, outputs.rows.float(), targets) for number in range(len(self.families))]
        return parts + [
            dense_loss(self.tasks[n], outputs.dense[k, n], targets[self.tasks[n].name]).unsqueeze(0)
            for k, n in self.dense
        ]

    def _family(self, number: int, rows: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        loss, channels = self.families[number]
        tasks = [self.tasks[n] for n in self.members[number]]
        which = self.get_buffer(f"target_{number}")
        out = rows.index_select(0, self.get_buffer(f"rows_{number}"))  # (P·C, B)
        if tasks[0].classes and targets[tasks[0].name].is_floating_point():
            stacked = torch.stack([targets[t.name].T for t in tasks])  # (N, C, B)
            return F.cross_entropy(
                out.unflatten(0, (-1, channels)), stacked.index_select(0, which), reduction="none"
            )
        if tasks[0].classes:
            stacked = torch.stack([targets[t.name].masked_fill(~valid(t, targets[t.name]), -1) for t in tasks])
            wanted = stacked.index_select(0, which)  # (P, B)
            return F.cross_entropy(out.unflatten(0, (-1, channels)), wanted, ignore_index=-1, reduction="none")
        wanted = torch.stack([targets[t.name].reshape(-1, channels).T for t in tasks])  # (N, C, B)
        wanted = wanted.index_select(0, which)
        return masked_elementwise(loss, out.unflatten(0, (-1, channels)), wanted).sum(1)  # (P, B)
