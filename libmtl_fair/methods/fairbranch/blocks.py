"""Encoders as ordered blocks: how blocks are found, and a branched encoder that runs each copy once.

An encoder is a chain of blocks: an ``nn.Sequential``, or a module with ordered ``blocks`` (``nn.ModuleList``,
``nn.Sequential``, or any sequence of its own submodules). It may do more than its blocks in ``before_blocks(x)`` (a stem,
always shared) and ``after_blocks(x)`` (pooling, the last step of a sequence; without weights). A recurrent layer in
``blocks`` passes on its outputs. The first forward checks that the chain is what the encoder's own forward computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.joint_heads import listeners_of
from libmtl_fair.methods.fairbranch.tree import BranchTree

_RESNET_STEM = ("conv1", "bn1", "relu", "maxpool")
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)
_HELP = (
    "FairBranch needs an encoder made of ordered blocks: an nn.Sequential, or a module with 'blocks' "
    "(nn.ModuleList or nn.Sequential; see libmtl_fair.models.MLP)"
)


def find_blocks(encoder: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks of an encoder, each a list of the modules that it chains.

    A module without a weight matrix (norm, activation, dropout, pooling) belongs to the block before it.
    """
    modules, name = _ordered_modules(encoder), type(encoder).__name__
    strange = [type(m).__name__ for m in modules if not isinstance(m, nn.Module)]
    if strange or not modules:
        raise HostError(f"{_HELP}; found {strange[0] if strange else 'an empty list'} in {name}")
    blocks: list[list[nn.Module]] = []
    for module in modules:
        if blocks and (not _has_matrix(module) or not any(_has_matrix(m) for m in blocks[-1])):
            blocks[-1].append(module)
        else:
            blocks.append([module])
    if not any(_has_matrix(m) for m in blocks[0]):
        raise HostError(f"{_HELP}; none of the blocks of {name} has a weight matrix")
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks, start=1):
        for parameter in nn.ModuleList(block).parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise HostError(
                    f"blocks {owner[id(parameter)]} and {index} of {name} share a weight, so they cannot branch apart; "
                    "put them into one block"
                )
    outside = [path for path, p in encoder.named_parameters() if id(p) not in owner]
    if outside and not hasattr(encoder, "before_blocks") and not _is_resnet(encoder):
        raise HostError(
            f"weight {outside[0]!r} of {name} is in none of its blocks: move it into the first one, or define "
            "before_blocks(x) if it is a stem that comes before them"
        )
    return blocks


def _ordered_modules(encoder: nn.Module) -> list[nn.Module]:
    named = getattr(encoder, "blocks", None)
    if isinstance(named, (nn.ModuleList, nn.Sequential, list, tuple)):
        return list(named)
    if named is not None:
        raise HostError(f"{_HELP}; found 'blocks' of type {type(named).__name__} in {type(encoder).__name__}")
    if isinstance(encoder, nn.Sequential) and type(encoder).forward is nn.Sequential.forward:
        return list(encoder)
    if _is_resnet(encoder):
        return [encoder.get_submodule(stage) for stage in _RESNET_STAGES]
    raise HostError(f"{_HELP}; found {type(encoder).__name__}, which is neither")


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters())


def _is_resnet(encoder: nn.Module) -> bool:
    """Whether an encoder without ``blocks`` has the parts of a ResNet, torchvision's or LibMTL's."""
    parts = (getattr(encoder, part, None) for part in (*_RESNET_STEM, *_RESNET_STAGES))
    return not hasattr(encoder, "blocks") and all(isinstance(part, nn.Module) for part in parts)


def run(module: nn.Module, x: object) -> Tensor:
    """Return a module's output; of a recurrent layer's (outputs, state) the outputs."""
    out = module(x)
    made: Tensor = out[0] if isinstance(out, tuple) and isinstance(module, nn.RNNBase) else out
    return made


