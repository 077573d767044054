"""A weighting without a model: what it may reach is found in the graph of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.compat import zero_grad_share_params
from libmtl_fair.libmtl.gradients import nodes_of
from libmtl_fair.libmtl.model import model_class, weighting_bases
from libmtl_fair.libmtl.registry import resolve_weighting
from libmtl_fair.libmtl.state import Model
from libmtl_fair.models import Heads


class NotGiven(nn.Module):
    """Stands for a head that was not handed over."""


class Loose(Model):
    """Stands in the place of LibMTL's architecture where a user's own loop runs the model.

    Its own parameters and buffers are the weighting's (UW's and GradNorm's scales, controllers). Those of the encoder and the heads
    are reached, not owned: shared parameters are the encoder's, or what the representation of the step was made with.
    """

    rep_grad = False
    keeps_weights_on_device = True
    zero_grad_share_params = zero_grad_share_params

    def __init__(
        self, task_name: Sequence[str], heads: Mapping[str, nn.Module] | None, encoder: nn.Module | None, several: bool
    ) -> None:
        super().__init__()
        self.task_name, self.task_num = list(task_name), len(task_name)
        self.multi_input = several
        given = Heads({name: NotGiven() for name in task_name} if heads is None else dict(heads))
        vars(self).update(decoders=given, encoder=encoder)  # not registered: their state is the user's
        first = next((p for module in (given, encoder) if module is not None for p in module.parameters()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._roots: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())
        self._found: dict[bool, list[nn.Parameter]] = {}

    def look_at(self, losses: Sequence[Tensor], representations: Sequence[Tensor]) -> None:
        """Take the step's losses and representations, from which parameters are found; nothing forgets the last ones."""
        self._roots, self._found = (losses, representations), {}

    def get_share_params(self) -> Iterator[nn.Parameter]:
        """Yield the shared parameters: the encoder's, or those that the step's representation was made with."""
        if self.encoder is not None:
            yield from self.encoder.parameters()
            return
        if not self._roots[1]:
            raise HostError(
                f"{self.weighting_name} needs the shared parameters: hand over representation=, what the heads received, or make "
                "FairStep with encoder=, the module that the tasks share"
            )
        yield from self._reached(shared=True)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield all parameters that the step reaches, the heads' and the weighting's own, each once."""
        reached = [] if self.encoder is None else list(self.encoder.parameters())
        found = (*reached, *self._reached(shared=False), *self.decoders.parameters(), *super().parameters(recurse))
        yield from {id(p): p for p in found}.values()

    @property
    def weighting_name(self) -> str:
        """Name of the weighting."""
        return type(self).__name__

    def _reached(self, shared: bool) -> list[nn.Parameter]:
        if shared not in self._found:
            losses, representations = self._roots
            self._found[shared] = leaves_of(representations if shared else (*losses, *representations))
        return self._found[shared]


def leaves_of(roots: Sequence[Tensor]) -> list[nn.Parameter]:
    """Return the parameters that these tensors were made with, nearest first, each once."""
    leaves = (getattr(node, "variable", None) for node in nodes_of(roots))
    found = {id(leaf): leaf for leaf in leaves if isinstance(leaf, nn.Parameter)}
    return list(found.values())


def loose(
    method: str | type[nn.Module],
    tasks: Sequence[str],
    heads: Mapping[str, nn.Module] | None,
    encoder: nn.Module | None,
    several: bool,
    settings: Mapping[str, object],
    auxiliary: Sequence[object] = (),
) -> tuple[Loose, dict[str, object]]:
    """Return the weighting of a loop of one's own, and what its ``backward`` is called with.

    Raises
    ------
    HostError
        A method that needs what was not handed over, or a weighting's ``init_param`` does.
    RecipeError
        A setting that does not fit.
    """
    wanted = resolve_weighting(method)
    bases, weight_args, declared = weighting_bases(wanted, settings)
    if heads is None and getattr(wanted, "looks_at_heads", False):
        raise HostError(
            f"{wanted.__name__} looks at the gradients of each task's head: make FairStep with heads={{task: head}}"
        )
    make = cast("Callable[..., Loose]", model_class((Loose, *bases), wanted.__name__))
    model = make(tasks, heads, encoder, several)
    model.init_param()
    vars(model)["auxiliary_tasks"] = auxiliary
    if declared is not None:
        model.configure(declared)
    vars(model)["fair_own"] = tuple(nn.Module.parameters(model))
    return model.to(model.device), weight_args
