"""Encoders as ordered blocks: how blocks are found, and a branched encoder that runs each copy once.

An encoder is a chain of blocks: an ``nn.Sequential``, or a module with ordered ``blocks`` (``nn.ModuleList``,
``nn.Sequential``, or any sequence of its own submodules). It may do more than its blocks in ``before_blocks(x)`` (a stem,
always shared) and ``after_blocks(x)`` (pooling, the last step of a sequence; without weights). A recurrent layer in
``blocks`` passes on its outputs. The first forward checks that the chain is what the encoder's own forward computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.errors import HostError
from libmtl_fair.methods.fairbranch.tree import BranchTree

_RESNET_STEM = ("conv1", "bn1", "relu", "maxpool")
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
_HELP = (
    "FairBranch needs an encoder made of ordered blocks: an nn.Sequential, or a module with 'blocks' "
    "(nn.ModuleList or nn.Sequential; see libmtl_fair.models.MLP)"
)


def find_blocks(encoder: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks of an encoder, each a list of the modules that it chains.

    A module without a weight matrix (norm, activation, dropout, pooling) belongs to the block before it.

    Raises
    ------
    HostError : no blocks can be told, weights outside of them, or a weight in two of them.
    """
    modules = _ordered_modules(encoder)
    strange = [type(m).__name__ for m in modules if not isinstance(m, nn.Module)]
    if strange or not modules:
        raise HostError(f"{_HELP}; found {strange[0] if strange else 'an empty list'} in {type(encoder).__name__}")
    blocks: list[list[nn.Module]] = []
    for module in modules:
        if blocks and (not _has_matrix(module) or not any(_has_matrix(m) for m in blocks[-1])):
            blocks[-1].append(module)
        else:
            blocks.append([module])
    if not _has_matrix(nn.ModuleList(blocks[0])):
        raise HostError(f"{_HELP}; none of the blocks of {type(encoder).__name__} has a weight matrix")
    _check_ownership(encoder, blocks)
    return blocks


def _ordered_modules(encoder: nn.Module) -> list[nn.Module]:
    named = getattr(encoder, "blocks", None)
    if named is not None:
        if isinstance(named, (nn.ModuleList, nn.Sequential, list, tuple)):
            return list(named)
        raise HostError(f"{_HELP}; found 'blocks' of type {type(named).__name__} in {type(encoder).__name__}")
    if isinstance(encoder, nn.Sequential) and type(encoder).forward is nn.Sequential.forward:
        return list(encoder)
    if all(isinstance(getattr(encoder, name, None), nn.Module) for name in (*_RESNET_STEM, *_RESNET_STAGES)):
        return [getattr(encoder, name) for name in _RESNET_STAGES]
    raise HostError(f"{_HELP}; found {type(encoder).__name__}, which is neither")


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters())


def _check_ownership(encoder: nn.Module, blocks: list[list[nn.Module]]) -> None:
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in nn.ModuleList(block).parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise HostError(
                    f"blocks {owner[id(parameter)] + 1} and {index + 1} of {type(encoder).__name__} share a weight, so "
                    "they cannot branch apart; put them into one block"
                )
    outside = [name for name, p in encoder.named_parameters() if id(p) not in owner]
    if outside and not hasattr(encoder, "before_blocks") and not _is_resnet(encoder):
        raise HostError(
            f"weight {outside[0]!r} of {type(encoder).__name__} is in none of its blocks: move it into the first one, or "
            "define before_blocks(x) if it is a stem that comes before them"
        )


def _is_resnet(encoder: nn.Module) -> bool:
    return not hasattr(encoder, "blocks") and hasattr(encoder, "layer1")


def run(module: nn.Module, x: Any) -> Any:
    """Return a module's output; of a recurrent layer's (outputs, state) the outputs."""
    out = module(x)
    return out[0] if isinstance(out, tuple) and isinstance(module, nn.RNNBase) else out


class _Chain(nn.Sequential):
    """Modules in a row, one block."""

    def forward(self, x: Any) -> Any:
        for module in self:
            x = run(module, x)
        return x


class _Taken(nn.Module):
    """Marks the place that a block had in its encoder; replays a recorded call while the chain is checked."""

    call: tuple[Any, Any] | None = None
    agreed = True

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        if self.call is None:
            raise HostError("this encoder's blocks belong to a FairBranch model now; run the model")
        seen, out = self.call
        self.agreed = _same(x, seen)
        self.call = None
        return out


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _take(encoder: nn.Module, modules: list[nn.Module]) -> list[_Taken]:
    """Leave a mark in the encoder where each of its modules was, so that no weight has two owners."""
    paths = {id(module): path for path, module in encoder.named_modules()}
    marks = []
    for module in modules:
        if id(module) not in paths:
            raise HostError(f"{_HELP}; a block of {type(encoder).__name__} is not one of its submodules")
        parent, _, name = paths[id(module)].rpartition(".")
        marks.append(_Taken())
        encoder.get_submodule(parent)._modules[name] = marks[-1]
    return marks