class _Chain(nn.Sequential):
    """Modules in a row, one block."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = run(module, x)
        return x


class _Taken(nn.Module):
    """Marks the place that a block had in its encoder; replays a recorded call while the chain is checked."""

    call: tuple[object, object] | None = None
    agreed = True

    def forward(self, x: object, *_: object, **__: object) -> object:
        if self.call is None:
            raise HostError("this encoder's blocks belong to a FairBranch model now; run the model")
        seen, out = self.call
        self.agreed, self.call = _same(x, seen), None
        return out


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _take(encoder: nn.Module, modules: list[nn.Module]) -> list[_Taken]:
    """Leave a mark in the encoder where each of its modules was, so that no weight has two owners."""
    paths = {id(module): path for path, module in encoder.named_modules()}
    marks = [_Taken() for _ in modules]
    for module, mark in zip(modules, marks):
        if id(module) not in paths:
            raise HostError(f"{_HELP}; a block of {type(encoder).__name__} is not one of its submodules")
        parent, _, name = paths[id(module)].rpartition(".")
        encoder.get_submodule(parent)._modules[name] = mark
    return marks


class BranchedEncoder(nn.Module):
    """An encoder whose blocks exist in one copy a task group. State names: ``levels.<block>.<copy>``, ``frame``.

    The blocks of ``encoder``, as LibMTL's ``encoder_class()`` made it, move into this module.
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
        self._known: dict[int, tuple[list[list[nn.Module]], bool, list[Mapping[int, object]]]] = {}
        self.frame = encoder

    def forward(self, x: object, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return task -> representation; tasks of one leaf get the same tensor. Every copy runs at most once."""
        return self.run(x, tasks, together=False)[0]

    def run(
        self, x: object, tasks: Iterable[str] | None = None, together: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return what :meth:`forward` does, and the leaves' representations [n, B, d] where they were made as one.

        ``together`` lets one product run all copies of a block, where they are plain and all are asked for: the same up to
        rounding, but a gradient of one task then costs that of all.
        """
        wanted = self.tree.tasks if tasks is None else tuple(tasks)
        if self._unchecked and not self._is_random() and (wanted[0] == self.tree.tasks[0] or self.tree.n_branches == 0):
            return self._checked(x, wanted), None
        return self._run(x, wanted, together and len(wanted) == len(self.tree.tasks))

    def _run(self, x: object, wanted: Sequence[str], together: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
        below: list[Any] = [self._before(x)]
        joint: Tensor | None = None
        for level, groups in enumerate(self.tree.levels):
            copies, parents = self.copies(level), self.tree.parents[level]
            chains = self._chains(level, copies) if together and len(copies) > 1 else []
            if chains and (joint is not None or all(isinstance(h, Tensor) and h.dim() == 2 for h in below)):
                joint = _run_joint(chains, below, joint, parents)
                continue
            below, joint = (below if joint is None else list(joint.unbind())), None
            above: list[Any] = [None] * len(copies)
            for index, group in enumerate(groups):
                if any(task in wanted for task in group):
                    source = below[parents[index]]
                    before = _version(source)
                    above[index] = run(copies[index], source)
                    if len(copies) > 1 and _version(source) != before:
                        raise HostError(
                            f"block {level + 1} changes its input in place, which its other copies need too: use inplace=False"
                        )
            below = above
        below = below if joint is None else list(joint.unbind())
        after = getattr(self.frame, "after_blocks", None)
        if after is not None:
            below, joint = [out if out is None else after(out) for out in below], None
        return {task: below[i] for i, group in enumerate(self.tree.leaves) for task in group if task in wanted}, joint

    def _chains(self, level: int, copies: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """Return the layers of each copy if one product may run them: a linear one first, and nobody listens to any."""
        plain = (nn.Sequential.forward, _Chain.forward)
        chains = [[*m] if isinstance(m, nn.Sequential) and type(m).forward in plain else [m] for m in copies]
        if level not in self._known or self._known[level][0] != chains:
            layers = [(place, m) for chain in chains for place, m in enumerate(chain)]
            fits = all(
                (type(m) is nn.Linear and m.bias is not None) or (i and type(m) in _ELEMENTWISE) for i, m in layers
            )
            listeners = [hooks for m in (*copies, *(m for _, m in layers)) for hooks in listeners_of(m)]
            self._known[level] = chains, fits, listeners
        _, fits, listeners = self._known[level]
        return chains if fits and not any(listeners) else []

    def _before(self, x: object) -> object:
        before = getattr(self.frame, "before_blocks", None)
        if before is not None:
            return before(x)
        for name in _RESNET_STEM if _is_resnet(self.frame) else ():
            x = self.frame.get_submodule(name)(x)
        return x

    def _is_random(self) -> bool:
        """Whether a second run of the encoder's frame would differ: dropout outside the blocks."""
        return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training for m in self.frame.modules())

    def _checked(self, x: object, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Run the chain and let the encoder's own forward replay it: what it asks each block for must be the same."""
        calls: dict[nn.Module, tuple[object, object]] = {}

        def keep(module: nn.Module, args: tuple[object, ...], out: object) -> None:
            calls[module] = (args[0], out)

        handles = [m.register_forward_hook(keep) for m in self._unchecked]
        try:
            reps, _ = self._run(x, wanted)
        finally:
            for handle in handles:
                handle.remove()
        buffers = [b.clone() for b in self.frame.buffers()]
        for place, module in zip(self._places, self._unchecked):
            place.call, place.agreed = calls[module], True
        try:
            with torch.no_grad():
                own = self.frame(x)
        finally:
            agreed = all(place.call is None and place.agreed for place in self._places)
            for place in self._places:
                place.call = None
        for buffer, saved in zip(self.frame.buffers(), buffers):
            buffer.copy_(saved)
        if not agreed or not _same(own, reps[wanted[0]]):
            raise HostError(
                f"{type(self.frame).__name__}.forward does more than run its blocks in order: put the rest into the blocks, "
                "or into before_blocks(x) and after_blocks(x)"
            )
        self._unchecked = []
        return reps

    def copies(self, level: int) -> list[nn.Module]:
        """Return the copies of one block, in the order of the tree's groups."""
        return list(self.levels[level].children())

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
        """
        if tree.tasks != self.tree.tasks or tree.n_blocks != self.tree.n_blocks:
            raise HostError(
                f"branch tree of {tree.n_blocks} blocks and tasks {', '.join(tree.tasks)} does not fit an encoder of "
                f"{self.tree.n_blocks} blocks and tasks {', '.join(self.tree.tasks)}"
            )
        made: list[tuple[nn.Parameter, nn.Parameter]] = []
        for level, groups in enumerate(tree.levels):
            held, new = self.copies(level), []
            for group in groups:
                source = held[self.tree.path(group[0])[level]]
                new.append(copy.deepcopy(source) if source in new else source)
                if new[-1] is not source:
                    made += zip(source.parameters(), new[-1].parameters())
            self.levels[level] = nn.ModuleList(new)
        self.tree = tree
        return made


def _version(x: object) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _run_joint(chains: list[list[nn.Module]], below: list[Tensor], joint: Tensor | None, parents: list[int]) -> Tensor:
    """Run all copies of a block at once; return their outputs [n, B, d]. ``joint`` are the outputs below, if they are one."""
    if joint is not None:
        x = joint if parents == [*range(len(joint))] else joint[parents]
    elif len(set(parents)) == 1:
        x = below[parents[0]].expand(len(parents), *below[0].shape)
    else:
        x = torch.stack([below[parent] for parent in parents])
    for layers in zip(*chains):
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        x = joint_linear(linear, x) if linear else layers[0](x)
    return x


def joint_linear(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Run linear layers of one shape on their own inputs [n, B, d], as one product: [n, B, c]."""
    weight, bias = torch.stack([m.weight for m in layers]), torch.stack([m.bias for m in layers])
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
