"""FairMT's task weights alpha, from the proxy that a model allows (METHODS.md, 2.4)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import HostError
from libmtl_fair.functional._gram import column_owner, head_products
from libmtl_fair.libmtl.gradients import flatten, gradients, need_visible, shared_parameters
from libmtl_fair.libmtl.joint_heads import joint_weights
from libmtl_fair.libmtl.state import Model
from libmtl_fair.methods.fairmt.constraint import at_least_single
from libmtl_fair.methods.fairmt.settings import FairMTSettings

_OWN = "the tasks do not share one representation"


@dataclass
class Gradients:
    """What one step's Lagrangian is made of, at the tasks' outputs.

    Attributes
    ----------
    roots : list of Tensor
        The one matrix [B, C] that all outputs are columns of, or each task's own output; ``sizes``: columns of each
        task.
    losses, fairness : list of Tensor
        Gradients of each task's loss to its output, and of Phi, in the shape of the roots.
    observed : Tensor
        bool [T], tasks with a label in this batch.
    term : Tensor or None
        w* times ReLiF's term, attached to the graph; None without it.
    """

    roots: list[Tensor]
    sizes: tuple[int, ...]
    losses: list[Tensor]
    fairness: list[Tensor]
    observed: Tensor
    term: Tensor | None

    def per_task(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Split gradients into one a task."""
        return list(parts) if len(parts) == len(self.sizes) else list(torch.split(parts[0], list(self.sizes), 1))

    def matrix(self, parts: Sequence[Tensor]) -> Tensor:
        """Join gradients to one [B, C] matrix, zero past the end of a task that has fewer examples."""
        rows = [g.unsqueeze(1) if g.dim() == 1 else g.flatten(1) for g in parts]
        if len(rows) == 1:
            return rows[0]
        longest = max(len(g) for g in rows)
        return torch.cat([nn.functional.pad(g, (0, 0, 0, longest - len(g))) for g in rows], 1)

    def spread(self, weights: Tensor) -> list[Tensor]:
        """Return what each root is multiplied by: the weight of its task, or of each column's task."""
        if len(self.roots) == len(self.sizes):
            return list(weights)
        return [weights if self.owner is None else self.owner.to(weights.dtype) @ weights]

    @property
    def owner(self) -> Tensor | None:
        """Which task a column is of, one-hot [C, T]; None where each task has one column."""
        like = self.losses[0]
        return None if max(self.sizes) == 1 else column_owner(self.sizes, like.dtype, like.device)


