"""Similarity of parameter matrices, and binary merges of the most similar task groups (FairBranch, arXiv:2310.13746)."""

from __future__ import annotations

import torch
from torch import Tensor

from libmtl_fair.errors import DataError


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of ``a`` [..., n, p] and ``b`` [..., n, q], whose rows are the same n things; in [0, 1].

    ``|b'a|^2 / (|a'a| |b'b|)`` of the column-centred matrices (Frobenius), the feature-space form of
    ``tr(K_a K_b) / sqrt(tr(K_a K_a) tr(K_b K_b))``. Unchanged by scale, rotation of the columns, and a common order of the
    rows. A matrix without variance (up to rounding) has similarity 0. Source: Kornblith et al., ICML 2019.

    Raises
    ------
    DataError
        If the matrices do not have the same rows.

    Examples
    --------
    >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    >>> linear_cka(a, 5 * a.flip(1)), linear_cka(a, torch.ones(3, 1))
    (tensor(1.), tensor(0.))
    """
    if a.dim() < 2 or b.dim() < 2 or a.shape[-2] != b.shape[-2]:
        raise DataError(
            f"linear_cka: expected two matrices with the same number of rows, found {tuple(a.shape)} and {tuple(b.shape)}."
        )
    a, b = _centred(a), _centred(b)
    shared = torch.linalg.matrix_norm(b.mT @ a).square()
    own = torch.linalg.matrix_norm(a.mT @ a) * torch.linalg.matrix_norm(b.mT @ b)
    similarity: Tensor = (shared / own.where(own > 0, 1.0)).clamp(max=1)
    return similarity


def _centred(a: Tensor) -> Tensor:
    """Centre the columns and scale to Frobenius norm 1, against overflow; 0 where nothing but rounding varies."""
    scale = a.detach().abs().amax((-2, -1), keepdim=True) if a.numel() else a.new_zeros(())
    a = a / scale.where(scale > 0, 1.0)
    centred = a - a.mean(-2, keepdim=True)
    norm: Tensor = torch.linalg.matrix_norm(centred, keepdim=True)
    rounding = 10 * torch.finfo(a.dtype).eps * torch.linalg.matrix_norm(a.detach(), keepdim=True)
    return centred / norm.where(norm > rounding, torch.inf)


def pair_by_similarity(sim: Tensor, threshold: float) -> list[tuple[int, ...]]:
    """Merge pairs with similarity >= ``threshold``, best first, each index at most once; the rest stay singletons.

    ``sim`` [n, n] is symmetric (the upper triangle is read; NaN never merges). Equal similarities go by index. The result is
    sorted by first index. Reads the matrix on the host: a decision on the model's structure, taken once per branch event.
    Source: FairBranch.

    Raises
    ------
    DataError
        If ``sim`` is not square.

    Examples
    --------
    >>> pair_by_similarity(torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.8], [0.9, 0.8, 1.0]]), 0.5)
    [(0, 2), (1,)]
    """
    if sim.dim() != 2 or sim.shape[0] != sim.shape[1]:
        raise DataError(f"pair_by_similarity: sim must be [n, n], found shape {tuple(sim.shape)}.")
    rows = sim.detach().tolist()
    n = len(rows)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if rows[i][j] >= threshold]
    merged: list[tuple[int, ...]] = []
    used: set[int] = set()
    for pair in sorted(pairs, key=lambda pair: -rows[pair[0]][pair[1]]):
        if used.isdisjoint(pair):
            merged.append(pair)
            used.update(pair)
    return sorted(merged + [(i,) for i in range(n) if i not in used])
