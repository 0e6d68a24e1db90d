"""`GroupingNetwork` (stem → K branches → K·N heads with a gate) and `GroupModel`, the network of one group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmtg_core.grouping import Grouping
from dmtg_core.network.adapters import AdapterBranch, SharedStages
from dmtg_core.network.batched.branches import BatchedBranches
from dmtg_core.network.decoders import DECODERS
from dmtg_core.network.encoders import build_encoder, frozen_once, lengths, seeded
from dmtg_core.network.frozen import Frozen, digest
from dmtg_core.network.gate import GroupGate
from dmtg_core.network.heads import HeadBank
from dmtg_core.network.inputs import Normalise, scaled
from dmtg_core.network.members import average
from dmtg_core.network.numbered import Numbered
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.network.trunk import is_stored_output, restored_output, stored_ids, to_store

Pair = tuple[int, int]  # (branch, task)


@dataclass(frozen=True)
class PairOutputs:
    """Outputs of all live heads.

    Args:
        rows: Outputs of the head bank, `(M, B)`; for an encoder with members `(M, B · members)`, sample by sample.
        dense: Dense pair → `(B, C, H, W)`.
        members: Number of weight-sharing members of the encoder; 0 for an encoder without members.
    """

    rows: Tensor
    dense: dict[Pair, Tensor]
    members: int = 0


class GroupingNetwork(nn.Module):
    """Shared stem, K branches, and on each branch a head for each task that is live there.

    `forward` computes the hard network: each task with its likeliest branch. `forward_pairs` computes all live
    heads. Training weights their losses with the gate.

    If `recompute` is set, the activations inside stem, branches and decoders are not stored but computed again in
    the backward pass (Chen et al. 2016). A step of K branches then needs about the memory of one branch. Set
    `cuda_graphs` if parts are compiled with CUDA graphs (`mode="reduce-overhead"`). If `batched` is set,
    training computes all branches in one pass. It is None again after a branch is removed. Branches that are
    low-rank updates (`EncoderSpec.branch` "lora") are computed in one pass if `one_pass` is set. Texts of similar
    length are computed together if `by_length` is set, see `encoders.lengths`.

    Args:
        spec: See `NetworkSpec`.

    Raises:
        ValueError: If two parts do not fit each other. The message names both.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tasks = spec.tasks
        self.recompute = False
        self.cuda_graphs = False
        self.batched: BatchedBranches | None = None
        self.one_pass = True
        self.by_length = spec.encoder.name in lengths.ENCODERS
        weighs = spec.task_weighting == "uncertainty"
        self.log_variance = nn.Parameter(torch.zeros(len(spec.tasks))) if weighs else None
        generator = torch.Generator().manual_seed(spec.seed)
        self.gate = GroupGate(
            len(spec.tasks), spec.groups, sampling=spec.sampling, initial=spec.initial,
            scale=spec.initial_scale, generator=generator,
        )  # fmt: skip
        self.normalise = Normalise(spec.input)
        self.stem, branches, features, self.shared = build_encoder(
            spec.encoder, spec.input, spec.groups, spec.seed
        )
        self.branches = Numbered(dict(enumerate(branches)))
        if spec.encoder.frozen and spec.encoder.pretrained:
            self.frozen_once()
        self.members = features.members
        dense = [task for task in spec.tasks if task.dense]
        if dense and not features.stride:
            raise ValueError(
                f"task {dense[0].name!r} is dense, but encoder {spec.encoder.name} has no feature map"
            )
        with seeded(spec.seed + 1):
            self.bank = HeadBank([t for t in spec.tasks if not t.dense], features.channels, spec.groups)
            self.decoders: Numbered[Pair, nn.Module] = Numbered(
                {
                    (k, n): DECODERS[spec.decoder](
                        features.channels, task.channels, features.stride, spec.decoder_width
                    )
                    for k in range(spec.groups)
                    for n, task in enumerate(spec.tasks)
                    if task.dense
                }
            )
        if spec.input.kind == "image":
            # images are stored channels last: weights in another format would be converted in each step
            self.to(memory_format=torch.channels_last)

    @property
    def pairs(self) -> list[Pair]:
        """The live pairs (branch, task): first those of the head bank in its order, then the dense pairs."""
        number = {task: n for n, task in enumerate(self.tasks)}
        bank = [(k, number[task]) for k, kept in self.bank.kept.items() for task in kept]
        return bank + list(self.decoders)

    @property
    def frozen(self) -> list[nn.Module]:
        """The parts whose weights training does not change."""
        return [part for part in (self.stem, self.shared) if isinstance(part, Frozen | SharedStages)]

    @cached_property
    def frozen_digest(self) -> str:
        """`digest` of the frozen parts; empty without any."""
        return digest(self.frozen) if self.frozen else ""

    @property
    def running(self) -> list[nn.Module]:
        """The parts whose running statistics training changes."""
        parts: list[nn.Module] = [] if isinstance(self.stem, Frozen) else [self.stem]
        return [*parts, self.branches, self.decoders]

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of the outputs of dense tasks."""
        return self.spec.input.shape[:2]

    def output_of_stem(self, raw: Tensor) -> Any:
        """Compute the output of the stem, or return it if the batch has stored outputs (see `trunk`)."""
        if is_stored_output(raw):
            return restored_output(self.stem, raw, text=self.spec.input.kind == "tokens")
        return self._run(self.stem, self.normalise(raw))

    @torch.no_grad()
    def stored_output(self, raw: Tensor) -> Tensor:
        """Compute the output of a frozen stem, ready to be stored and read in place of the input.

        Raises:
            ValueError: If the stem is not frozen.
        """
        if not self.frozen:
            raise ValueError("only the output of a frozen stem can be stored: set branch to last or lora")
        return self.in_parts(lambda part: [to_store(self.stem(part), part)], self.normalise(raw))[0]

    def features(self, raw: Tensor, branches: Iterable[int] | None = None) -> dict[int, Tensor]:
        """Compute the features of the live branches, or of `branches`: `(B, F)` or `(B, F, h, w)`."""
        if self.cuda_graphs:  # they may overwrite outputs of the previous pass, but not outputs of this pass
            torch.compiler.cudagraph_mark_step_begin()  # imports the compiler, which takes seconds
        wanted = list(self.branches) if branches is None else sorted(set(branches))
        batched = self.batched if self.training and branches is None else None
        out = self.in_parts(lambda part: self._features(part, wanted, batched), raw)
        return dict(zip(wanted, out, strict=True))

    def in_parts(self, compute: Callable[[Tensor], Sequence[Tensor]], raw: Tensor) -> list[Tensor]:
        """Compute tensors of samples. With `by_length`, texts of similar length are computed together on a CPU.

        A GPU would wait for the lengths. An input of another shape is refused by `normalise`.
        """
        if not self.by_length or raw.device.type != "cpu" or raw.dim() < 2:
            return list(compute(raw))
        ids = stored_ids(raw) if is_stored_output(raw) else raw
        return lengths.in_parts(compute, raw, ids, self.spec.input.padding)

    def _features(self, raw: Tensor, wanted: list[int], batched: BatchedBranches | None) -> list[Tensor]:
        shared = self.output_of_stem(raw)
        factors = self.spec.gradient_factors
        if factors is not None:
            shared = scaled(shared, factors[1])
        if batched is not None:
            computed = batched(shared)
            out = [computed[k] for k in wanted]
        elif self.shared is not None and self.one_pass:
            out = self._run(self.shared, shared, [self.branches[k] for k in wanted])
        else:
            out = [self._run(self.branches[k], shared) for k in wanted]
        return out if factors is None else [scaled(features, factors[0]) for features in out]

    def _run(self, part: nn.Module, *inputs: Any) -> Any:
        """Compute the output of a part. In training with `recompute`, do not store its activations."""
        if not (self.recompute and self.training and torch.is_grad_enabled()) or isinstance(part, Frozen):
            return part(*inputs)
        return checkpoint(
            part, *inputs, use_reentrant=False, preserve_rng_state=True,
            context_fn=lambda: (nullcontext(), _same_buffers(part)),
        )  # fmt: skip

    def forward_pairs(self, raw: Tensor) -> PairOutputs:
        """Compute all live heads on stored input `(B, …)`."""
        features = self.features(raw)
        rows = self.bank({k: pooled(f) for k, f in features.items()}) if self.bank.kept else raw.new_zeros(0)
        dense = {(k, n): self._run(decoder, features[k], self.size) for (k, n), decoder in self.decoders.items()}
        return PairOutputs(rows, dense, self.members)

    def forward(self, raw: Tensor) -> dict[str, Tensor]:
        """Compute the hard network on stored input.

        Returns:
            Task name → output: `(B,)` for one channel, `(B, C)` for several, `(B, C, H, W)` for a dense task. They
            are logits for classes, and values in network units otherwise.
        """
        assignment = self.gate.assignment()
        features = self.features(raw, assignment)
        return {
            task.name: self.head(assignment[n], n, features[assignment[n]], self.size)
            for n, task in enumerate(self.tasks)
        }

    def head(self, k: int, n: int, features: Tensor, size: Sequence[int]) -> Tensor:
        """Compute the output of task n on branch k, as `forward`.

        Args:
            features: Output of branch k: `(B, F)`, `(B, members, F)` or `(B, F, h, w)`.
            size: Height and width of the output of a dense task.
        """
        task = self.tasks[n]
        if task.dense:
            out: Tensor = self.decoders[k, n](features, size)
            return out
        rows = self.bank.head(k, task, pooled(features))
        return average(task, rows.unflatten(0, (-1, self.members))) if self.members else rows

    def copy_head(self, pair: Pair, source: GroupingNetwork, trained: Pair) -> None:
        """Copy the weights of another network's head of the same shape to the head of `pair`."""
        (k, n), (j, m) = pair, trained
        mine, theirs = self.tasks[n], source.tasks[m]
        if mine.dense:
            self.decoders[k, n].load_state_dict(source.decoders[j, m].state_dict())
            return
        for to, of in ((self.bank.weights, source.bank.weights), (self.bank.biases, source.bank.biases)):
            to[k].data[self.bank.rows(k, mine)].copy_(of[j].detach()[source.bank.rows(j, theirs)])

    def use_frozen(self, source: GroupingNetwork) -> None:
        """Use the frozen parts of another network in place of own ones."""
        self.spec = replace(self.spec, encoder=source.spec.encoder)  # with the source of the weights
        self._use(source.stem, source.shared)

    def frozen_once(self) -> None:
        """Use the frozen parts that this process already has, if it has equal ones."""
        self._use(*frozen_once(self.spec.encoder, self.spec.input, self.stem, self.shared))

    def _use(self, stem: nn.Sequential, shared: SharedStages | None) -> None:
        self.stem, self.shared = stem, shared
        self.__dict__.pop("frozen_digest", None)
        for branch in self.branches.values():
            if isinstance(branch, AdapterBranch) and shared is not None:
                branch.attach(shared)

    def grouping(self) -> Grouping:
        """Return the current grouping of the gate: each task with its likeliest branch."""
        return Grouping.from_assignment([task.name for task in self.tasks], self.gate.assignment())

    def prune(self, threshold: float) -> dict[nn.Parameter, tuple[nn.Parameter, Tensor]]:
        """Remove the heads whose probability is below `threshold`, and branches without a head.

        The likeliest head of a task always stays. A threshold of 0 changes nothing. A threshold above 1 leaves N
        heads.

        Returns:
            As `keep`.
        """
        return self.keep(self.gate.survivors(threshold))

    def keep(self, alive: Tensor) -> dict[nn.Parameter, tuple[nn.Parameter, Tensor]]:
        """Remove all pairs except those of `alive`, bool `(N, K)`.

        Returns:
            For each parameter that lost rows: new parameter → (old parameter, kept rows), so that an optimiser's
            state can be pruned too.

        Raises:
            ValueError: If the shape is wrong, or if a task would have no head.
        """
        if alive.shape != self.gate.alive.shape:
            raise ValueError(f"expected alive of shape {tuple(self.gate.alive.shape)}, got {tuple(alive.shape)}")
        alive = alive.to(self.gate.alive.device) & self.gate.alive
        rows = alive.tolist()
        bare = [task.name for task, row in zip(self.tasks, rows, strict=True) if not any(row)]
        if bare:
            raise ValueError(f"every task needs a head, none is left for {', '.join(bare)}")
        self.gate.alive.copy_(alive)
        for k, n in list(self.decoders):
            if not rows[n][k]:
                del self.decoders[k, n]
        for k in list(self.branches):
            if not any(row[k] for row in rows):
                del self.branches[k]
                self.batched = None
        return self.bank.keep(
            {k: [task for n, task in enumerate(self.tasks) if rows[n][k]] for k in range(self.spec.groups)}
        )

    def keep_grouping(self, grouping: Grouping) -> None:
        """Assign group i of `grouping` to branch i, and remove all other heads.

        Raises:
            ValueError: If there are more groups than branches, or if the tasks differ.
        """
        if len(grouping.groups) > self.spec.groups:
            raise ValueError(f"{len(grouping.groups)} groups do not fit {self.spec.groups} branches")
        branch = {name: k for k, group in enumerate(grouping.groups) for name in group}
        if set(branch) != {task.name for task in self.tasks}:
            raise ValueError(f"grouping of {sorted(branch)} does not fit the tasks {[t.name for t in self.tasks]}")
        alive = torch.zeros_like(self.gate.alive)
        for n, task in enumerate(self.tasks):
            alive[n, branch[task.name]] = True
        self.keep(alive)

    def specialise(self) -> dict[str, GroupModel]:
        """Return a model for each group of `grouping()`, with its own copy of stem and branch: "group_0", ….

        In evaluation mode the outputs of each model are exactly those of this network for its tasks.
        """
        branch = dict(zip((t.name for t in self.tasks), self.gate.assignment(), strict=True))
        models = {}
        for name, members in self.grouping().to_dict().items():
            models[name] = GroupModel.cut(self, branch[members[0]], members)
        return models


