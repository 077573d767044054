"""How alike the weights of two task groups are: linear CKA of weight matrices whose rows are input features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import HostError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matrices(module: nn.Module) -> list[Tensor]:
    """Return the weight matrices of a module, each [input features, the rest]; biases and norms are left out.

    A convolution's rows are its input channels. Matrices with one row have no variance and are left out, unless there
    are no others **(ours)**.
    """
    found = [
        _oriented(part, parameter.detach())
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    return [m for m in found if m.shape[0] > 1] or found


def _oriented(module: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(module, (*_TRANSPOSED, nn.Embedding)):
        return weight.flatten(1)
    return weight.transpose(0, 1).flatten(1)


def similarity(modules: Sequence[nn.Module]) -> Tensor:
    """Return the similarity of each pair of modules, [n, n] on the CPU in float64, in [0, 1], 1 on the diagonal.

    The linear CKA of corresponding weight matrices, averaged where a module has several **(ours)**.
    """
    weights = [[m.double().cpu() for m in matrices(module)] for module in modules]
    n = len(weights)
    result = torch.eye(n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n):
            parts = [F.linear_cka(a, b) for a, b in zip(weights[i], weights[j])]
            result[i, j] = result[j, i] = torch.stack(parts).mean()
    return result


def identical(modules: Sequence[nn.Module]) -> bool:
    """Whether all modules hold the same weights, bit by bit: copies that have not been trained since."""
    first = list(modules[0].parameters())
    others = [list(module.parameters()) for module in modules[1:]]
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def last_layer(task: str, head: nn.Module) -> nn.Module:
    """Return the last linear (or convolutional) layer of a head.

    Raises
    ------
    HostError : the head has none.
    """
    layers = [m for m in head.modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))]
    if not layers:
        raise HostError(
            f"FairBranch compares the linear layers of the heads, and the head of task {task!r} "
            f"({type(head).__name__}) has none: give it an nn.Linear"
        )
    return layers[-1]


def _followed(task: str, heads: Mapping[str, nn.Module]) -> str:
    """Return the task whose head an auxiliary head without weights of its own applies; else the task itself."""
    follows = getattr(heads[task], "follows", ())
    return follows[0] if follows else task


def head_layers(heads: Mapping[str, nn.Module], tasks: Sequence[str]) -> list[nn.Module]:
    """Return the layers of the heads that are compared, in task order.

    Raises
    ------
    HostError : a head without a linear layer, or layers of different input width.
    """
    layers = [last_layer(task, heads[_followed(task, heads)]) for task in tasks]
    widths = {task: matrices(layer)[0].shape[0] for task, layer in zip(tasks, layers)}
    if len(set(widths.values())) > 1:
        raise HostError(
            f"FairBranch compares heads row by row, so their (last) linear layers need one input width; found {widths}"
        )
    return layers
