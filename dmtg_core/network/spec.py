"""`NetworkSpec`: everything that defines a network except its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dmtg_core.addresses import is_address
from dmtg_core.data_checks import check_choice, check_counts, check_finite
from dmtg_core.input_spec import InputSpec
from dmtg_core.network.decoders import DECODERS
from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.own_code import code_of_tasks
from dmtg_core.tasks import Task, check_names

TASK_WEIGHTINGS = (
    "fixed", "uncertainty", "dwa", "famo", "geometric_mean", "imtl_l", "random", "stch", "uw",
)  # fmt: skip
RESCALINGS = ("off", "tasks", "published")
AS_BOOLEAN = {"off": False, "tasks": True}  # in stored specs, whose digests do not change with the version


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that defines a network except its weights. `to_dict` returns it ready for JSON.

    Args:
        input: The input.
        tasks: The N tasks.
        encoder: The encoder and the size of the stem.
        groups: K, the number of branches. It may be larger than N.
        decoder: Decoder of the dense tasks, a key of `DECODERS`.
        decoder_width: `width` of the decoder. For "subpixel" it is the channels of the first convolution, for
            "xception" the channels after the first doubling (published: 128).
        sampling, initial, initial_scale: Options of `GroupGate`.
        rescale_gradients: One of `RESCALINGS`. "tasks" scales gradients by 1/√N from heads to branches and by 1/√K
            from branches to stem. "published" scales both by 1/√K, as the published code does.
        task_weighting: "fixed" for `Task.weight` alone, "uncertainty" for additional learned weights, or a key of
            `dmtg_core.training.objective.scalarizers.SCALARIZERS`.
        seed: Seed of the initial weights.

    Raises:
        ValueError: If there is no task, if two have one name, or for an unknown option or a number out of range.
    """

    input: InputSpec
    tasks: tuple[Task, ...]
    encoder: EncoderSpec
    groups: int
    decoder: str = "subpixel"
    decoder_width: int = 64
    sampling: str = "gumbel"
    initial: str = "uniform"
    initial_scale: float = 0.01
    rescale_gradients: str = "off"
    task_weighting: str = "fixed"
    seed: int = 22

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        check_names(self.tasks)
        check_counts({"groups": self.groups, "decoder_width": self.decoder_width})
        check_finite({"initial_scale": self.initial_scale})
        check_choice("decoder", self.decoder, DECODERS)
        check_choice("rescale_gradients", self.rescale_gradients, RESCALINGS)
        check_choice("task_weighting", self.task_weighting, TASK_WEIGHTINGS)

    @property
    def gradient_factors(self) -> tuple[float, float] | None:
        """Factors of the gradients from heads to branches and from branches to stem; None for "off"."""
        if self.rescale_gradients == "off":
            return None
        heads = len(self.tasks) if self.rescale_gradients == "tasks" else self.groups
        return 1 / math.sqrt(heads), 1 / math.sqrt(self.groups)

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """Kind and address of the code of other packages: encoder, losses and metrics."""
        own = [("encoder", self.encoder.name)] if is_address(self.encoder.name) else []
        return (*own, *code_of_tasks(self.tasks))

    def without_weights(self) -> NetworkSpec:
        """Return a copy without pretrained weights, for a network whose weights are loaded afterwards."""
        return replace(self, encoder=self.encoder.without_weights())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields ready for JSON. `from_dict` reads them."""
        plain = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("input", "tasks", "encoder")}
        return {
            "input": self.input.to_dict(),
            "tasks": [t.to_dict() for t in self.tasks],
            "encoder": self.encoder.to_dict(),
            **plain,
            "rescale_gradients": AS_BOOLEAN.get(self.rescale_gradients, self.rescale_gradients),
        }

    @cached_property
    def text(self) -> str:
        """`to_dict` as JSON. It is encoded once: a table can have 50,000 quantiles."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkSpec:
        """Return the spec itself, which does not change: copies of a network share it."""
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkSpec:
        """The inverse of `to_dict`."""
        rescaling = values.get("rescale_gradients", False)
        parts = {
            "input": InputSpec(**values["input"]),
            "tasks": tuple(Task.from_dict(task) for task in values["tasks"]),
            "encoder": EncoderSpec(**values["encoder"]),
            "rescale_gradients": {stored: name for name, stored in AS_BOOLEAN.items()}.get(rescaling, rescaling),
        }
        return cls(**{**values, **parts})
