"""Options of losses: which loss has which, their values, and class weights from the counts of labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

BALANCED = "balanced"  # weights from the counts of the training labels

# loss → its options; a loss that is not here has none
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "binary_cross_entropy": ("pos_weight", "label_smoothing"),
    "cross_entropy": ("class_weights", "label_smoothing"),
    "focal": ("gamma", "alpha", "class_weights"),
    "ordinal": ("class_weights",),
    "huber": ("delta",),
    "quantile": ("quantile",),
}
OF_BINARY, OF_CLASSES = ("pos_weight", "alpha"), ("class_weights",)  # options of some kinds alone


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss of a task. `OPTIONS` has those of each loss.

    Weights are factors of a label's loss. The mean loss of a task is over the number of labels, not over the sum
    of their weights.

    Args:
        class_weights: A factor for each class. "balanced" is n / (C · n_c) for class c with n_c of n labels of the
            training split, of which C classes have labels (`compute_class_weight` of scikit-learn). A class
            without labels has the factor 1.
        pos_weight: Factor of the labels 1 of a binary task. "balanced" is the number of labels 0 by that of
            labels 1.
        label_smoothing: Share of a label that is divided equally among all classes (Szegedy et al. 2016).
        gamma: Exponent of the focal loss. With 0 it is the cross-entropy.
        alpha: Factor of the labels 1 in the focal loss of a binary task, with 1 - alpha for labels 0; -1 for none.
        delta: Error, in network units, from which the Huber loss is linear.
        quantile: The quantile that the quantile loss estimates.
    """

    class_weights: tuple[float, ...] | str = ()
    pos_weight: float | str = 1.0
    label_smoothing: float = 0.0
    gamma: float = 2.0
    alpha: float = 0.25
    delta: float = 1.0
    quantile: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.class_weights, str):
            object.__setattr__(self, "class_weights", tuple(map(float, self.class_weights)))

    @property
    def weighted(self) -> bool:
        """Whether labels have weights of their classes."""
        return self.class_weights != () or self.pos_weight != 1.0

    @property
    def balanced(self) -> bool:
        """Whether weights follow from counts of labels that are not known yet."""
        return BALANCED in (self.class_weights, self.pos_weight)

    @property
    def unweighted(self) -> LossOptions:
        """The options without the weights of classes."""
        return replace(self, class_weights=(), pos_weight=1.0) if self.weighted else self

    def weights(self, task: str, channels: int) -> tuple[float, ...]:
        """Return the factor of each class, or that of the labels 1 of a binary task.

        Raises:
            ValueError: If they follow from counts that are not known.
        """
        if self.balanced:
            raise ValueError(
                f"task {task!r}: balanced weights follow from the training labels: call dmtg_core.balanced_tasks"
            )
        weights = self.class_weights or (float(self.pos_weight),) * channels
        return tuple(map(float, weights))

    def counted(self, counts: Sequence[int]) -> LossOptions:
        """Return the options with balanced weights of these counts of labels, one count for each class.

        Without labels all weights are 1.
        """
        present = [count for count in counts if count]
        found = self
        if self.class_weights == BALANCED:
            weights = [sum(counts) / (len(present) * count) if count else 1.0 for count in counts]
            found = replace(found, class_weights=tuple(weights))
        if self.pos_weight == BALANCED:
            found = replace(found, pos_weight=counts[0] / counts[1] if len(present) == 2 else 1.0)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the options that differ from the default, ready for JSON."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def checked_options(
    given: LossOptions | Mapping[str, Any], task: str, kind: str, channels: int, loss: str
) -> LossOptions:
    """Return the options of a task's loss.

    Raises:
        ValueError: For an option that the loss does not have for this kind of task, and for a wrong value.
    """
    values = given.to_dict() if isinstance(given, LossOptions) else dict(given)
    other = OF_CLASSES if kind == "binary" else OF_BINARY
    names = [name for name in OPTIONS.get(loss, ()) if name not in other]
    unknown = [name for name in values if name not in names]
    if unknown:
        allowed = f"expected {', '.join(names)}" if names else "it has none"
        raise ValueError(f"task {task!r}: loss {loss} of a {kind} task has no option {unknown[0]!r}, {allowed}")
    try:
        options = LossOptions(**values)
        problem = _problem(options, channels)
    except TypeError as error:  # a text in place of a number
        raise ValueError(f"task {task!r}: options of its loss must be numbers, got {values}") from error
    if problem:
        raise ValueError(f"task {task!r}: {problem}")
    return options


def _problem(options: LossOptions, channels: int) -> str:
    """The first value that is out of range, as text; empty if there is none."""
    weights = options.class_weights
    if isinstance(weights, str):
        if weights != BALANCED:
            return f"class_weights must be numbers or balanced, got {weights!r}"
    elif weights and (len(weights) != channels or not all(0 <= w < math.inf for w in weights) or not any(weights)):
        return f"class_weights needs {channels} numbers of at least 0, not all 0, got {list(weights)}"
    if isinstance(options.pos_weight, str):
        if options.pos_weight != BALANCED:
            return f"pos_weight must be a number or balanced, got {options.pos_weight!r}"
    elif not 0 < options.pos_weight < math.inf:
        return f"pos_weight must be positive, got {options.pos_weight}"
    for name, valid, wanted in (
        ("label_smoothing", 0 <= options.label_smoothing < 1, "in [0, 1)"),
        ("gamma", 0 <= options.gamma < math.inf, "at least 0"),
        ("alpha", options.alpha == -1 or 0 <= options.alpha <= 1, "in [0, 1], or -1 for none"),
        ("delta", 0 < options.delta < math.inf, "positive"),
        ("quantile", 0 < options.quantile < 1, "in (0, 1)"),
    ):
        if not valid:
            return f"{name} must be {wanted}, got {getattr(options, name)}"
    return ""