class GroupModel(nn.Module):
    """The stem, branch and heads of one group, as an independent network.

    Args:
        spec: A spec with the tasks of the group.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tasks = spec.tasks
        self.network = GroupingNetwork(replace(spec, groups=1, sampling="fixed", task_weighting="fixed"))

    @classmethod
    def cut(cls, source: GroupingNetwork, k: int, members: Sequence[str]) -> GroupModel:
        """Build a model from copies of branch `k` of `source` and the heads of `members`."""
        tasks = tuple(task for task in source.tasks if task.name in members)
        model = cls(replace(source.spec.without_weights(), tasks=tasks))
        net = model.network
        if source.frozen:
            net.use_frozen(source)
        else:
            net.stem.load_state_dict(source.stem.state_dict())
        net.branches[0].load_state_dict(source.branches[k].state_dict())
        for n, task in enumerate(tasks):
            net.copy_head((0, n), source, (k, source.tasks.index(task)))
        model.spec = replace(model.spec, encoder=net.spec.encoder)
        return model.to(source.gate.logits.device).train(source.training)

    def forward(self, raw: Tensor) -> dict[str, Tensor]:
        """Compute task name → output from stored input `(B, …)`, as `GroupingNetwork.forward`."""
        out: dict[str, Tensor] = self.network(raw)
        return out

    @torch.no_grad()
    def predict(self, raw: Tensor) -> dict[str, Tensor]:
        """Compute decoded predictions from stored input. See `Task.decode`."""
        outputs = self(raw)
        return {task.name: task.decode(outputs[task.name]) for task in self.tasks}


@contextmanager
def _same_buffers(part: nn.Module) -> Iterator[None]:
    """Restore the buffers, so that a second pass of a batch does not change running statistics again."""
    before = [buffer.clone() for buffer in part.buffers()]
    try:
        yield
    finally:  # an exception ends the second pass as soon as all needed activations are computed
        for buffer, old in zip(part.buffers(), before, strict=True):
            buffer.copy_(old)


def pooled(features: Tensor) -> Tensor:
    """Return the input of the head bank.

    A feature map is averaged over its pixels, `(B, F)`. The members of each sample become samples,
    `(B · members, F)`. A feature vector does not change.
    """
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.flatten(0, 1) if features.dim() == 3 else features


def clone(network: GroupingNetwork) -> GroupingNetwork:
    """Return an independent copy with weights and pruned shape."""
    return copy.deepcopy(network)
