"""Losses of single labels that have options (`dmtg_core.loss_options`).

Values and flags have a loss for each element of the output. Class ids have the loss that a label of each class
would have, of which the label selects one. Class probabilities, as of a distillation, weight them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dmtg_core.loss_options import LossOptions

NO_OPTIONS = LossOptions()


def _binary_cross_entropy(output: Tensor, target: Tensor, options: LossOptions, weight: Tensor | None) -> Tensor:
    if options.label_smoothing:
        target = torch.lerp(target, torch.full_like(target, 0.5), options.label_smoothing)
    return F.binary_cross_entropy_with_logits(output, target, pos_weight=weight, reduction="none")


def _binary_focal(output: Tensor, target: Tensor, options: LossOptions, _weight: Tensor | None) -> Tensor:
    """The loss of `torchvision.ops.sigmoid_focal_loss`, whose gradient is NaN for a gamma below 1 at p = 1."""
    p = output.sigmoid()
    other = _above_0(p * (1 - target) + (1 - p) * target)
    found = F.binary_cross_entropy_with_logits(output, target, reduction="none") * other**options.gamma
    alpha = options.alpha
    return found if alpha < 0 else found * (alpha * target + (1 - alpha) * (1 - target))


def _above_0(probability: Tensor) -> Tensor:
    """Limit probabilities to positive numbers, whose powers have finite gradients."""
    return probability.clamp_min(torch.finfo(probability.dtype).tiny)


def _pinball(output: Tensor, target: Tensor, options: LossOptions, _weight: Tensor | None) -> Tensor:
    error = target - output
    return torch.maximum(options.quantile * error, (options.quantile - 1) * error)


# (output, target, options, factor of positive labels) → error of each element; targets have no NaN
WITH_OPTIONS: Mapping[str, Callable[[Tensor, Tensor, LossOptions, Tensor | None], Tensor]] = {
    "binary_cross_entropy": _binary_cross_entropy,
    # cross-entropy times (1 - p)^gamma of the label's probability p (Lin et al. 2017)
    "focal": _binary_focal,
    "huber": lambda o, t, options, _: F.huber_loss(o, t, reduction="none", delta=options.delta),
    # its least mean is at the quantile (Koenker and Bassett 1978)
    "quantile": _pinball,
}


def _ordinal(logarithms: Tensor, _options: LossOptions) -> Tensor:
    """Sum of the binary cross-entropies of "the label is above class k" over all k but the last.

    It is the loss of CORAL (Cao, Mirjalili and Raschka 2020) on the cumulative probabilities of the softmax, which
    cannot contradict each other. Output and prediction are those of the cross-entropy. With two classes it is the
    cross-entropy.
    """
    below = logarithms.logcumsumexp(1).narrow(1, 0, logarithms.shape[1] - 1)  # log P(label ≤ k)
    above = logarithms.flip(1).logcumsumexp(1).flip(1).narrow(1, 1, logarithms.shape[1] - 1)  # log P(label > k)
    none = torch.zeros_like(logarithms.narrow(1, 0, 1))
    passed = torch.cat([none, above.cumsum(1)], 1)  # thresholds below the class
    left = torch.cat([below.flip(1).cumsum(1).flip(1), none], 1)  # thresholds from the class on
    return -(passed + left).clamp_max(0)  # a probability can be rounded to more than 1


# (logarithms of the probabilities (B, C, …), options) → loss that a label of each class would have, (B, C, …)
BY_CLASS: Mapping[str, Callable[[Tensor, LossOptions], Tensor]] = {
    "cross_entropy": lambda logarithms, _options: -logarithms,
    "focal": lambda logarithms, options: -logarithms * _above_0(-logarithms.expm1()) ** options.gamma,
    "ordinal": _ordinal,
}


def class_loss(
    loss: str,
    output: Tensor,
    target: Tensor,
    options: LossOptions = NO_OPTIONS,
    *,
    weights: Tensor | None = None,
    ignore_index: int = -1,
) -> Tensor:
    """Compute the loss of each label.

    Args:
        loss: A key of `BY_CLASS`.
        output: Logits `(B, C, …)`.
        target: Class ids `(B, …)`, or class probabilities `(B, C, …)`.
        options: Options of the loss. Its weights are not used.
        weights: Factor of each class, `(C,)` or `(B, C)`.
        ignore_index: Class id of a missing label, whose loss is 0.

    Returns:
        `(B, …)`.
    """
    smoothing = options.label_smoothing
    if loss == "cross_entropy" and weights is None:
        ignored = -100 if target.is_floating_point() else ignore_index  # -100 is torch's for none
        return F.cross_entropy(output, target, ignore_index=ignored, reduction="none", label_smoothing=smoothing)
    each = BY_CLASS[loss](output.log_softmax(1), options)
    if weights is not None:
        each = each * weights.reshape(weights.shape + (1,) * (output.dim() - 2))
    if target.is_floating_point():
        found = (each * target).sum(1)
        return torch.lerp(found, each.mean(1), smoothing) if smoothing else found
    known = target != ignore_index
    found = each.gather(1, target.where(known, 0).unsqueeze(1)).squeeze(1)
    return (torch.lerp(found, each.mean(1), smoothing) if smoothing else found).masked_fill(~known, 0.0)
