"""Branches as low-rank updates of frozen stages that all branches share (LoRA, Hu et al. 2022).

A branch has a low-rank update for each target layer: `W x` becomes `W x + (alpha / rank) · B A x`. The weights W
are in memory once, whatever the number of branches. One pass computes any number of branches: their samples are
rows of one product with W, and their updates are one batched product.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmtg_core.data_checks import check_counts
from dmtg_core.names import listed
from dmtg_core.network.frozen import Frozen

ALL = "all"
LARGEST_RANK = 4096
TOLERANCE = 1e-3  # of features of one pass, relative to those of branches one after the other
PASS = threading.RLock()  # the updates of a pass are attributes of stages that threads of a server share


@dataclass(frozen=True)
class AdapterOptions:
    """The low-rank updates of a branch.

    Args:
        rank: Rank of an update; 0 for branches without updates, whose heads alone are trained.
        alpha: The updates are scaled by alpha / rank.
        dropout: Share of the inputs of an update that are dropped during training.
        targets: "all" for all linear layers and 1×1 convolutions, or the ends of the names of layers, as PEFT's
            `target_modules`: "query" is each layer whose name is, or ends in, ".query". `nn.MultiheadAttention`
            has no linear layers of its own.
        norms: Whether a branch has its own layer norms.

    Raises:
        ValueError: For a number out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL
    norms: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank:
            check_counts({"rank": self.rank})
        if self.rank > LARGEST_RANK:
            raise ValueError(f"rank must be at most {LARGEST_RANK}, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> AdapterOptions:
        """Read the options of a configuration.

        Raises:
            ValueError: For an unknown option, and as the class.
        """
        unknown = sorted(set(values or {}) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"an adapter has no option {unknown[0]!r}, its options are: {known}")
        return cls(**dict(values or {}))

    def to_dict(self) -> dict[str, Any]:
        """Return the options ready for JSON."""
        values = asdict(self)
        return values | {"targets": self.targets if isinstance(self.targets, str) else list(self.targets)}

    def structure(self) -> str:
        """Describe what the frozen stages depend on."""
        return f"{bool(self.rank)} {self.targets} {self.norms} {self.dropout}"

    def wants(self, name: str) -> bool:
        """Whether the layer of this name is a target."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return any(target in (ALL, name) or name.endswith(f".{target}") for target in targets)


class LowRank(nn.Module):
    """The update of one layer: `a` `(rank, in)` and `b` `(out, rank)`. It is zero at first, as published."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))


class AdaptedLayer(nn.Module):
    """A frozen linear layer or 1×1 convolution, and the updates of the branches of a pass.

    `stacked` is None, or the updates of K branches: `a` `(K, rank, in)` and `b` `(K, out, rank)`, with `scale` as
    the factor of their product. The input has then the samples of all branches, one branch after the other:
    `(K·B, …)`. `name` is the name of the layer in the model of its library.
    """

    stacked: tuple[Tensor, Tensor] | None

    def __init__(self, base: nn.Linear | nn.Conv2d, name: str, dropout: float) -> None:
        super().__init__()
        self.base, self.name = base, name
        self.dropout = nn.Dropout(dropout)
        self.stacked, self.scale = None, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """`(K·B, …, in)` to `(K·B, …, out)`; channels of a convolution are the second axis."""
        out: Tensor = self.base(x)
        if self.stacked is None:
            return out
        if isinstance(self.base, nn.Linear):
            return self._added(out, self.dropout(x))
        moved = self._added(out.movedim(1, -1), self.dropout(x).movedim(1, -1))  # channels last
        return moved.movedim(-1, 1)

    def _added(self, out: Tensor, x: Tensor) -> Tensor:
        assert self.stacked is not None
        a, b = self.stacked
        rows = x.reshape(len(a), -1, x.shape[-1])  # (K, rows, in)
        low = torch.bmm(rows, a.transpose(1, 2))  # (K, rows, rank)
        flat = out.reshape(len(a), -1, out.shape[-1])  # (K, rows, out)
        transposed = b.transpose(1, 2).contiguous()  # (K, rank, out): its gradients are faster products
        return torch.baddbmm(flat, low, transposed, alpha=self.scale).view(out.shape)


class AdaptedNorm(nn.Module):
    """A frozen layer norm, and weights and biases of the branches of a pass, `(K, F)` each."""

    stacked: tuple[Tensor, Tensor] | None

    def __init__(self, base: nn.LayerNorm, name: str) -> None:
        super().__init__()
        self.base, self.name = base, name
        self.stacked, self.scale = None, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """`(K·B, …, F)` to the same."""
        if self.stacked is None:
            out: Tensor = self.base(x)
            return out
        weight, bias = self.stacked
        shape, eps = self.base.normalized_shape, self.base.eps
        if len(weight) == 1:
            return nn.functional.layer_norm(x, shape, weight[0], bias[0], eps)
        normed = nn.functional.layer_norm(x, shape, eps=eps).unflatten(0, (len(weight), -1))  # (K, B, …, F)
        axes = (len(weight), *[1] * (normed.dim() - 2), -1)
        return (normed * weight.view(axes) + bias.view(axes)).flatten(0, 1)


class SharedStages(nn.Module):
    """Frozen stages that all branches share, with the places of their updates.

    A trial finds out whether branches can be computed in one pass. They cannot if a target layer gets another
    tensor than that of the samples, such as the embeddings of relative positions of DeBERTa, which all samples
    share. Branches are then computed one after the other.

    Args:
        stages: The stages after the stem. Their target layers are replaced.
        options: The updates. Branches may have another rank and alpha.
        sample: Output of the stem for a sample.

    Raises:
        ValueError: If the stages compute none of the targets.
    """

    def __init__(self, stages: Sequence[nn.Module], options: AdapterOptions, sample: Any) -> None:
        super().__init__()
        self.options = options
        self.layers = Frozen(*stages)
        self.adapted: list[AdaptedLayer] = []
        self.norms: list[AdaptedNorm] = []
        self.one_pass = True
        if options.rank:
            self._replace(sample)
            self.one_pass = self._try_one_pass(sample)

    def _replace(self, sample: Any) -> None:
        for module in self.layers.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # its fused code would read the weights of the target layers
        computed = _computed(self.layers, sample)
        found = {name: module for name, module in self.layers.named_modules() if module in computed}
        linear = {name: m for name, m in found.items() if isinstance(m, nn.Linear | nn.Conv2d) and _is_linear(m)}
        for name, layer in linear.items():
            if self.options.wants(library_name(layer, name)):
                self.adapted.append(AdaptedLayer(layer, library_name(layer, name), self.options.dropout))
                _set(self.layers, name, self.adapted[-1])
        if not self.adapted:
            names = listed([library_name(layer, name) for name, layer in linear.items()] or ["none"], 6)
            raise ValueError(f"no layer is a target {self.options.targets!r}; the linear layers are {names}")
        norms = {n: m for n, m in found.items() if isinstance(m, nn.LayerNorm) and m.bias is not None}
        norms = norms if self.options.norms else {}
        if self.options.norms and not norms:
            raise ValueError("norms is set, but the stages have no layer norm with a weight and a bias")
        for name, norm in norms.items():
            self.norms.append(AdaptedNorm(norm, library_name(norm, name)))
            _set(self.layers, name, self.norms[-1])

    @torch.no_grad()
    def _try_one_pass(self, sample: Any) -> bool:
        """Whether two branches have the same features in one pass and one after the other."""
        self.eval()  # without the dropout of updates
        generator, branches = torch.Generator().manual_seed(0), []
        for _ in range(2):
            branch = AdapterBranch(self, self.options)
            branch.scale = 1.0
            for parameter in branch.parameters():  # an update about as large as the product with the weights
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
            branches.append(branch)
        try:
            found, expected = self._pass(sample, branches), [branch(sample) for branch in branches]
        except (RuntimeError, ValueError):  # the rows of a tensor are no multiple of the number of branches
            return False
        finally:
            self.train()
        differences = [
            float((mine - other).norm() / other.norm()) for mine, other in zip(found, expected, strict=True)
        ]
        return max(differences) <= TOLERANCE

    def train(self, mode: bool = True) -> SharedStages:
        """Set the mode. The stages stay in evaluation mode, except for the dropout of the updates."""
        super().train(mode)
        for layer in self.adapted:
            layer.dropout.train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedStages:
        """Return the stages themselves, as `Frozen`."""
        return self

    def forward(self, shared: Any, branches: Sequence[AdapterBranch]) -> list[Tensor]:
        """Compute the features of branches.

        Args:
            shared: Output of the stem for B samples.
            branches: K branches.

        Returns:
            The features of each branch.
        """
        if self.one_pass:
            return self._pass(shared, branches)
        return [features for branch in branches for features in self._pass(shared, [branch])]

    def _pass(self, shared: Any, branches: Sequence[AdapterBranch]) -> list[Tensor]:
        """The features of branches, in one pass."""
        places: list[AdaptedLayer | AdaptedNorm] = [*self.adapted, *self.norms]
        pairs = list(zip(*(branch.pairs() for branch in branches), strict=True))
        with nullcontext() if torch.compiler.is_compiling() else PASS:
            for place, held in zip(places, pairs, strict=True):
                place.stacked, place.scale = _stacked(held), branches[0].scale
            try:
                out: Tensor = self.layers(repeated(shared, len(branches)))
            finally:
                for place in places:
                    place.stacked = None
        return list(out.unflatten(0, (len(branches), -1)).unbind())


class AdapterBranch(nn.Module):
    """The updates of one branch. Its stages are those of the network and none of its parameters."""

    def __init__(self, stages: SharedStages, options: AdapterOptions) -> None:
        super().__init__()
        self.rank, self.scale = options.rank, options.alpha / max(options.rank, 1)
        self.updates = nn.ModuleList([LowRank(*_sizes(layer.base), options.rank) for layer in stages.adapted])
        self.norms = nn.ModuleList([_trainable(norm.base) for norm in stages.norms])
        self.attach(stages)

    def attach(self, stages: SharedStages) -> None:
        """Use these stages."""
        self._stages = (stages,)  # in a tuple, so that they are not registered here

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return both tensors of each target layer, then those of each layer norm."""
        updates = ((layer.a, layer.b) for layer in cast("Iterable[LowRank]", self.updates))
        norms = ((norm.weight, norm.bias) for norm in cast("Iterable[nn.LayerNorm]", self.norms))
        return [*updates, *norms]

    def forward(self, shared: Any) -> Tensor:
        """Compute the features of this branch from the output of the stem."""
        features: Tensor
        (features,) = self._stages[0](shared, [self])
        return features


def merged_state(stages: SharedStages, branch: AdapterBranch) -> dict[str, Tensor]:
    """Return the state of the stages as they were before `SharedStages`, with the updates of a branch added."""
    state = dict(stages.layers.state_dict())
    pairs = dict(zip([*stages.adapted, *stages.norms], branch.pairs(), strict=True))
    for path, place in stages.layers.named_modules():
        if not isinstance(place, AdaptedLayer | AdaptedNorm):
            continue
        held = {key: state.pop(f"{path}.base.{key}") for key in place.base.state_dict()}
        first, second = pairs[place]
        if isinstance(place, AdaptedLayer):
            held["weight"] = held["weight"] + branch.scale * (second @ first).view_as(held["weight"])
        else:
            held |= dict(zip(("weight", "bias"), (first, second), strict=True))
        state |= {f"{path}.{key}": tensor.detach() for key, tensor in held.items()}
    return state


@torch.no_grad()
def _computed(stages: nn.Module, sample: Any) -> set[nn.Module]:
    """The modules whose forward runs. Others may have their weights read, and an update would have no effect."""
    computed: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda module, *_: computed.add(module)) for m in stages.modules()]
    stages(sample)
    for hook in hooks:
        hook.remove()
    return computed


def library_name(layer: nn.Module, name: str) -> str:
    """Return the name of a layer in the model of its library, or `name` for a layer of our own."""
    return str(getattr(layer, "library_name", name))


def repeated(shared: Any, times: int) -> Any:
    """Return the output of a stem with its samples repeated: `(B, …)` to `(times · B, …)`."""
    if times == 1:
        return shared
    if isinstance(shared, tuple):
        return tuple(repeated(part, times) for part in shared)
    return shared.repeat(times, *[1] * (shared.dim() - 1))


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0][0].unsqueeze(0), pairs[0][1].unsqueeze(0)
    first, second = zip(*pairs, strict=True)
    return torch.stack(first), torch.stack(second)


def _is_linear(layer: nn.Linear | nn.Conv2d) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
    return type(layer) is nn.Linear


def _sizes(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _trainable(norm: nn.LayerNorm) -> nn.LayerNorm:
    """A copy of a frozen norm that is trained."""
    copied = nn.LayerNorm(norm.normalized_shape, norm.eps)
    copied.load_state_dict(norm.state_dict())
    return copied


def _set(parent: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(parent.get_submodule(owner), attribute, layer)
