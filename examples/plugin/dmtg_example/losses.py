"""A loss: a function of outputs and targets that returns a value for each sample."""

import math

from torch import Tensor
from torch.nn import functional as F


def log_cosh(output: Tensor, target: Tensor) -> Tensor:
    """Compute the logarithm of the hyperbolic cosine of the error, `(B,)` to `(B,)`."""
    error = output - target
    return error + F.softplus(-2 * error) - math.log(2)
