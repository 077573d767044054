"""How alike the weights of two task groups are: linear CKA of weight matrices whose rows are input features."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import HostError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INPUT_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding)


def matrices(module: nn.Module) -> list[Tensor]:
    """Return the weight matrices of a module, each [input features, the rest]; biases and norms are left out.

    A convolution's rows are its input channels. Matrices with one row have no variance and are left out, unless there
    are no others **(ours)**.
    """
    found = [
        (weight if isinstance(part, _INPUT_FIRST) else weight.transpose(0, 1)).detach().flatten(1)
        for part in module.modules()
        for weight in part.parameters(recurse=False)
        if weight.dim() >= 2
    ]
    return [m for m in found if m.shape[0] > 1] or found


def similarity(modules: Sequence[nn.Module], signed: bool = False) -> Tensor:
    """Return the similarity of each pair of modules, [n, n] on the CPU in float64, in [0, 1], 1 on the diagonal.

    The linear CKA of corresponding weight matrices, averaged where a module has several **(ours)**. For one output that is
    the squared correlation of two weight vectors, so w and -w have similarity 1; ``signed`` **(ours)** takes the sign of
    the inner product of the centred matrices where they are of one shape, and the values lie in [-1, 1].
    """
    weights = [[m.double().cpu() for m in matrices(module)] for module in modules]
    result = torch.eye(len(weights), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(weights)), 2):
        parts = [F.linear_cka(a, b) * (_sign(a, b) if signed else 1) for a, b in zip(weights[i], weights[j])]
        result[i, j] = result[j, i] = torch.stack(parts).mean()
    return result


def _sign(a: Tensor, b: Tensor) -> Tensor | int:
    return ((a - a.mean(0)) * (b - b.mean(0))).sum().sign() if a.shape == b.shape else 1


def identical(modules: Sequence[nn.Module]) -> bool:
    """Whether all modules hold the same weights, bit by bit: copies that have not been trained since."""
    first, *others = [list(module.parameters()) for module in modules]
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def head_layers(heads: Mapping[str, nn.Module], tasks: Sequence[str]) -> list[nn.Module]:
    """Return the last linear (or convolutional) layer of each head, in task order: what is compared.

    An auxiliary head without weights of its own stands for the head that it follows.
    """
    layers = []
    for task in tasks:
        head = heads[next(iter(getattr(heads[task], "follows", ())), task)]
        found = [m for m in head.modules() if isinstance(m, _LAYERS)]
        if not found:
            raise HostError(
                f"FairBranch compares the linear layers of the heads, and the head of task {task!r} "
                f"({type(head).__name__}) has none: give it an nn.Linear"
            )
        layers.append(found[-1])
    widths = {task: matrices(layer)[0].shape[0] for task, layer in zip(tasks, layers)}
    if len(set(widths.values())) > 1:
        raise HostError(
            f"FairBranch compares heads row by row, so their (last) linear layers need one input width; found {widths}"
        )
    return list(layers)
