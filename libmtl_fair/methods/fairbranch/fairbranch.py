"""FairBranch: an architecture that grows branches where the tasks' weights differ."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.compat import zero_grad_share_params
from libmtl_fair.libmtl.joint_heads import is_plain_linear
from libmtl_fair.libmtl.loading import AbsArchitecture
from libmtl_fair.libmtl.precision import encode
from libmtl_fair.libmtl.state import StepState, shared_or_each
from libmtl_fair.methods.base import Declared, setting
from libmtl_fair.methods.fairbranch.branched import BranchedEncoder, joint_linear
from libmtl_fair.methods.fairbranch.similarity import head_layers, identical, similarity
from libmtl_fair.methods.fairbranch.tree import BranchTree, Group


class FairBranchSettings(Declared):
    """Hyperparameters of :class:`FairBranch`: LibMTL's ``arch_args``."""

    threshold: float = setting(
        0.5,
        "tau: groups whose weights are at least so similar stay together",
        expected="a number in (0, 1]",
        gt=0,
        le=1,
        search=(0.2, 0.9),
    )
    branch_every: int = setting(1, "epochs (or steps) from one branch event to the next", ge=1, search=(1, 5))
    unit: str = setting("epochs", "what ``branch_every`` counts", choices=("epochs", "steps"))
    min_steps: int = setting(
        0,
        "steps of training from one event to the next, at least: fresh copies differ in the third digit only",
        ours=True,
        ge=0,
    )
    signed: bool = setting(
        False,
        "weights that point opposite ways have the similarity -CKA: to CKA, w and -w are alike, and their tasks conflict",
        ours=True,
    )
    keep_first: bool = setting(
        True, "the first block always stays shared, as in the source; False may branch it too **(ours)**"
    )
    blocks: list[str] | None = setting(
        None,
        "paths of the encoder's blocks, in the order in which its forward runs them; None: its own ``blocks``, or found",
        ours=True,
        expected="a list of paths of submodules, such as ['resnet.layer1', 'resnet.layer2']",
        min_length=1,
    )
    max_events: int | None = setting(None, "no further branch events after so many; None for no limit", ge=0)


@dataclass(frozen=True)
class BranchEvent:
    """One branch event.

    Attributes
    ----------
    block : int
        1-based number of the block that was copied.
    compared : tuple of Group
        Task groups before the event.
    similarity : tuple of tuple of float
        Of each pair of them, [n][n].
    groups : tuple of Group
        Task groups after it, each with its own copy of the block.
    epoch, step : int, optional
        When, 0-based; None for an event by hand.
    """

    block: int
    compared: tuple[Group, ...]
    similarity: tuple[tuple[float, ...], ...]
    groups: tuple[Group, ...]
    epoch: int | None = None
    step: int | None = None


