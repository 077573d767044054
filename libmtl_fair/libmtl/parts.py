"""A LibMTL weighting over some of a model's tasks, with a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from libmtl_fair.libmtl.checkpoint import attributes, set_attributes
from libmtl_fair.libmtl.compat import healed
from libmtl_fair.libmtl.compat_weightings import Record
from libmtl_fair.libmtl.gradients import gradients
from libmtl_fair.libmtl.registry import resolve_weighting, weight_args
from libmtl_fair.libmtl.state import Model


class Part(nn.Module):
    """What a LibMTL weighting needs of a model, for a subset of its tasks; everything else is the model's.

    It stands in the place of LibMTL's architecture in the class that :func:`part_of` composes. Its own parameters
    (UW's and GradNorm's scales) are its own; the model's are reached, not owned.
    """

    _model: tuple[Model]
    _rows: list[int]
    task_name: list[str]
    task_num: int
    device: torch.device
    rep_grad = False
    multi_input: bool
    keeps_weights_on_device = True
    args: dict[str, object]
    init_param: Callable[[], None]
    backward: Callable[..., Record | None]

    @property
    def train_loss_buffer(self) -> npt.NDArray[np.float64]:
        """Mean training losses of these tasks, [tasks, epochs]."""
        return self._model[0].train_loss_buffer[self._rows]

    fair_processes = property(lambda self: self._model[0].fair_processes)
    epoch = property(lambda self: self._model[0].epoch)
    encoder = property(lambda self: self._model[0].encoder)
    get_share_params = property(lambda self: self._model[0].get_share_params)
    zero_grad_share_params = property(lambda self: self._model[0].zero_grad_share_params)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the model's parameters, which include this part's."""
        return self._model[0].parameters(recurse)

    def get_extra_state(self) -> dict[str, object]:
        """Return what the weighting keeps outside its parameters, for checkpoints."""
        return attributes(self)

    def set_extra_state(self, state: dict[str, object]) -> None:
        """Put back what :meth:`get_extra_state` gave."""
        set_attributes(self, state)


def part_of(model: Model, weighting: str, tasks: Sequence[str], args: Mapping[str, object]) -> Part:
    """Return a module whose ``backward(losses of these tasks, **part.args)`` is that weighting's, for these tasks alone."""
    base = resolve_weighting(weighting)
    part: Part = type(base.__name__, (Part, healed(base)), {})()
    part._model = (model,)
    part._rows = [model.task_name.index(task) for task in tasks]
    part.task_name, part.task_num = list(tasks), len(tasks)
    part.device, part.multi_input = model.device, model.multi_input
    part.args = weight_args(base, args)
    part.init_param()
    return part


def linearised(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return losses [T] of the same values and gradients on a graph of their own; the graph they came from is kept.

    One backward pass a task. A weighting may take gradients of the result in any order, once, and free it.
    """
    rows = [gradients(loss, parameters) for loss in losses]
    out = losses.detach().clone()
    for parameter, grads in zip(parameters, zip(*rows)):
        stacked = torch.stack([torch.zeros_like(parameter) if g is None else g for g in grads])
        out = out + torch.tensordot(stacked, parameter - parameter.detach(), dims=parameter.dim())
    return out
