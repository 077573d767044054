"""A multilayer perceptron as an ordered list of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from libmtl_fair.errors import RecipeError, unknown
from libmtl_fair.models.encoders import registered

_NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


@registered("mlp", dims=1)
class MLP(nn.Module):
    """Linear, norm, ReLU, dropout; once per hidden width. Input [B, in_features], output [B, hidden[-1]].

    Parameters
    ----------
    in_features : int
        Width of the input.
    hidden : sequence of int, default (128, 64)
        Widths, at least one.
    dropout : float, default 0.0
        Probability in [0, 1).
    norm : str, optional
        None, ``"batch"`` or ``"layer"``.

    Notes
    -----
    ``blocks`` is the ordered list of layers, which FairBranch branches at.

    Examples
    --------
    >>> MLP(10, (8, 4)).out_features
    4
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int] = (128, 64), dropout: float = 0.0, norm: str | None = None
    ) -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise RecipeError(f"hidden must be a list of widths of at least 1, found {list(hidden)}")
        if not 0 <= dropout < 1:
            raise RecipeError(f"dropout must be in [0, 1), found {dropout}")
        if norm is not None and norm not in _NORMS:
            raise RecipeError(unknown("norm", norm, _NORMS))
        widths = [in_features, *hidden]
        self.blocks = nn.ModuleList(_block(a, b, dropout, norm) for a, b in itertools.pairwise(widths))
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation, [B, hidden[-1]]."""
        for block in self.blocks:
            x = block(x)
        return x


def _block(width_in: int, width_out: int, dropout: float, norm: str | None) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    if norm is not None:
        layers.append(_NORMS[norm](width_out))
    layers.append(nn.ReLU())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)
