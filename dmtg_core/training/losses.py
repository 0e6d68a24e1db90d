"""Losses as sums over the labels of each sample, for all live heads at once.

All functions return a sum for each sample. The caller divides by the number of labels in the global batch. Missing
labels (see `dmtg_core.tasks`) do not change sums or counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmtg_core.addresses import is_address
from dmtg_core.loss_options import LossOptions
from dmtg_core.network.grouping_network import PairOutputs
from dmtg_core.own_code import labelled, own_loss
from dmtg_core.tasks import Task
from dmtg_core.training.objective.label_losses import NO_OPTIONS, WITH_OPTIONS, class_loss

# (output, target) → error of each element; targets have no NaN. `WITH_OPTIONS` has the losses with options.
_ELEMENTWISE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
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
    alike: dict[Hashable, list[int]] = {}  # tasks whose labels are counted together
    for n, task in enumerate(tasks):
        target = targets[task.name]
        missing = task.ignore_index if task.classes else task.loss == "l1_shift"
        probabilities = task.classes and target.is_floating_point()  # have their classes on the second axis
        alone = probabilities or is_address(task.loss)
        alike.setdefault(n if alone else (task.classes, missing, target.dtype, target.shape), []).append(n)
    counts: list[Tensor] = [torch.empty(0)] * len(tasks)
    for members in alike.values():
        found = [targets[tasks[n].name] for n in members]
        if len(members) == 1:
            counts[members[0]] = label_count(tasks[members[0]], found[0])
            continue
        task, stacked = tasks[members[0]], torch.stack(found)
        known = _interior(task, valid(task, stacked)).sum(tuple(range(1, stacked.dim())))
        for n, count in zip(members, known.unbind(), strict=True):
            counts[n] = count
    return torch.stack(counts).float()


def label_count(task: Task, target: Tensor) -> Tensor:
    """Count the labels of one task in a batch, int64 `()`: samples for a loss of the user."""
    if is_address(task.loss):
        return labelled(task, target).sum()
    return _interior(task, valid(task, target)).sum()


def _interior(task: Task, mask: Tensor) -> Tensor:
    return mask[..., 1:-1, 1:-1] if task.loss == "l1_shift" else mask


def masked_elementwise(
    loss: str, output: Tensor, target: Tensor, options: LossOptions = NO_OPTIONS, weight: Tensor | None = None
) -> Tensor:
    """Compute the error of each element; 0 if the target is NaN. Shapes broadcast.

    Args:
        loss, output, target: Name of a loss, and what it compares.
        options: Options of the loss. Its weights are not used.
        weight: Factor of positive labels.
    """
    known = ~target.isnan()
    filled = target.masked_fill(~known, 0.0).expand_as(output)
    if loss in WITH_OPTIONS:
        return WITH_OPTIONS[loss](output, filled, options, weight) * known
    return _ELEMENTWISE[loss](output, filled) * known


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
    return _shifted(output, target, torch.zeros(output.shape[1], dtype=torch.int64, device=output.device), 1)[:, 0]


def _shifted(output: Tensor, target: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Compute `shifted_l1` of several outputs whose channels are concatenated, `(B, P)`.

    Args:
        output, target: `(B, S, H, W)`.
        owner: Output to which each channel belongs, `(S,)`.
        owners: P.
    """
    with torch.no_grad():
        inner = target[:, :, 1:-1, 1:-1]
        height, width = inner.shape[2:]
        known = (~inner.isnan()).to(output.dtype)
        negative = -inner.nan_to_num(0.0, torch.inf, -torch.inf)  # an infinite label stays: the step is refused
        errors = []
        for y in range(3):
            lines = output[:, :, y : y + height]
            windows = (lines[..., x : x + width] for x in range(3))
            errors += [
                torch.linalg.vector_norm(torch.addcmul(negative, window, known), 1, (2, 3)) for window in windows
            ]
        best = _by_owner(torch.stack(errors), owner, owners).argmin(0)[:, owner]  # (B, S)
        # the target is shifted, not the output: the backward pass has a single difference
        moved = _moved(inner, best // 3, best % 3)
    return _by_owner(torch.linalg.vector_norm(_known(output - moved, moved), 1, (2, 3)), owner, owners)


def _known(error: Tensor, target: Tensor) -> Tensor:
    return error.masked_fill(target.isnan(), 0.0)


def _by_owner(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Sum the values of each owner's channels, `(…, S)` to `(…, P)`."""
    if len(owner) == owners:
        return values
    return values.new_zeros(*values.shape[:-1], owners).index_add(values.dim() - 1, owner, values)


def _moved(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Place each map of `(B, S, H, W)` at `row`, `column` `(B, S)` in a map of NaN that is two pixels larger."""
    batch, maps, height, width = image.shape
    padded = F.pad(image, (2, 2, 2, 2), value=torch.nan)
    here, device = torch.arange(batch, device=image.device).view(-1, 1, 1, 1), image.device
    channel = torch.arange(maps, device=device).view(-1, 1, 1)
    rows = torch.arange(2, height + 4, device=device).view(-1, 1) - row.view(batch, maps, 1, 1)  # (B, S, H + 2, 1)
    columns = torch.arange(2, width + 4, device=device) - column.view(batch, maps, 1, 1)  # (B, S, 1, W + 2)
    return padded[here, channel, rows, columns]


def dense_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss sum of each sample, `(B,)`, of a dense output `(B, C, H, W)`."""
    output = _full(output)
    if is_address(task.loss):
        return own_or_soft(task, output, target)
    if task.loss == "l1_shift":
        return shifted_l1(output, target)
    return _by_label(task, output, target, _weights_like(task, output)).flatten(1).sum(1)


def _full(output: Tensor) -> Tensor:
    """Convert an output to float32. Keep float64."""
    return output if output.dtype == torch.float64 else output.float()


def sample_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss sum of each sample, `(B,)`, of an output of `GroupingNetwork.forward`."""
    if task.dense:
        return dense_loss(task, output, target)
    output = _full(output)
    if is_address(task.loss):
        return own_or_soft(task, output, target)
    return _by_label(task, output, target, _weights_like(task, output)).reshape(len(target), -1).sum(1)


def own_or_soft(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of the user for each sample, `(B,)`. Class probabilities have the cross-entropy instead."""
    if task.classes and target.is_floating_point():
        return class_loss("cross_entropy", output, target).reshape(len(target), -1).mean(1)
    return own_loss(task, output, target)


def _by_label(task: Task, output: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Compute the loss of each label. Targets are class ids or complete class probabilities `(B, C, …)`."""
    if not task.classes:
        return masked_elementwise(task.loss, output, target, task.loss_options, weights)
    return class_loss(
        task.loss, output, target, task.loss_options, weights=weights, ignore_index=task.ignore_index
    )


def _weights(*tasks: Task) -> Tensor | None:
    """The weights of classes of tasks that all have them or none, `(N, C)`, or `(N, 1)` of positive labels."""
    if not tasks[0].loss_options.weighted:
        return None
    return torch.tensor([task.loss_options.weights(task.name, task.channels) for task in tasks])


def _weights_like(task: Task, output: Tensor) -> Tensor | None:
    weights = _weights(task)
    return None if weights is None else weights[0].to(output)


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
        families: dict[tuple[str, int, LossOptions, bool], list[tuple[int, int, int]]] = {}
        row = 0
        for place, (_, n) in enumerate(pairs):
            if not tasks[n].dense:
                task = tasks[n]
                options = task.loss_options
                family = (task.loss, task.channels, options.unweighted, options.weighted)
                families.setdefault(family, []).append((place, row, n))
                row += task.channels
        self.families = [(loss, channels) for loss, channels, *_ in families]
        self.options = [options for _, _, options, _ in families]
        places: list[int] = []
        for number, ((_, channels, *_), members) in enumerate(families.items()):
            places += [place for place, _, _ in members]
            rows = torch.tensor([[first + c for c in range(channels)] for _, first, _ in members])
            self.register_buffer(f"rows_{number}", rows.flatten(), persistent=False)
            unique = sorted({n for _, _, n in members})
            self.register_buffer(f"weights_{number}", _weights(*(tasks[n] for n in unique)), persistent=False)
            self.register_buffer(
                f"target_{number}", torch.tensor([unique.index(n) for _, _, n in members]), persistent=False
            )
        self.members = [sorted({n for _, _, n in members}) for members in families.values()]
        self.own = [[n for _, _, n in members] for members in families.values()]  # task of each pair
        self.dense = DenseLosses(
            tasks, [(place, pair) for place, pair in enumerate(pairs) if tasks[pair[1]].dense]
        )
        places += self.dense.places
        # families are computed one after the other; this is the order of the pairs
        order = torch.tensor(places).argsort()
        self.in_order: list[int] = order.tolist()
        self.register_buffer("order", order, persistent=False)

    def forward(self, outputs: PairOutputs, targets: Mapping[str, Tensor]) -> Tensor:
        """Compute loss sums `(P, B)` in the order of the pairs. Divide them by `label_counts`."""
        parts = [*self._families(outputs, targets), *self.dense(outputs.dense, targets)]
        return torch.cat(parts).index_select(0, self.get_buffer("order"))

    def separate(self, outputs: PairOutputs, targets: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute the rows of `forward` as tensors `(B,)`. The backward pass of a row uses only its decoder."""
        rows = [row for part in self._families(outputs, targets) for row in part.unbind()]
        rows += [
            dense_loss(self.tasks[n], outputs.dense[k, n], targets[self.tasks[n].name])
            for k, n in self.dense.pairs
        ]
        return [rows[place] for place in self.in_order]

    def _families(self, outputs: PairOutputs, targets: Mapping[str, Tensor]) -> list[Tensor]:
        """Loss sums `(P, B)` of each family. The loss of an encoder with members is the mean of their losses."""
        members, numbers = outputs.members, range(len(self.families))
        if not members:
            return [self._family(number, outputs.rows.float(), targets) for number in numbers]
        rows = outputs.rows.float()
        repeated = {name: target.repeat_interleave(members, 0) for name, target in targets.items()}
        return [self._family(number, rows, repeated).unflatten(1, (-1, members)).mean(2) for number in numbers]

    def _family(self, number: int, rows: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        (loss, channels), options = self.families[number], self.options[number]
        tasks = [self.tasks[n] for n in self.members[number]]
        which = self.get_buffer(f"target_{number}")
        out = rows.index_select(0, self.get_buffer(f"rows_{number}"))  # (P·C, B)
        out = out.unflatten(0, (-1, channels))  # (P, C, B)
        if is_address(loss):
            return _own_rows([self.tasks[n] for n in self.own[number]], out, targets)
        held: Tensor | None = getattr(self, f"weights_{number}")
        weights = None if held is None else held.index_select(0, which)  # (P, C)
        if tasks[0].classes and targets[tasks[0].name].is_floating_point():
            stacked = torch.stack([targets[t.name].T for t in tasks])  # (N, C, B)
            return class_loss(loss, out, stacked.index_select(0, which), options, weights=weights)
        if tasks[0].classes:
            stacked = torch.stack([targets[t.name].masked_fill(~valid(t, targets[t.name]), -1) for t in tasks])
            return class_loss(loss, out, stacked.index_select(0, which), options, weights=weights)  # (P, B)
        wanted = torch.stack([targets[t.name].reshape(-1, channels).T for t in tasks])  # (N, C, B)
        weight = None if weights is None else weights.unsqueeze(2)
        return masked_elementwise(loss, out, wanted.index_select(0, which), options, weight).sum(1)  # (P, B)


def _own_rows(tasks: Sequence[Task], outputs: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """Compute the loss sums of the user `(P, B)`, of outputs `(P, C, B)` of the tasks `(P,)`."""
    each = []
    for task, output in zip(tasks, outputs, strict=True):
        plain = output.T if task.channels > 1 else output[0]  # (B, C) or (B,)
        each.append(own_or_soft(task, plain, targets[task.name]))
    return torch.stack(each)


class DenseLosses(nn.Module):
    """The losses of the dense pairs, computed together for equal losses.

    Args:
        tasks: The N tasks.
        pairs: (place among all pairs, pair) of each dense pair.

    Attributes:
        pairs, places: The dense pairs and their places, family by family, as in the output.
    """

    def __init__(self, tasks: Sequence[Task], pairs: Sequence[tuple[int, tuple[int, int]]]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        families: dict[tuple[str, int, int | None, LossOptions], list[tuple[int, tuple[int, int]]]] = {}
        for place, pair in pairs:
            task = tasks[pair[1]]
            size = (task.channels, task.ignore_index) if task.classes else (0, None)
            families.setdefault((task.loss, *size, task.loss_options), []).append((place, pair))
        self.families = [(loss, [pair for _, pair in members]) for (loss, *_), members in families.items()]
        self.pairs = [pair for _, members in self.families for pair in members]
        self.places = [place for members in families.values() for place, _ in members]
        for number, (_, members) in enumerate(self.families):
            owner = [p for p, (_, n) in enumerate(members) for _ in range(tasks[n].channels)]
            self.register_buffer(f"owner_{number}", torch.tensor(owner), persistent=False)
            weights = _weights(tasks[members[0][1]])
            self.register_buffer(f"weights_{number}", None if weights is None else weights[0], persistent=False)

    def forward(self, outputs: Mapping[tuple[int, int], Tensor], targets: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute the loss sums `(P, B)` of each family."""
        parts = []
        for number, (loss, members) in enumerate(self.families):
            found = [outputs[pair] for pair in members]
            wanted = [targets[self.tasks[n].name] for _, n in members]
            task = self.tasks[members[0][1]]
            if is_address(loss):
                own = [dense_loss(self.tasks[n], outputs[k, n], targets[self.tasks[n].name]) for k, n in members]
                parts.append(torch.stack(own))
            elif task.classes:
                output, target = _full(_joined(found, 0)), _joined(wanted, 0)
                weights: Tensor | None = getattr(self, f"weights_{number}")
                each = _by_label(task, output, target, weights)  # (P·B, H, W)
                parts.append(each.flatten(1).sum(1).unflatten(0, (len(members), -1)))
            else:
                owner = self.get_buffer(f"owner_{number}")
                output, target = _full(_joined(found, 1)), _joined(wanted, 1)
                parts.append(_values(loss, task.loss_options, output, target, owner, len(members)).T)
        return parts


def _values(loss: str, options: LossOptions, output: Tensor, target: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Compute the loss sums of several dense outputs of values, `(B, P)`. See `_shifted`."""
    if loss == "l1_shift":
        return _shifted(output, target, owner, owners)
    return _by_owner(masked_elementwise(loss, output, target, options).sum((2, 3)), owner, owners)


def _joined(tensors: list[Tensor], axis: int) -> Tensor:
    return torch.cat(tensors, axis) if len(tensors) > 1 else tensors[0]
