"""Binary cross-entropy over labels of which some are missing: value, mean and written-out gradient.

A label that is not finite (NaN) is missing. Tasks are columns: logits and labels are [..., B, T].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def example_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the binary cross-entropy of each logit, 0 where the label is missing, and 1 or 0: whether it is there.

    Parameters
    ----------
    logits, labels : Tensor
        Of one shape; labels in [0, 1], not finite where missing. What is returned has the logits' type, and float32 at
        least; a loss of a missing label has a gradient of 0.
    """
    target = labels.to(torch.promote_types(logits.dtype, torch.float32))
    # 1 or 0 as a float, which multiplies and sums twice as fast as a bool; by operations that torch.func.vmap knows
    seen = (target - target).add_(1).nan_to_num_(0.0)
    known = target.nan_to_num(0.0, 0.0, 0.0).to(logits.dtype)
    return binary_cross_entropy_with_logits(logits, known, weight=seen, reduction="none"), seen


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each task's mean binary cross-entropy over its labels, [..., T], 0 without any, and how many there are, [..., T].

    Parameters
    ----------
    logits, labels : Tensor
        [..., B, T]; labels in [0, 1], not finite where missing.

    Examples
    --------
    >>> z = torch.tensor([[0.0, 2.0], [0.0, 5.0]], requires_grad=True)
    >>> y = torch.tensor([[1.0, 1.0], [0.0, torch.nan]])
    >>> losses, labelled = mean_cross_entropy(z, y)
    >>> labelled.tolist(), [round(loss, 3) for loss in losses.tolist()]
    ([2.0, 1.0], [0.693, 0.127])
    >>> losses.sum().backward()
    >>> torch.allclose(z.grad, mean_cross_entropy_gradient(z.detach().sigmoid(), y, labelled))
    True
    """
    losses, seen = example_cross_entropy(logits, labels)
    labelled = seen.sum(-2)
    return losses.sum(-2) / labelled.clamp(min=1), labelled


def mean_cross_entropy_gradient(probabilities: Tensor, labels: Tensor, labelled: Tensor | None = None) -> Tensor:
    """Return the gradient of :func:`mean_cross_entropy` to the logits, [..., B, T]; 0 where the label is missing.

    Parameters
    ----------
    probabilities : Tensor
        The logits' sigmoid, [..., B, T].
    labels : Tensor
        [..., B, T].
    labelled : Tensor, optional
        [..., T], how many labels each task has; None says that none is missing.
    """
    wrong = probabilities - labels
    if labelled is None:
        return wrong.div_(labels.shape[-2])
    return wrong.nan_to_num_(0.0, 0.0, 0.0).div_(labelled.clamp(min=1).unsqueeze(-2)).to(probabilities.dtype)
