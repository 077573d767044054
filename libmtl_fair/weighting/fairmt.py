"""FairMT: task losses under one fairness constraint over heterogeneous, partly labelled tasks, by a primal-dual method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.controllers import DualAscent
from libmtl_fair.errors import HostError, RecipeError, unknown
from libmtl_fair.functional.simplex import AGGREGATION_SOLVERS
from libmtl_fair.host.gradients import add_gradients, carry_representation_gradients, extra_gradients
from libmtl_fair.host.plugin import FairWeighting, Settings
from libmtl_fair.tasks import Regression, Task
from libmtl_fair.weighting._fairmt_blocks import BinaryBlock, Block, MixedBlock, stacked_labels
from libmtl_fair.weighting._fairmt_heads import (
    LastInputs,
    Outputs,
    autograd_products,
    head_linear,
    head_products,
    last_linear,
    min_norm_of,
    shared_anchors,
)
from libmtl_fair.weighting._fairmt_rates import Layout, Lift, disparity
from libmtl_fair.weighting._lipschitz import Lipschitz, LipschitzTerm
from libmtl_fair.weighting.relif import ReLiFSettings

_CHOICES: Mapping[str, Sequence[Any]] = {
    "proxy": ("head", "representation", "full"),
    "alpha": (None, "proxy", "uniform", "base"),
    "reference": ("max", "lcb"),
    "ema_gradient": ("decayed", "batch"),
    "error": ("squared", "absolute", "ccc"),
    "solver": AGGREGATION_SOLVERS,
}
_LIPSCHITZ = ("prototypes", "k", "beta", "mu", "quantile", "scaling", "scale_ema", "detach_distance", "task_pairs")


@dataclass(frozen=True)
class FairMTSettings(Settings):
    """Hyperparameters of :class:`FairMT` (methods.md, 2).

    Parameters
    ----------
    epsilon : disparity Phi that is tolerated, >= 0 (default ours).
    mu : smoothing of the worst case over tasks, > 0.
    rho, eta_0, eta_max : step, start and bound of the dual variable.
    proxy : gradients that alpha is chosen from: ``"head"`` (closed form, no extra backward pass), ``"representation"``
        (autograd to what the heads receive, any head), ``"full"`` (all shared parameters, a backward pass a task).
    alpha : ``"proxy"`` (default), ``"uniform"``, or ``"base"``: another LibMTL weighting, named by ``base``.
    rank_one : the source's form of the head proxy.
    normalise : divide by the number of groups that can differ, so that attributes compare (ours).
    fpr_weight : weight of the FPR part of a disparity against the TPR part, >= 0 (ours; the source's is 1). The FPR part
        lowers the scores of the group that the TPR part takes as its reference: 0 lifts only, and keeps that group's TPR.
    sharpness : rates are means of sigmoid(sharpness * logit): above 1 nearer to decisions at 0.5 (ours; the source's is 1).
    symmetric : the ablation: largest minus smallest rate, gradient to both sides.
    reference : ``"max"``, or ``"lcb"``: the group whose rate has the best confidence bound sets the bar (ours).
    ema : decay of the running sums per group; 0 takes each batch alone (ours).
    ema_gradient : ``"decayed"``, or ``"batch"``: the batch rate's full gradient at the running value (ours).
    min_count : groups with fewer (decayed) examples are absent (ours).
    intersectional : cross the attributes instead of averaging over them.
    attributes : which sensitive attributes to constrain; None takes all.
    error : a regression task's error: ``"squared"`` (standardised), ``"absolute"``, or ``"ccc"`` (1 - CCC of a group).
    solver : of the aggregation: ``"exact"`` or ``"frank-wolfe"``.
    lipschitz : ReLiF's term is one more disparity, so that individual and group fairness are one constraint (ours).
    lipschitz_args : its settings, as ReLiF's: ``prototypes``, ``k``, ``beta``, ``mu``, ``quantile``, ``scaling``,
        ``scale_ema``, ``detach_distance``, ``task_pairs``.
    base, base_args : the LibMTL weighting that balances the tasks where ``alpha`` is ``"base"``.
    """

    epsilon: float = 0.05
    mu: float = 0.5
    rho: float = 0.05
    eta_0: float = 0.0
    eta_max: float = 10.0
    proxy: str = "head"
    alpha: str | None = None
    rank_one: bool = False
    normalise: bool = True
    fpr_weight: float = 1.0
    sharpness: float = 1.0
    symmetric: bool = False
    reference: str = "max"
    ema: float = 0.9
    ema_gradient: str = "decayed"
    min_count: float = 10
    intersectional: bool = False
    attributes: Sequence[str] | None = None
    error: str = "squared"
    solver: str = "exact"
    lipschitz: bool = False
    lipschitz_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every range."""
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                known = [o for o in options if o is not None]
                raise RecipeError(f"FairMT: {unknown(name, getattr(self, name), known)}")
        self.need("mu", _number(self.mu) and self.mu > 0, "above 0")
        self.need("ema", _number(self.ema) and 0 <= self.ema < 1, "in [0, 1)")
        self.need("min_count", _number(self.min_count) and self.min_count > 0, "above 0")
        self.need("fpr_weight", _number(self.fpr_weight) and self.fpr_weight >= 0, "a number of at least 0")
        self.need("sharpness", _number(self.sharpness) and self.sharpness > 0, "above 0")
        if isinstance(self.attributes, str):
            object.__setattr__(self, "attributes", (self.attributes,))
        self.need("attributes", self.attributes is None or len(self.attributes) > 0, "at least one attribute, or null")
        if self.reference == "lcb" and self.symmetric:
            raise RecipeError("FairMT: reference='lcb' names a best group, symmetric=True has none; choose one")
        self._check_alpha()
        self.dual()
        self.relif()

    def _check_alpha(self) -> None:
        if self.base != "EW" and self.alpha not in (None, "base"):
            raise RecipeError(
                f"FairMT: base={self.base!r} weights the tasks, and so does alpha={self.alpha!r}; leave one of them out"
            )
        if self.base == "EW" and self.alpha == "base":
            raise RecipeError("FairMT: alpha='base' needs base, the name of a LibMTL weighting such as 'GradNorm'")
        if self.rank_one and (self.proxy != "head" or self.weighing != "proxy"):
            raise RecipeError("FairMT: rank_one=True is a form of the head proxy: it needs proxy='head', alpha='proxy'")

    @property
    def weighing(self) -> str:
        """What weights the tasks: ``"proxy"``, ``"uniform"`` or ``"base"``."""
        return self.alpha or ("proxy" if self.base == "EW" else "base")

    def dual(self) -> DualAscent:
        """Return the controller of eta."""
        for name in ("epsilon", "rho", "eta_0", "eta_max"):
            self.need(name, _number(getattr(self, name)), "a finite number")
        return DualAscent(self.rho, self.epsilon, initial=self.eta_0, maximum=self.eta_max)

    def lift(self) -> Lift:
        """Return how disparities are measured."""
        return Lift(
            self.symmetric, self.normalise, self.reference, self.min_count, self.error, self.fpr_weight, self.sharpness
        )

    def relif(self) -> ReLiFSettings:
        """Return the settings of the Lipschitz term."""
        if self.lipschitz_args and not self.lipschitz:
            raise RecipeError("FairMT: lipschitz_args are given, but lipschitz is False; set it, or leave them out")
        for name in self.lipschitz_args:
            if name not in _LIPSCHITZ:
                raise RecipeError(f"FairMT: lipschitz_args: {unknown('setting', name, _LIPSCHITZ)}")
        return ReLiFSettings(**self.lipschitz_args)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


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

    def lipschitz(self, strength: Tensor | None) -> Tensor | None:
        """Return strength (1 if None) times w* times the Lipschitz term, attached to the graph; None without it."""
        if self.term is None:
            return None
        w, value = self.term
        return (w if strength is None else w * strength).to(value.dtype) * value


class FairMT(FairWeighting):
    r"""Task losses under one fairness constraint over tasks of any kind, some of them unlabelled in places.

    Minimises :math:`\sum_t \alpha_t L_t` subject to :math:`\Phi \le \epsilon`, where :math:`\Phi` is the smoothed worst case of the
    tasks' asymmetric disparities (only groups worse than the best are moved). A step descends
    :math:`T (\sum_t \alpha_t L_t + \eta \Phi)`; then :math:`\eta \leftarrow \mathrm{clip}(\eta + \rho (\Phi - \epsilon))`. The
    factor T, the number of tasks with a label in the batch, is ours: with uniform alpha a step without a violated
    constraint is equal weighting's, at its learning rate. Source: arXiv:2512.00469; what is ours is marked in the settings.

    Records each step: ``psi/<task>`` and ``w/<task>`` (NaN and 0 where absent), ``alpha/<task>`` (sums to 1), ``phi``, and
    ``eta`` after the dual update, which the next step uses.
    """

    settings_class = FairMTSettings
    source = "arXiv:2512.00469"
    needs_groups = True
    settings: FairMTSettings
    lipschitz: LipschitzTerm | None
    running: Tensor | None = None
    presence: Tensor | None = None

    def configure(self, settings: Settings) -> None:
        """Make the dual variable."""
        super().configure(settings)
        self.dual = self.settings.dual()
        self.lipschitz = LipschitzTerm(self.settings.relif()) if self.settings.lipschitz else None
        self.to(self.device)
        self._layout: Layout | None = None
        self._last_inputs = LastInputs(self.decoders)
        self._heads: list[nn.Module] = []
        self._columns: tuple[tuple[int, ...], Tensor | None] = ((), None)
        self._said: set[str] = set()
        if self.settings.proxy == "full" and self.settings.weighing == "proxy" and self.rep_grad:
            raise HostError("FairMT: proxy='full' needs gradients of the shared parameters: set rep_grad=False")

    # -- the step -------------------------------------------------------------------------------------------------

    def step(self, batch: FairBatch, losses: Tensor) -> Any:
        """Descend the Lagrangian with one backward pass through the encoder, then raise or lower eta."""
        outputs = Outputs([batch.outputs[name] for name in self.task_name])
        lipschitz = self.lipschitz(batch) if self.lipschitz is not None else None
        with torch.no_grad():
            fairness = self.fairness(batch, outputs, lipschitz)
        eta = self.dual.value.clone()
        if self.settings.weighing == "base":
            alpha, weights = None, self._with_base(losses, outputs, fairness, eta)
        else:
            alpha, weights = self._descend(batch, outputs, outputs.gradients(losses), fairness, eta)
        self._record(fairness, alpha)
        return weights

    def fairness(self, batch: FairBatch, outputs: Outputs, lipschitz: Lipschitz | None = None) -> Fairness:
        """Move the running sums; return psi, Phi, w* and the gradient of Phi to each of ``outputs.tensors``."""
        s = self.settings
        layout = self._layout or self._make_layout(batch)
        blocks, members = self._blocks(batch, outputs, layout)
        now = _group_sums(layout, blocks, members)
        if self.running is None or not s.ema:
            self.running = now
        else:
            self.running = torch.add(now, self.running, alpha=s.ema)
        sums, counts = self.running[:, : layout.n_summed], self.running[:, layout.n_summed :]
        found = disparity(layout, sums, counts)
        psi, present = found.psi, found.present
        if lipschitz is not None:
            psi = torch.cat([psi, lipschitz.value.detach().to(psi.dtype).unsqueeze(0)])
            present = torch.cat([present, lipschitz.some.unsqueeze(0)])
        phi, w = F.aggregate_disparities(psi, s.mu, present, s.solver)
        divisor = counts if s.ema_gradient == "decayed" else now[:, layout.n_summed :]
        slope = found.slope(w[: len(self.task_name)], divisor)
        grads = self._pull_back(layout, blocks, members, slope, outputs)
        term = None if lipschitz is None else (w[-1], lipschitz.value)
        return Fairness(psi, present, phi, w, grads, term, self._observed(batch, blocks))

    def _descend(
        self, batch: FairBatch, outputs: Outputs, grads: list[Tensor], fairness: Fairness, eta: Tensor
    ) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(batch, outputs, grads, fairness, eta)
        with torch.no_grad():
            count = fairness.observed.sum().to(alpha.dtype)
            weights, strength = alpha * count, eta * count
            total = self._combine(outputs, grads, fairness.grads, weights, strength)
        term = fairness.lipschitz(strength)
        extra = extra_gradients(self, term) if term is not None and self.rep_grad else []
        if term is None or self.rep_grad:
            torch.autograd.backward(outputs.tensors, total)
        else:
            torch.autograd.backward([*outputs.tensors, term], [*total, torch.ones_like(term)])
        carry_representation_gradients(self)
        add_gradients(extra)
        return alpha, weights

    def _combine(
        self, outputs: Outputs, grads: list[Tensor], fairness: list[Tensor], weights: Tensor, strength: Tensor
    ) -> list[Tensor]:
        """Return weights . grads + strength * fairness for each of ``outputs.tensors``."""
        if outputs.joined:
            index = self._column_task(outputs.widths)
            per_column = weights if index is None else weights[index]
            return [torch.addcmul(grads[0] * per_column, fairness[0], strength)]
        return [weights[t] * g + strength * f for t, (g, f) in enumerate(zip(grads, fairness, strict=True))]

    def _with_base(self, losses: Tensor, outputs: Outputs, fairness: Fairness, eta: Tensor) -> Any:
        """Let the base weighting balance the losses, and add the gradient of T eta Phi."""
        strength = eta * len(losses)
        pairs = zip(outputs.tensors, fairness.grads, strict=True)
        terms = [(z * (strength * g)).sum() for z, g in pairs]
        term = fairness.lipschitz(strength)
        extra = extra_gradients(self, torch.stack([*terms, *([] if term is None else [term])]).sum())
        weights = self.base_backward(losses)
        add_gradients(extra)
        return weights

    def _record(self, fairness: Fairness, alpha: Tensor | None) -> None:
        assert self.presence is not None
        tasks = len(self.task_name)
        eta = self.dual.update(fairness.phi, fairness.present.any())
        psi, w, present = torch.where(fairness.present, fairness.psi, torch.nan), fairness.w, fairness.present
        self.trace = {"phi": fairness.phi, "eta": eta}
        if self.lipschitz is not None:
            self.trace |= {"psi/lipschitz": psi[-1], "w/lipschitz": w[-1]}
            psi, w, present = psi[:tasks], w[:tasks], present[:tasks]
        self.presence += present
        self.trace |= {"psi": psi, "w": w}
        if alpha is not None:
            self.trace["alpha"] = alpha

    # -- task weights ---------------------------------------------------------------------------------------------

    def _alpha(
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
        proxy, rank_one = self._usable_proxy(batch)
        term = fairness.lipschitz(None) if not rank_one else None
        if proxy != "head":
            return autograd_products(outputs, grads, fairness.grads, shared_anchors(self, batch.h, proxy), term)
        layers = list(self._head_layers().values())
        index = self._column_task(outputs.widths)
        with torch.no_grad():
            weights = torch.cat([layer.weight for layer in layers if layer is not None])
            owner = None if index is None else nn.functional.one_hot(index, len(layers)).to(weights.dtype)
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
            kind = type(self.decoders[other]).__name__
            return self._fall_back(
                "representation", f"the head of task {other!r} ({kind}) does not end in a linear layer"
            )
        if not self._last_inputs.shared(self.task_name, batch.h):
            return self._fall_back("representation", "a head's last linear layer does not receive what all heads share")
        return "head", s.rank_one

    def _head_layers(self) -> dict[str, nn.Linear | None]:
        """Return the linear layer that ends each task's head; looked up anew where a head was replaced."""
        heads = [self.decoders[name] for name in self.task_name]
        if heads != self._heads:
            self._heads = heads
            self._layers = {name: last_linear(head) for name, head in zip(self.task_name, heads, strict=True)}
        return self._layers

    def _fall_back(self, proxy: str, why: str) -> tuple[str, bool]:
        if proxy == "full" and self.rep_grad:
            raise HostError(
                f"FairMT: {why}, so alpha needs gradients of the shared parameters: set rep_grad=False, or alpha='uniform'"
            )
        if why not in self._said:
            self._said.add(why)
            warnings.warn(
                f"FairMT: proxy={self.settings.proxy!r} cannot be used: {why}; using proxy={proxy!r}", stacklevel=2
            )
        return proxy, False

    # -- from batches to sums and back ----------------------------------------------------------------------------

    def _make_layout(self, batch: FairBatch) -> Layout:
        tasks = [batch.task(name) for name in self.task_name]
        self._attributes = self._chosen_attributes(batch)
        counts = [batch.n_groups[name] for name in self._attributes]
        self._crossed = counts if self.settings.intersectional and len(counts) > 1 else []
        total = [torch.Size(self._crossed).numel()] if self._crossed else counts
        widths = [_width(task, batch.outputs[task.name]) for task in tasks]
        blocks = [[t] for t in range(len(tasks))] if batch.multi_input else [list(range(len(tasks)))]
        self._layout = Layout(tasks, widths, total, blocks, self.settings.lift(), self.device)
        if self.presence is None:
            self.presence = torch.zeros(len(tasks), device=self.device)
        return self._layout

    def _chosen_attributes(self, batch: FairBatch) -> list[str]:
        for name in self.settings.attributes or ():
            if name not in batch.n_groups:
                raise RecipeError(f"FairMT: {unknown('attribute', name, batch.n_groups)}")
        return list(self.settings.attributes or batch.n_groups)

    def _blocks(self, batch: FairBatch, outputs: Outputs, layout: Layout) -> tuple[list[Block], list[Tensor]]:
        blocks: list[Block] = []
        members = []
        names = self.task_name
        for index in layout.blocks:
            tasks = [layout.tasks[t] for t in index]
            values = [outputs.outputs[t] for t in index]
            groups = batch.task_groups(names[index[0]])
            members.append(layout.membership(groups, self._attributes, self._crossed))
            if layout.single_logits and outputs.single:
                joint = outputs.tensors[0] if outputs.joined else torch.cat([z.reshape(len(z), 1) for z in values], 1)
                truth = stacked_labels(batch.labels, [names[t] for t in index])
                blocks.append(BinaryBlock(joint.detach(), truth, layout.lift.sharpness))
            else:
                labels = [batch.labels[names[t]] for t in index]
                blocks.append(MixedBlock(tasks, values, labels, layout.lift, layout.owner.dtype))
        return blocks, members

    def _pull_back(
        self, layout: Layout, blocks: list[Block], members: list[Tensor], slope: Tensor, outputs: Outputs
    ) -> list[Tensor]:
        """Return the gradient to each of ``outputs.tensors`` from that to the sums [A * G, M]."""
        parts: list[Tensor] = []
        for b, (block, member) in enumerate(zip(blocks, members, strict=True)):
            columns = slope if layout.order is None else slope[:, layout.columns[b]]
            found = block.pull_back(member @ columns)
            if isinstance(block, BinaryBlock) and not outputs.joined:
                found = list(torch.split(found[0], 1, 1))
            parts += found
        if outputs.joined and len(parts) > 1:
            return [torch.cat(parts, 1)]
        return [g.reshape(z.shape) for g, z in zip(parts, outputs.tensors, strict=True)]

    def _observed(self, batch: FairBatch, blocks: list[Block]) -> Tensor:
        """Return which tasks have a label in this batch: bool [T]."""
        if len(blocks) == 1 and isinstance(blocks[0], BinaryBlock):
            return blocks[0].observed()
        return torch.stack([batch.observed[name].any() for name in self.task_name])

    def _column_task(self, widths: tuple[int, ...]) -> Tensor | None:
        """Return which task an output column belongs to, [C]; None where each task has one."""
        if self._columns[0] != widths:
            tasks = [t for t, width in enumerate(widths) for _ in range(width)]
            several = any(width != 1 for width in widths)
            self._columns = widths, torch.tensor(tasks, device=self.device) if several else None
        return self._columns[1]

    def after_epoch(self, trainer: Any, epoch: int) -> None:
        """Say once which tasks had no two groups to compare in any step of an epoch."""
        parent = getattr(super(), "after_epoch", None)
        if parent is not None:
            parent(trainer, epoch)
        if self.presence is None:
            return
        seen = (self.presence > 0).tolist()
        self.presence.zero_()
        absent = [name for name, here in zip(self.task_name, seen, strict=True) if not here and name not in self._said]
        if absent:
            self._said.update(absent)
            warnings.warn(
                f"FairMT: no step of epoch {epoch} had two groups of at least {self.settings.min_count:g} labelled examples "
                f"for {', '.join(absent)}; fairness of these tasks was not trained",
                stacklevel=2,
            )


_OWN = "the tasks do not share one representation"


def _width(task: Task, output: Tensor) -> int:
    """Return the number of classification columns of a task, 0 for regression."""
    if isinstance(task, Regression):
        return 0
    probabilities = task.probabilities(output.detach())
    return 1 if probabilities.dim() == 1 else probabilities.shape[1]


def _group_sums(layout: Layout, blocks: list[Block], members: list[Tensor]) -> Tensor:
    """Return sums and counts by group of all blocks, [A * G, 2M]."""
    parts = [member.T @ block.summed for block, member in zip(blocks, members, strict=True)]
    if len(parts) == 1:
        return parts[0]
    assert layout.order is not None
    halves = [part.view(len(part), 2, -1) for part in parts]
    return torch.cat(halves, 2)[:, :, layout.order].flatten(1)