class TaskWeights:
    """Chooses alpha in each step; remembers what it has warned of and which layers end the heads.

    Raises
    ------
    HostError
        A proxy that ``rep_grad=True`` rules out.
    """

    def __init__(self, model: Model, settings: FairMTSettings, tasks: Sequence[str]) -> None:
        self.model, self.settings, self.tasks = model, settings, tuple(tasks)
        self._last_inputs = LastInputs({name: model.decoders[name] for name in tasks})
        self._heads: list[nn.Module] = []
        self._said: set[str] = set()
        if settings.proxy == "full" and settings.weighing == "proxy" and model.rep_grad:
            raise HostError("FairMT: proxy='full' needs gradients of the shared parameters: set rep_grad=False")

    def __call__(self, batch: FairBatch, grads: Gradients, eta: Tensor) -> Tensor:
        """Return alpha [T] on the simplex of the tasks that have a label in this batch."""
        if self.settings.weighing == "uniform" or len(grads.observed) == 1:
            return uniform(grads.observed, grads.losses[0].dtype)
        gram, linear = self._products(batch, grads)
        with torch.no_grad():
            found = F.min_norm_weights(at_least_single(gram), at_least_single(eta * linear), grads.observed)
            return found.to(grads.losses[0].dtype)

    def _products(self, batch: FairBatch, grads: Gradients) -> tuple[Tensor, Tensor]:
        """Return (K [T, T], b [T]); b holds the Lipschitz term too, but not in the rank-one form, which has no signs."""
        weights = joint_weights(self.model, self.tasks) if self.settings.proxy == "head" else None
        proxy, rank_one = self._usable_proxy(batch) if weights is None else ("head", self.settings.rank_one)
        term = None if rank_one else grads.term
        if proxy != "head":
            return self._by_autograd(batch, grads, self._anchors(batch, proxy), term, proxy == "full")
        with torch.no_grad():
            if weights is None:
                weights = torch.cat([layer.weight for layer in self._head_layers().values() if layer is not None])
            owner, g, f = grads.owner, *(at_least_single(grads.matrix(each)) for each in (grads.losses, grads.fairness))
            gram, linear = head_products(g, f, at_least_single(weights), owner, rank_one)
        if term is not None:
            assert isinstance(batch.received, Tensor)
            to_h = _pulled([term], [torch.ones_like(term)], [batch.received]).view(batch.received.flatten(1).shape)
            own = g if batch.share is None else g[batch.share.rows(self.tasks[0])]
            per_column = batch.total((own * (to_h @ weights.detach().T)).sum(0))
            linear = linear + (per_column if owner is None else owner.T @ per_column)
        return gram, linear

    def _by_autograd(
        self, batch: FairBatch, grads: Gradients, anchors: Sequence[Sequence[Tensor]], term: Tensor | None, full: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (K, b) by autograd from the outputs to each task's anchors; the graph is kept."""
        outputs = [batch.outputs[name] for name in self.tasks]
        losses, fairness = (
            [g.reshape(z.shape) for g, z in zip(grads.per_task(parts), outputs)]
            for parts in (grads.losses, grads.fairness)
        )
        matrix = torch.stack([_pulled([z], [g], to) for z, g, to in zip(outputs, losses, anchors)])
        shared = all(to is anchors[0] for to in anchors)
        if shared:
            phi = _pulled(outputs, fairness, anchors[0])
        else:
            phi = torch.stack([_pulled([z], [g], to) for z, g, to in zip(outputs, fairness, anchors)]).sum(0)
        if term is not None:
            phi = phi + sum(_pulled([term], [torch.ones_like(term)], to) for to in (anchors[:1] if shared else anchors))
        if full:  # gradients of one thing add up, those of each process's rows lie side by side
            matrix, phi = batch.total(matrix), batch.total(phi)
            return matrix @ matrix.T, matrix @ phi
        return batch.total(matrix @ matrix.T), batch.total(matrix @ phi)

    def _anchors(self, batch: FairBatch, proxy: str) -> list[list[Tensor]]:
        """Return, for each task, the tensors whose gradients are compared: shared parameters, or representations."""
        if proxy != "full" and self.model.rep_grad:
            return [[self.model.rep_tasks[name]] for name in self.tasks]
        if proxy == "full":
            need_visible(self.model, list(batch.outputs.values()))
        anchors: list[Tensor] = shared_parameters(self.model) if proxy == "full" else [batch.received]  # type: ignore[list-item]
        return [anchors] * len(self.tasks)

    def _usable_proxy(self, batch: FairBatch) -> tuple[str, bool]:
        """Return the proxy that this model allows, and whether in its rank-one form; says once why it is another."""
        s = self.settings
        if s.proxy == "full":
            return "full", False
        layers = self._head_layers()
        shared = isinstance(batch.received, Tensor) and not batch.multi_input
        if s.proxy == "representation":
            return ("representation", False) if shared else self._fall_back("full", _OWN)
        other = next((name for name, layer in layers.items() if layer is None), None)
        if not shared:
            widths = {layer.in_features for layer in layers.values() if layer is not None}
            if other is None and len(widths) == 1:
                return "head", True
            return self._fall_back("full", f"{_OWN}, nor linear heads of one width")
        assert isinstance(batch.received, Tensor)
        if other is not None:
            kind = type(self.model.decoders[other]).__name__
            return self._fall_back(
                "representation", f"the head of task {other!r} ({kind}) does not end in a linear layer"
            )
        if not self._last_inputs.shared(self.tasks, batch.received):
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


def uniform(observed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return equal weights [..., T] on the tasks observed, summing to 1."""
    seen = observed.to(dtype)
    return seen / seen.sum(-1, keepdim=True).clamp(min=1)


def last_linear(head: nn.Module) -> nn.Linear | None:
    """Return the linear layer that makes a head's output, or None."""
    last = head[-1] if isinstance(head, nn.Sequential) and len(head) else head
    return last if isinstance(last, nn.Linear) else None


class LastInputs:
    """What the last linear layer of each composed head received in the last forward pass."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        self._seen: dict[str, Tensor] = {}
        for name, head in heads.items():
            layer = last_linear(head)
            if layer is not None and layer is not head:
                layer.register_forward_pre_hook(partial(self._keep, name))  # which is saved, and copied, with this

    def _keep(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen[name] = inputs[0].detach()

    def __getstate__(self) -> dict[str, object]:
        """Leave out what the last forward pass showed."""
        return {"_seen": {}}

    def shared(self, names: Sequence[str], h: Tensor) -> bool:
        """Say whether all these layers received ``h`` itself (or a view of all of it); forgets what was seen."""
        seen, self._seen = self._seen, {}
        return all(name not in seen or _same_data(seen[name], h) for name in names)


def _same_data(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.is_contiguous() and b.is_contiguous()


def _pulled(outputs: Sequence[Tensor], grads: Sequence[Tensor], to: Sequence[Tensor]) -> Tensor:
    """Return what reaches ``to`` as one vector: zeros where it is frozen, of length 0 where there is nothing."""
    if not to:
        return outputs[0].new_zeros(0)
    found = iter(gradients(outputs, [t for t in to if t.requires_grad], grads))
    return flatten([next(found) if t.requires_grad else None for t in to], to)
