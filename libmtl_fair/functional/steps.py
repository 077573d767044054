"""Sequences of different lengths in one tensor: which steps there are, and one vector of each."""

from __future__ import annotations

from torch import Tensor


def valid_steps(x: Tensor) -> Tensor:
    """Steps that a padded sequence has, bool [..., L]; steps at the end whose features are all zero are padding (ours).

    Zeros between steps that are not zero are steps. The first step is one, so that a sequence is never empty.

    Parameters
    ----------
    x : Tensor
        [..., L, F].

    Examples
    --------
    >>> import torch
    >>> valid_steps(torch.tensor([[[1.0], [0.0], [2.0], [0.0]], [[3.0], [0.0], [0.0], [0.0]]])).tolist()
    [[True, True, True, False], [True, False, False, False]]
    """
    there = (x != 0).any(-1)
    there[..., 0] = True
    return there.flip(-1).cumsum(-1).flip(-1) > 0


def last_step(x: Tensor, valid: Tensor) -> Tensor:
    """Features of the last valid step, [..., F], of ``x`` [..., L, F] and ``valid`` [..., L].

    >>> import torch
    >>> last_step(torch.tensor([[[1.0], [2.0], [0.0]]]), torch.tensor([[True, True, False]])).tolist()
    [[2.0]]
    """
    place = (valid.sum(-1) - 1).clamp(min=0)[..., None, None].expand(*x.shape[:-2], 1, x.shape[-1])
    return x.gather(-2, place).squeeze(-2)


def pooled(h: Tensor) -> Tensor:
    """Representation as one vector an example, [B, d]: the mean of a sequence's steps [B, L, d], or of a map's places [B, d, ...].

    Steps are those of :func:`valid_steps`. For ReLiF's global average pooling of maps, and in the same way of sequences (ours).

    >>> import torch
    >>> pooled(torch.tensor([[[1.0, 3.0], [3.0, 5.0], [0.0, 0.0]]])).tolist()
    [[2.0, 4.0]]
    """
    if h.dim() == 3:
        valid = valid_steps(h)[..., None].to(h.dtype)
        return (h * valid).sum(1) / valid.sum(1)
    return h.flatten(2).mean(2) if h.dim() > 3 else h
