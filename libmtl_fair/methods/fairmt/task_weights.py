"""FairMT's task weights alpha, from the proxy that a model allows (methods.md, 2.4), and what one step's constraint is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.joint_heads import joint_weights
from libmtl_fair.methods.fairmt.blocks import Block
from libmtl_fair.methods.fairmt.proxies import (
    LastInputs,
    Outputs,
    autograd_products,
    head_linear,
    head_products,
    last_linear,
    min_norm_of,
    shared_anchors,
)
from libmtl_fair.methods.fairmt.settings import FairMTSettings

_OWN = "the tasks do not share one representation"


@dataclass
class Fairness:
    """The constraint in one step: psi and presence [T] (and the Lipschitz term's), Phi, w*, its gradient to the outputs."""

    psi: Tensor
    present: Tensor
    phi: Tensor
    w: Tensor
    grads: list[Tensor]
    term: tuple[Tensor, Tensor] | None
    observed: Tensor
    blocks: list[Block]

    def lipschitz(self, strength: Tensor | None) -> Tensor | None:
        """Return strength (1 if None) times w* times the Lipschitz term, attached to the graph; None without it."""
        if self.term is None:
            return None
        w, value = self.term
        return (w if strength is None else w * strength).to(value.dtype) * value


class TaskWeights:
    """Chooses alpha in each step; remembers what it has warned of and which layers end the heads.

    Raises
    ------
    HostError : a proxy that ``rep_grad=True`` rules out.
    """

    def __init__(self, model: Any, settings: FairMTSettings, tasks: Sequence[str]) -> None:
        self.model, self.settings, self.tasks = model, settings, tuple(tasks)
        self._last_inputs = LastInputs({name: model.decoders[name] for name in tasks})
        self._heads: list[nn.Module] = []
        self._columns: tuple[tuple[int, ...], Tensor | None] = ((), None)
        self._said: set[str] = set()
        if settings.proxy == "full" and settings.weighing == "proxy" and model.rep_grad:
            raise HostError("FairMT: proxy='full' needs gradients of the shared parameters: set rep_grad=False")

    def __call__(
        self, batch: FairBatch, outputs: Outputs, grads: list[Tensor], fairness: Fairness, eta: Tensor
    ) -> Tensor:
        """Return alpha [T] on the simplex of the tasks that have a label in this batch."""
        observed = fairness.observed
        if self.settings.weighing == "uniform" or len(observed) == 1:
            seen = observed.to(grads[0].dtype)
            return seen / seen.sum().clamp(min=1)
        gram, linear = self._products(batch, outputs, grads, fairness)
        with torch.no_grad():
            return min_norm_of(gram, eta * linear, observed)

    def _products(
        self, batch: FairBatch, outputs: Outputs, grads: list[Tensor], fairness: Fairness
    ) -> tuple[Tensor, Tensor]:
        """Return (K [T, T], b [T]); b holds the Lipschitz term too, but not in the rank-one form, which has no signs."""
        weights = joint_weights(self.model, self.tasks) if self.settings.proxy == "head" else None
        proxy, rank_one = self._usable_proxy(batch) if weights is None else ("head", self.settings.rank_one)
        term = fairness.lipschitz(None) if not rank_one else None
        if proxy != "head":
            return autograd_products(
                outputs, grads, fairness.grads, shared_anchors(self.model, self.tasks, batch.h, proxy), term
            )
        index = self.column_task(outputs.widths)
        with torch.no_grad():
            if weights is None:
                weights = torch.cat([layer.weight for layer in self._head_layers().values() if layer is not None])
            owner = None if index is None else nn.functional.one_hot(index, len(self.tasks)).to(weights.dtype)
            g, f = outputs.matrix(grads), outputs.matrix(fairness.grads)
            gram, linear = head_products(g, f, weights, owner, rank_one)
        if term is not None:
            linear = linear + head_linear(g, term, batch.h, weights, owner)
        return gram, linear

    def _usable_proxy(self, batch: FairBatch) -> tuple[str, bool]:
        """Return the proxy that this model allows, and whether in its rank-one form; says once why it is another."""
        s = self.settings
        if s.proxy == "full":
            return "full", False
        layers = self._head_layers()
        shared = isinstance(batch.h, Tensor) and not batch.multi_input
        if s.proxy == "representation":
            return ("representation", False) if shared else self._fall_back("full", _OWN)
        other = next((name for name, layer in layers.items() if layer is None), None)
        if not shared:
            widths = {layer.in_features for layer in layers.values() if layer is not None}
            if other is None and len(widths) == 1:
                return "head", True
            return self._fall_back("full", f"{_OWN}, nor linear heads of one width")
        assert isinstance(batch.h, Tensor)
        if other is not None:
            kind = type(self.model.decoders[other]).__name__
            return self._fall_back(
                "representation", f"the head of task {other!r} ({kind}) does not end in a linear layer"
            )
        if not self._last_inputs.shared(self.tasks, batch.h):
            return self._fall_back("representation", "a head's last linear layer does not receive what all heads share")
        return "head", s.rank_one

    def _head_layers(self) -> dict[str, nn.Linear | None]:
        """Return the linear layer that ends each task's head; looked up anew where a head was replaced."""
        heads = list(self.model.decoders.values())
        if heads != self._heads:
            self._heads = heads
            self._layers = {name: last_linear(self.model.decoders[name]) for name in self.tasks}
        return self._layers

    def _fall_back(self, proxy: str, why: str) -> tuple[str, bool]:
        if proxy == "full" and self.model.rep_grad:
            raise HostError(
                f"FairMT: {why}, so alpha needs gradients of the shared parameters: set rep_grad=False, or alpha='uniform'"
            )
        if why not in self._said:
            self._said.add(why)
            warnings.warn(
                f"FairMT: proxy={self.settings.proxy!r} cannot be used: {why}; using proxy={proxy!r}", stacklevel=2
            )
        return proxy, False

    def column_task(self, widths: tuple[int, ...]) -> Tensor | None:
        """Return which task an output column belongs to, [C]; None where each task has one."""
        if self._columns[0] != widths:
            tasks = [t for t, width in enumerate(widths) for _ in range(width)]
            several = any(width != 1 for width in widths)
            self._columns = widths, torch.tensor(tasks, device=self.model.device) if several else None
        return self._columns[1]