class BranchedEncoder(nn.Module):
    """An encoder whose blocks exist in one copy a task group. State names: ``levels.<block>.<copy>``, ``frame``.

    Parameters
    ----------
    encoder : as LibMTL's ``encoder_class()`` made it; its blocks move into this module.
    tasks : in task order.
    """

    def __init__(self, encoder: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        blocks = find_blocks(encoder)
        self.tree = BranchTree.start(tasks, len(blocks))
        self.levels = nn.ModuleList(
            nn.ModuleList([block[0] if len(block) == 1 else _Chain(*block)]) for block in blocks
        )
        modules = [module for block in blocks for module in block]
        self._unchecked = [] if type(encoder).forward is nn.Sequential.forward else modules
        self._places = _take(encoder, modules)
        self._parents = _parents(self.tree)
        self.frame = encoder

    def forward(self, x: Any, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return task -> representation; tasks of one leaf get the same tensor. Every copy runs at most once.

        Raises
        ------
        HostError : the encoder's own forward is not the chain of its blocks, or a block changes its input in place.
        """
        wanted = self.tree.tasks if tasks is None else tuple(tasks)
        if self._unchecked and not self._is_random() and (wanted[0] == self.tree.tasks[0] or self.tree.n_branches == 0):
            return self._checked_forward(x, wanted)
        return self._forward(x, wanted)

    def _forward(self, x: Any, wanted: Sequence[str]) -> dict[str, Tensor]:
        everyone = len(wanted) == len(self.tree.tasks)
        below = {0: self._before(x)}
        for level in range(self.tree.n_blocks):
            copies, above = self.copies(level), {}
            for index, group in enumerate(self.tree.levels[level]):
                if everyone or any(task in wanted for task in group):
                    source = below[self._parents[level][index]]
                    before = _version(source)
                    above[index] = run(copies[index], source)
                    if len(copies) > 1 and _version(source) != before:
                        raise HostError(
                            f"block {level + 1} changes its input in place, which its other copies need too: use inplace=False"
                        )
            below = above
        ends = {index: self._after(out) for index, out in below.items()}
        return {task: ends[i] for i, group in enumerate(self.tree.leaves) for task in group if task in wanted}

    def _before(self, x: Any) -> Any:
        before: Any = getattr(self.frame, "before_blocks", None)
        if before is not None:
            return before(x)
        if _is_resnet(self.frame):
            for name in _RESNET_STEM:
                x = getattr(self.frame, name)(x)
        return x

    def _after(self, x: Any) -> Any:
        after: Any = getattr(self.frame, "after_blocks", None)
        return x if after is None else after(x)

    def _is_random(self) -> bool:
        """Whether a second run of the encoder's frame would differ: dropout outside the blocks."""
        return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training for m in self.frame.modules())

    def _checked_forward(self, x: Any, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Run the chain and let the encoder's own forward replay it: what it asks each block for must be the same."""
        calls: dict[int, tuple[Any, Any]] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            calls[id(module)] = (args[0], out)

        handles = [m.register_forward_hook(keep) for m in self._unchecked]
        try:
            reps = self._forward(x, wanted)
        finally:
            for handle in handles:
                handle.remove()
        buffers = [b.clone() for b in self.frame.buffers()]
        with torch.no_grad():
            for place, module in zip(self._places, self._unchecked):
                place.call, place.agreed = calls[id(module)], True
            try:
                own = self.frame(x)
            finally:
                unused = [place for place in self._places if place.call is not None]
                for place in self._places:
                    place.call = None
            for buffer, saved in zip(self.frame.buffers(), buffers):
                buffer.copy_(saved)
        if unused or not all(place.agreed for place in self._places) or not _same(own, reps[wanted[0]]):
            raise HostError(
                f"{type(self.frame).__name__}.forward does more than run its blocks in order: put the rest into the blocks, "
                "or into before_blocks(x) and after_blocks(x)"
            )
        self._unchecked = []
        return reps

    def copies(self, level: int) -> list[nn.Module]:
        """Return the copies of one block, in the order of the tree's groups."""
        found = self.levels[level]
        assert isinstance(found, nn.ModuleList)
        return list(found)

    def parameters_of(self, places: Iterable[tuple[int, int]]) -> list[nn.Parameter]:
        """Return the parameters of some (block, copy)."""
        return [p for level, index in places for p in self.copies(level)[index].parameters()]

    def trunk_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that every task shares because no event has reached them: stem and trunk."""
        return [*self.frame.parameters(), *self.parameters_of((level, 0) for level in range(self.tree.depth))]

    def grow(self, tree: BranchTree) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Take the shape of another tree of the same tasks; return (parameter, its new copy).

        A group takes the copy that its first task runs through: as it is if no other group has, else a deep copy of
        weights, norms and buffers.

        Raises
        ------
        HostError : a tree of other tasks, or of another number of blocks.
        """
        if tree.tasks != self.tree.tasks or tree.n_blocks != self.tree.n_blocks:
            raise HostError(
                f"branch tree of {tree.n_blocks} blocks and tasks {', '.join(tree.tasks)} does not fit an encoder of "
                f"{self.tree.n_blocks} blocks and tasks {', '.join(self.tree.tasks)}"
            )
        made: list[tuple[nn.Parameter, nn.Parameter]] = []
        for level, groups in enumerate(tree.levels):
            held, taken, new = self.copies(level), set(), []
            for group in groups:
                source = self.tree.path(group[0])[level]
                module = held[source]
                if source in taken:
                    module = copy.deepcopy(module)
                    made += list(zip(held[source].parameters(), module.parameters()))
                taken.add(source)
                new.append(module)
            self.levels[level] = nn.ModuleList(new)
        self.tree, self._parents = tree, _parents(tree)
        return made


def _parents(tree: BranchTree) -> list[list[int]]:
    """Return, for each copy of each block, which copy below it gets its input from."""
    return [
        [tree.parent(level, index) if level else 0 for index in range(len(groups))]
        for level, groups in enumerate(tree.levels)
    ]


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0
