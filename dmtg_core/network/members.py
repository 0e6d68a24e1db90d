"""The prediction of an encoder with weight-sharing members: the mean of the members' predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dmtg_core.tasks import Task


def average(task: Task, output: Tensor) -> Tensor:
    """Average the outputs of the members of an encoder.

    Probabilities are averaged, not logits, as in TabM (Gorishniy et al., ICLR 2025, section 3.2). The result is in
    the layout of a single network: its sigmoid or softmax is the mean of the members' probabilities.

    Args:
        task: A sample-wise task.
        output: `(B, m)` for one channel, else `(B, m, C)`: logits for classes, values in network units otherwise.

    Returns:
        `(B,)` or `(B, C)`: logits or logarithms of probabilities for classes, values in network units otherwise.
    """
    if task.kind == "binary":
        return _log_mean(F.logsigmoid(output)) - _log_mean(F.logsigmoid(-output))
    if task.classes:
        return _log_mean(output.log_softmax(2))
    return output.mean(1)


def _log_mean(logarithms: Tensor) -> Tensor:
    """Logarithm of the mean over the members, the second axis."""
    return torch.logsumexp(logarithms, 1) - math.log(logarithms.shape[1])
