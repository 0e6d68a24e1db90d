"""Cost of inference and of training for one sample: operations and parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dmtg_core.grouping import Grouping
from dmtg_core.input_spec import InputSpec
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel, clone
from dmtg_core.network.spec import NetworkSpec

FORMULAS = {str(packet): formula for packet, formula in flop_registry.items()}  # "aten.mm" → operations


@dataclass(frozen=True)
class Cost:
    """The cost of inference.

    Args:
        flops: Floating point operations for one sample. A multiply-add counts as two. Matrix products,
            convolutions and attention are counted. Elementwise operations (ReLU, normalisation, pooling) are not.
        parameters: Number of weights in use, without the gate and running statistics.
    """

    flops: int
    parameters: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.parameters + other.parameters)


def inference_cost(network: GroupingNetwork | GroupModel | Mapping[str, GroupModel]) -> Cost:
    """Return the cost of inference for one sample.

    Args:
        network: A grouping network, the model of one group, or the models of all groups. A grouping network is
            counted as a hard network: the stem once, and for each task its likeliest branch. Models of groups have
            a stem each.
    """
    if isinstance(network, Mapping):
        return sum((inference_cost(model) for model in network.values()), Cost(0, 0))
    if isinstance(network, GroupModel):
        return inference_cost(network.network)
    hard = clone(network)
    hard.keep(hard.gate.survivors(2.0))
    parts = [
        part for part in (hard.stem, hard.shared, hard.branches, hard.bank, hard.decoders) if part is not None
    ]
    parameters = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return Cost(_flops(hard.eval(), hard.spec.input, hard.gate.logits.device), parameters)


def grouping_cost(spec: NetworkSpec, grouping: Grouping, *, share_stem: bool = True) -> Cost:
    """Return the inference cost of a grouping with the networks of `spec`. Nothing is trained.

    Args:
        spec: The network. Its number of groups is ignored.
        grouping: The partition of the tasks.
        share_stem: Whether the stem is computed once for all groups. False if each group has its own stem.
    """
    network = GroupingNetwork(replace(spec.without_weights(), groups=len(grouping.groups), sampling="fixed"))
    network.keep_grouping(grouping)
    return inference_cost(network if share_stem else network.specialise())


def training_flops(network: GroupingNetwork) -> int:
    """Operations of a training step for one sample: three times a forward pass through all live heads.

    For each product of the forward pass, the backward pass computes two: one for the weights, one for the inputs.
    A frozen layer has no product for its weights, and a frozen stem has no backward pass.
    """
    was_training, device, spec = network.training, network.gate.logits.device, network.spec.input
    network.eval()
    flops = 3 * _flops(network, spec, device, network.forward_pairs)
    if network.frozen:
        stem = _flops(network, spec, device, lambda raw: network.stem(network.normalise(raw)))
        flops -= 2 * stem
        if network.shared is not None:
            bare = _flops(network, spec, device, lambda raw: _without_updates(network, raw)) - stem
            flops -= len(network.branches) * bare * (1 if network.shared.adapted else 2)
    network.train(was_training)
    return flops


def _without_updates(network: GroupingNetwork, raw: Tensor) -> None:
    assert network.shared is not None
    network.shared.layers(network.stem(network.normalise(raw)))


def history_flops(spec: NetworkSpec, history: Sequence[Mapping[str, Any]]) -> int:
    """Sum of `training_flops` over epochs, each with the heads that were live in it.

    Args:
        spec: The network.
        history: One record for each epoch. Its `probabilities` `(N, K)` are above 0 where a head is live.
    """
    shapes = Counter(tuple(tuple(p > 0 for p in row) for row in record["probabilities"]) for record in history)
    return sum(epochs * flops_of_heads(spec, alive) for alive, epochs in shapes.items())


def flops_of_heads(spec: NetworkSpec, alive: Sequence[Sequence[bool]]) -> int:
    """Return `training_flops` of a network with these heads `(N, K)`."""
    network = GroupingNetwork(spec.without_weights())
    network.keep(torch.tensor(alive))
    return training_flops(network)


def naive_flops(spec: NetworkSpec) -> int:
    """`training_flops` of naive MTL: one branch for all tasks."""
    return training_flops(GroupingNetwork(replace(spec.without_weights(), groups=1, sampling="fixed")))


def wide_spec(spec: NetworkSpec, times: float = 1.0) -> NetworkSpec:
    """Return a spec of one wide branch for all tasks with the inference cost of all K branches.

    For branches that are low-rank updates it has the trained parameters of all K branches: K times the rank.

    Args:
        spec: The network with K branches.
        times: Factor of the inference cost.

    Raises:
        ValueError: For an encoder whose widths are fixed.
    """
    names = [task.name for task in spec.tasks]
    groups = min(spec.groups, len(names))
    if spec.encoder.branch == "lora":
        return replace(spec, groups=1, sampling="fixed", encoder=spec.encoder.widened(groups * times))
    spread = Grouping.from_assignment(names, [n % groups for n in range(len(names))])
    return widened_to(spec, int(times * grouping_cost(spec, spread).flops))


def widened_to(spec: NetworkSpec, flops: int) -> NetworkSpec:
    """Return a spec of one branch for all tasks, as wide as possible with at most `flops` operations for a sample.

    The branch is never narrower than that of `spec`.

    Raises:
        ValueError: For an encoder whose widths are fixed.
    """

    def one(factor: float) -> NetworkSpec:
        return replace(spec, groups=1, sampling="fixed", encoder=spec.encoder.widened(factor))

    everything = Grouping.of([[task.name for task in spec.tasks]])
    low, high = 1.0, 2.0
    while grouping_cost(one(high), everything).flops <= flops:
        low, high = high, 2 * high
    for _ in range(8):  # widths are integers: more steps change nothing
        middle = (low + high) / 2
        low, high = (middle, high) if grouping_cost(one(middle), everything).flops <= flops else (low, middle)
    return one(low)


@torch.no_grad()
def _flops(
    network: nn.Module, spec: InputSpec, device: torch.device, call: Callable[[Tensor], object] | None = None
) -> int:
    value = (spec.padding + 1) % spec.vocabulary if spec.kind == "tokens" else 0  # a text of full length
    sample = torch.full((1, *spec.shape), value, dtype=getattr(torch, spec.dtype), device=device)
    counter = _Counter()
    with plain_attention(), counter:
        (call or network)(sample)
    return counter.flops


class _CountedDispatch:
    """Counts the operations of each call with the formulas of torch's `FlopCounterMode`."""

    flops = 0

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        formula = FORMULAS.get(str(func).rpartition(".")[0])  # without the name of the overload
        result = func(*args, **options)
        if formula is not None:
            self.flops += formula(*args, **options, out_val=result)
        return result


class _Counter(_CountedDispatch, TorchDispatchMode):
    """A mode that counts. torch wraps a method in the body of a mode so that it imports torch's compiler."""


@contextmanager
def plain_attention() -> Iterator[None]:
    """Disable the fused layers of `nn.MultiheadAttention`, whose operations the counter does not see."""
    held = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(held)
