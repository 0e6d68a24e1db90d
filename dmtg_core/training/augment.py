"""Augmentations: random changes of inputs and labels of a training batch, computed on the training device.

Evaluation does not use them. The seeds of all random changes of a step are here and in `step_noise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dmtg_core.tasks import Task
from dmtg_core.training.data import Batch

Augmentation = Callable[[Batch, Sequence[Task], torch.Generator], Batch]


def flip(batch: Batch, tasks: Sequence[Task], generator: torch.Generator) -> Batch:
    """Mirror each sample left to right with probability 1/2, like the Taskonomy reader of Gao et al. 2024.

    Dense targets are mirrored with the image and multiplied by `Task.flip`. Other targets do not change.

    Args:
        batch: Stored images `(B, H, W, C)` and encoded targets. It is not changed.
        tasks: The tasks of the targets.
        generator: Generator of the B draws. It is on the CPU, so that they are equal on any device.

    Raises:
        ValueError: If the input is not an image.
    """
    if batch.inputs.dim() != 4:
        raise ValueError(
            f"augmentation flip needs images (B, H, W, C), got input of shape {tuple(batch.inputs.shape)}: "
            "train without it"
        )
    chosen = torch.rand(len(batch.inputs), generator=generator) < 0.5
    chosen = chosen.to(batch.inputs.device, non_blocking=True)
    targets = dict(batch.targets)
    for task in tasks:
        if task.dense:
            target = targets[task.name]
            targets[task.name] = _choose(chosen, _mirrored(task, target), target)
    return Batch(_choose(chosen, batch.inputs.flip(2), batch.inputs), targets)


def _mirrored(task: Task, target: Tensor) -> Tensor:
    """Mirror `(B, H, W)` ids or `(B, C, H, W)` values. Missing labels stay missing."""
    mirrored = target.flip(-1)
    for channel, factor in enumerate(task.flip):
        mirrored[:, channel] *= factor  # a Python number: a tensor would have to be copied to the device
    return mirrored


def _choose(chosen: Tensor, changed: Tensor, kept: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (kept.dim() - 1)), changed, kept)


AUGMENTATIONS: Mapping[str, Augmentation] = {"flip": flip}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def augment_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """Return the generator of a worker's step. It depends only on the arguments.

    Each step has 4099 seeds. `step_noise` uses the first half, for the gate, and this function the second half.
    """
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 4099 + 2050 + rank) % 2**63)


@contextmanager
def seeded_dropout(
    network: nn.Module, seed: int, rank: int, device: torch.device
) -> Iterator[Callable[[int], object]]:
    """Yield a function that seeds the dropout of a worker's step, given the number of the step.

    Layers of torch draw from the global random state, which a resumed run does not have. The seeds are none of
    those of `augment_generator`. The random state of the caller does not change. Without dropout nothing is done.
    """
    if not any(isinstance(layer, DROPOUTS) and layer.p > 0 for layer in network.modules()):
        yield lambda _step: None
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield lambda step: torch.manual_seed(((seed * 1_000_003 + step) * 4099 + 4098 - rank) % 2**63)


def augment(batch: Batch, tasks: Sequence[Task], names: Sequence[str], generator: torch.Generator) -> Batch:
    """Apply the named augmentations in their order. The host does not wait for the device.

    Args:
        batch: Stored input `(B, …)` and encoded targets. It is not changed.
        tasks: The tasks of the targets.
        names: Keys of `AUGMENTATIONS`. Without names the batch itself is returned.
        generator: Generator of all draws.

    Raises:
        ValueError: If an augmentation does not fit the input.
    """
    for name in names:
        batch = AUGMENTATIONS[name](batch, tasks, generator)
    return batch