class FairBranch(AbsArchitecture):  # type: ignore[misc]
    r"""Hard sharing that branches: blocks near the heads are copied for groups of tasks whose weights agree.

    Training starts with one shared encoder of ordered blocks. At each branch event (every ``branch_every`` epochs) task
    groups are compared by the linear CKA of their weights one layer above the current block (the heads first); pairs at
    or above ``threshold`` stay together, best first; the block is copied once a group, with its norms, buffers and
    optimiser state, and the next event is about the block below. The function does not change by an event. Source:
    arXiv:2310.13746; the weightings' view of it (``get_share_params``: what at least two tasks have in common) is ours.

    Works with every LibMTL weighting; :class:`~libmtl_fair.methods.FBGrad` corrects fairness conflicts in branches.
    With ``FairTrainer`` events come by themselves; :meth:`branch` makes one now. :attr:`tree` prints and plots.

    Raises
    ------
    HostError
        Fewer than two tasks; an encoder without blocks, or with one block and ``keep_first``; heads without a linear
        layer, or of different input width.
    RecipeError
        A setting out of range.
    """

    settings_class: ClassVar[type[FairBranchSettings]] = FairBranchSettings
    source: ClassVar[str] = "arXiv:2310.13746"
    fair_watchers: int = 0
    takes_precision: bool = True
    encoder: BranchedEncoder
    rep: Tensor | dict[str, Tensor]

    def __init__(
        self,
        task_name: list[str],
        encoder_class: Callable[[], nn.Module],
        decoders: nn.ModuleDict,
        rep_grad: bool,
        multi_input: bool,
        device: torch.device,
        **kwargs: object,
    ) -> None:
        super().__init__(task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs)
        self.branching = FairBranchSettings.from_args("FairBranch", kwargs)
        if len(task_name) < 2:
            raise HostError(f"FairBranch needs at least two tasks to tell apart, found {len(task_name)}: {task_name}")
        head_layers(dict(decoders.items()), task_name)
        self.encoder = BranchedEncoder(encoder_class(), task_name, self.branching.blocks)
        if self.tree.n_blocks == 1 and self.branching.keep_first:
            raise HostError(
                "FairBranch: the encoder has one block, which keep_first=True never branches; use an encoder of two or "
                "more blocks, or keep_first=False"
            )
        self.events: list[BranchEvent] = []
        self._seen_by_heads: dict[str, Tensor] = {}
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None

    def forward(self, inputs: object, task_name: str | None = None) -> dict[str, Tensor]:
        """Return task -> output. Every block copy runs once."""
        wanted = self.task_name if task_name is None else [task_name]
        together = self.training and not getattr(self, "takes_branches_apart", False)  # FBGrad, which would pay for all
        reps, joint = encode(self, self.encoder.run, inputs, wanted, together)
        if self.rep_grad:
            reps = self._detached(reps)
        if self.fair_watchers:
            self._seen_by_heads = reps if not self.multi_input else {**self._seen_by_heads, **reps}
        if not self.training or self.rep_grad:
            return {task: self.decoders[task](reps[task]) for task in wanted}
        out = self._joint_heads(joint) if joint is not None else {}
        for group in self.tree.leaves if not out else ():
            tasks = [task for task in group if task in reps]
            if tasks:  # what is a view of all leaves must not be written to
                out.update(self._heads(tasks, reps[tasks[0]] if joint is None else reps[tasks[0]].clone()))
        return {task: out[task] for task in wanted}

    def _heads(self, tasks: list[str], h: Tensor) -> dict[str, Tensor]:
        """Run the heads of one leaf: as one matrix product where they are plain linear layers."""
        heads = [self.decoders[task] for task in tasks]
        if len(tasks) < 2 or not all(is_plain_linear(head) for head in heads):
            return {task: head(h) for task, head in zip(tasks, heads)}
        weight, bias = torch.cat([x.weight for x in heads]), torch.cat([x.bias for x in heads])
        z = nn.functional.linear(h, weight, bias)
        return dict(zip(tasks, torch.split(z, [x.out_features for x in heads], dim=-1)))

    def _joint_heads(self, h: Tensor) -> dict[str, Tensor]:
        """Run one plain linear head a leaf, all of one size, on the leaves' representations [n, B, d] at once."""
        heads = [self.decoders[group[0]] for group in self.tree.leaves]
        alone = len(heads) == len(self.task_name) and all(is_plain_linear(head) for head in heads)
        if not alone or len({head.weight.shape for head in heads}) > 1:
            return {}
        return {group[0]: z for group, z in zip(self.tree.leaves, joint_linear(heads, h).unbind())}

    def _detached(self, reps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut the graph at the representations, as LibMTL does under ``rep_grad=True``."""
        if len(self.tree.leaves) == 1 and not self.multi_input:
            self.rep = next(iter(reps.values()))
        elif isinstance(self.rep, dict):
            self.rep.update(reps)
        else:
            self.rep = dict(reps)
        self.rep_tasks.update({task: rep.detach().clone().requires_grad_() for task, rep in reps.items()})
        return {task: self.rep_tasks[task] for task in reps}

    def get_share_params(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that at least two tasks have in common: trunk first, then branches."""
        yield from self.encoder.trunk_parameters()
        for group, parameters in self.branch_parameters():
            if len(group) > 1:
                yield from parameters

    zero_grad_share_params = zero_grad_share_params

    @property
    def tree(self) -> BranchTree:
        """Which tasks share which block."""
        return self.encoder.tree

    def branch_parameters(self, by_block: bool = False) -> list[tuple[Group, list[nn.Parameter]]]:
        """Return (task group, the parameters that are its own) for every branch, or each block of it; single tasks included."""
        branches = self.tree.branches().items()
        parts = [
            (group, part) for group, places in branches for part in ([[p] for p in places] if by_block else [places])
        ]
        return [(group, self.encoder.parameters_of(part)) for group, part in parts]

    def layer_parameters(self) -> list[dict[str, list[nn.Parameter]]]:
        """Return, for each block, task -> the parameters of the copy that it runs through."""
        return [
            {task: self.encoder.parameters_of([(level, i)]) for i, group in enumerate(groups) for task in group}
            for level, groups in enumerate(self.tree.levels)
        ]

    @property
    def can_branch(self) -> bool:
        """Whether a block is left to branch, and more than one group to give it to."""
        limit = self.branching.max_events
        left = self.tree.depth > (1 if self.branching.keep_first else 0)
        return left and len(self.tree.groups) >= 2 and (limit is None or len(self.events) < limit)

    def similarity(self) -> Tensor:
        """Return the similarity of the current task groups, [n, n] on the CPU."""
        return similarity(self._compared(), self.branching.signed)

    def _compared(self) -> list[nn.Module]:
        if self.tree.depth == self.tree.n_blocks:
            return head_layers(self.decoders, self.task_name)
        return self.encoder.copies(self.tree.depth)

    def branch(
        self, optimizer: torch.optim.Optimizer | None = None, *, epoch: int | None = None, step: int | None = None
    ) -> BranchEvent | None:
        """Make one branch event now; return it, or None if there is nothing to branch.

        Nothing is left when all groups are one or the last block is reached, and right after an event: copies that have
        not been trained are identical, and their similarity says nothing.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer, optional
            That trains this model; new parameters join it with copied state. ``FairTrainer``'s is known.
        epoch, step : int, optional
            Recorded in the event.
        """
        compared = self._compared() if self.can_branch else []
        if not compared or (self.tree.depth < self.tree.n_blocks and identical(compared)):
            return None
        likeness = similarity(compared, self.branching.signed)
        before, groups = list(self.get_share_params()), self.tree.groups
        copies = self.encoder.grow(self.tree.branch(F.pair_by_similarity(likeness, self.branching.threshold)))
        optimizer = self._optimizer() if optimizer is None and self._optimizer is not None else optimizer
        if optimizer is not None:
            adopt(optimizer, copies, list(self.named_parameters()))
        self._move_cached_gradients(before, copies)
        rows = tuple(map(tuple, likeness.tolist()))
        self.events.append(BranchEvent(self.tree.depth + 1, groups, rows, self.tree.groups, epoch, step))
        return self.events[-1]

    def _move_cached_gradients(
        self, before: list[nn.Parameter], copies: list[tuple[nn.Parameter, nn.Parameter]]
    ) -> None:
        """Carry over what a weighting keeps a shared parameter each (MoCo's running gradients [T, P])."""
        old = [p for p in before if p.requires_grad]
        sizes = [p.numel() for p in old]
        if getattr(self, "grad_dim", None) != sum(sizes):
            return
        origin = {id(new): id(source) for source, new in copies}
        now = [origin.get(id(p), id(p)) for p in self.get_share_params() if p.requires_grad]
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor) and value.dim() and value.shape[-1] == sum(sizes):
                parts = dict(zip(map(id, old), torch.split(value.detach(), sizes, dim=-1)))
                setattr(self, name, torch.cat([parts[p] for p in now] or [value[..., :0].detach()], dim=-1))
        self._compute_grad_dim()

    def bind_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember (weakly) which optimiser new parameters have to join."""
        self._optimizer = weakref.ref(optimizer)

    def after_epoch(self, trainer: StepState, epoch: int) -> None:
        """Branch at the end of every ``branch_every``-th epoch."""
        if self.branching.unit == "epochs" and (epoch + 1) % self.branching.branch_every == 0:
            self._due(epoch, trainer.global_step)

    def after_step(self, trainer: StepState, step: int) -> None:
        """Branch after every ``branch_every``-th step."""
        if self.branching.unit == "steps" and step % self.branching.branch_every == 0:
            self._due(self.epoch, step)

    def _due(self, epoch: int, step: int) -> None:
        last = next((event.step for event in reversed(self.events) if event.step is not None), None)
        if last is None or step - last >= self.branching.min_steps:
            self.branch(epoch=epoch, step=step)

    def structure(self) -> dict[str, object]:
        """Return tree, events and whether the blocks are run as a chain, as plain values, for a checkpoint."""
        events = [asdict(event) for event in self.events]
        return {"tree": self.tree.to_dict(), "events": events, "chain": self.encoder.is_chain}

    def restore_structure(self, structure: Mapping[str, Any]) -> None:
        """Take the shape of a checkpoint; its weights come after. An optimiser has to be made anew."""
        self.encoder.grow(BranchTree.from_dict(structure["tree"]))
        self.encoder.is_chain = structure.get(
            "chain", self.encoder.is_chain
        )  # how it is run decides who draws which dropout
        self.events = TypeAdapter(list[BranchEvent]).validate_python(structure["events"])

    def take_representation(self) -> Tensor | dict[str, Tensor]:
        """Return what the heads received in the last forward; forget it. Kept while ``fair_watchers`` is above 0."""
        seen, self._seen_by_heads = self._seen_by_heads, {}
        return shared_or_each(seen)


def adopt(
    optimizer: torch.optim.Optimizer,
    copies: Sequence[tuple[nn.Parameter, nn.Parameter]],
    order: Sequence[tuple[str, nn.Parameter]],
) -> None:
    """Give each new parameter the group and a copy of the state (moments, step, momentum) of its origin.

    ``copies`` are (origin, copy), ``order`` the model's ``named_parameters()`` after branching: parameters of a group are
    put into it, so that the state_dict fits an optimiser that is made anew. Schedulers keep their place, since groups stay
    the same objects; copies of parameters that the optimiser does not have (frozen ones) stay out.
    """
    rank = {id(p): (i, name) for i, (name, p) in enumerate(order)}
    for group in optimizer.param_groups:
        known = {id(p): (len(rank), name) for p, name in zip_longest(group["params"], group.get("param_names", ()))}
        place = {**known, **rank}
        joined = [*group["params"], *(new for old, new in copies if id(old) in known)]
        group["params"] = sorted(joined, key=lambda p: place[id(p)][0])
        if "param_names" in group:
            group["param_names"] = [place[id(p)][1] for p in group["params"]]
    for old, new in copies:
        if old in optimizer.state:
            optimizer.state[new] = copy.deepcopy(optimizer.state[old])
