"""A metric: a function of predictions and labels in raw units that returns an error for each sample."""

from torch import Tensor


def relative_error(prediction: Tensor, label: Tensor) -> Tensor:
    """Compute |prediction - label| / (1 + |label|), `(B,)` to `(B,)`."""
    return (prediction - label).abs() / (1 + label.abs())
