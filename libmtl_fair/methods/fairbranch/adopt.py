"""New copies of parameters join an optimiser, with copied state, in the group of what they are copies of."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def adopt(
    optimizer: torch.optim.Optimizer,
    copies: Iterable[tuple[nn.Parameter, nn.Parameter]],
    order: Sequence[tuple[str, nn.Parameter]],
) -> None:
    """Give each new parameter the group and a copy of the state (moments, step, momentum) of its origin.

    Schedulers keep their place, since groups stay the same objects. Parameters of a group are put into model order, so
    that the state_dict fits an optimiser that is made anew from the branched model. Copies of parameters that the
    optimiser does not have (frozen ones) stay out.

    Parameters
    ----------
    copies : (origin, copy).
    order : the model's ``named_parameters()`` after branching.
    """
    pairs = list(copies)
    rank = {id(p): i for i, (_, p) in enumerate(order)}
    names = {id(p): name for name, p in order}
    for group in optimizer.param_groups:
        members = {id(p) for p in group["params"]}
        joined = [*group["params"], *(new for old, new in pairs if id(old) in members)]
        if "param_names" in group:
            known = dict(zip((id(p) for p in group["params"]), group["param_names"]))
            names = {**known, **names}
        group["params"] = sorted(joined, key=lambda p: rank.get(id(p), len(rank)))
        if "param_names" in group:
            group["param_names"] = [names[id(p)] for p in group["params"]]
    for old, new in pairs:
        if old in optimizer.state:
            optimizer.state[new] = {key: _copied(value) for key, value in optimizer.state[old].items()}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
