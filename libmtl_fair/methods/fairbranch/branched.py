"""A branched encoder: each block exists once a group of tasks.

The encoder's own ``forward`` runs, with a mark in the place of each block that calls the copy of the task's branch; what an
earlier branch did below the point where they part is replayed and not run again. Where the first forward shows that the
blocks are a chain, one after another and nothing between, they are run as one, and copies of linear layers as one product.
A chain may have ``before_blocks(x)`` (a stem, always shared) and ``after_blocks(x)`` (pooling, the last step of a sequence;
without weights). Of a recurrent layer in a chain the outputs go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from libmtl_fair.errors import HostError
from libmtl_fair.libmtl.joint_heads import listeners_of
from libmtl_fair.methods.fairbranch.blocks import HELP, find_blocks, is_sequential
from libmtl_fair.methods.fairbranch.tree import BranchTree

T = TypeVar("T")
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)


def run(module: nn.Module, x: object) -> Tensor:
    """Return a module's output; of a recurrent layer's (outputs, state) the outputs."""
    return _carried(module, module(x))


def _carried(module: nn.Module, out: Any) -> Tensor:
    made: Tensor = out[0] if isinstance(out, tuple) and isinstance(module, nn.RNNBase) else out
    return made


class _Chain(nn.Sequential):
    """Modules in a row, one block."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = run(module, x)
        return x


class _Place(nn.Module):
    """Marks the place that a block's module had in its encoder: ``order`` among all of them, ``level``, part of the block.

    While an encoder's forward is run for a leaf, the leaf's own copies stand in the marks' places (:meth:`BranchedEncoder._standing`).
    """

    def __init__(self, order: int, level: int, part: int | None, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.order, self.level, self.part, self.paths = order, level, part, paths

    def forward(self, *_: object, **__: object) -> object:
        raise HostError(
            f"this encoder's blocks belong to a FairBranch model now; run the model ({self.paths[0]!r} was called by itself). Where the "
            "encoder checkpoints activations: checkpoint(self.block, x, use_reentrant=False), a block alone"
        )

    def take(self, copies: Sequence[nn.Module], index: int) -> nn.Module:
        """Return the module that stands here in one copy of the block."""
        block = copies[index]
        return block if self.part is None else block.get_submodule(str(self.part))


class _Call(NamedTuple):
    """One call of a module: which, with what, the first argument's version then, and what came out."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    version: int
    out: Any


class _Walk:
    """One run of an encoder's own forward for one leaf; the first ``shared`` calls of an earlier leaf's are replayed."""

    def __init__(
        self, encoder: BranchedEncoder, path: Sequence[int], earlier: Sequence[_Call] = (), level: int = 0
    ) -> None:
        self.encoder, self.path, self.level, self.calls = encoder, path, level, list[_Call]()
        self.blocks = 0
        parted = (i for i, call in enumerate(earlier) if isinstance(call.module, _Place) and call.module.level >= level)
        self.shared = next(parted, 0)
        self.earlier = earlier

    def block(self, places: Sequence[_Place], call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """Run the copy of this leaf's in a block's place: in one of these, where one module stands in several."""
        place = next((place for place in places if place.order == self.blocks), None)
        if place is None:
            raise self.encoder.out_of_order(self.blocks, places[0])
        self.blocks += 1
        if (known := self._known(place)) is not None:
            return known
        if self.earlier and len(self.calls) == self.shared:  # where the branches part: what the other one got
            earlier = self.earlier[self.shared]
            args, kwargs = earlier.args, earlier.kwargs
            self._check(place, args, earlier.version)
        version = _version(args)
        out = call(*args, **kwargs)
        if len(self.encoder.copies(place.level)) > 1 and not place.part:
            self._check(place, args, version)
        self.calls.append(_Call(place, args, kwargs, version, out))
        return out

    def other(self, module: nn.Module, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """Run a module between the blocks, or below them."""
        if (known := self._known(module)) is not None:
            return known
        out = call(*args, **kwargs)
        self.calls.append(_Call(module, args, kwargs, 0, out))
        return out

    def _known(self, module: nn.Module) -> object:
        at = len(self.calls)
        if at >= self.shared:
            return None
        if self.earlier[at].module is not module:
            raise HostError(
                f"the forward of {type(self.encoder.frame).__name__} does not call the same modules each time"
            )
        self.calls.append(self.earlier[at])
        return self.earlier[at].out

    def _check(self, place: _Place, args: tuple[Any, ...], version: int) -> None:
        if _version(args) != version:
            raise HostError(
                f"block {place.level + 1} changes its input in place, which its other copies need too: use inplace=False"
            )


class BranchedEncoder(nn.Module):
    """An encoder whose blocks exist in one copy a task group. State names: ``levels.<block>.<copy>``, ``frame``.

    The blocks of ``encoder``, as LibMTL's ``encoder_class()`` made it, move into this module. ``blocks`` are their paths,
    where the encoder does not say.
    """

    def __init__(self, encoder: nn.Module, tasks: Sequence[str], blocks: Sequence[str] | None = None) -> None:
        super().__init__()
        found = find_blocks(encoder, blocks)
        self.tree = BranchTree.start(tasks, len(found))
        self.levels = nn.ModuleList(nn.ModuleList([block[0] if len(block) == 1 else _Chain(*block)]) for block in found)
        self.is_chain = True if is_sequential(encoder) else None
        self._places = _take(encoder, found)
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
        if self.is_chain:
            return self._run(x, wanted, together and len(wanted) == len(self.tree.tasks))
        return self._walked(x, wanted), None

    def _walked(self, x: object, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Run the encoder's own forward once a leaf."""
        reps: dict[str, Tensor] = {}
        walks: list[_Walk] = []
        leaves = [group for group in self.tree.leaves if any(task in wanted for task in group)]
        others = [(m, m) for m in _outermost(self.frame)] if len(leaves) > 1 else []
        for group in leaves:
            path, level, earlier = self.tree.path(group[0]), 0, list[_Call]()
            for walk in walks:
                parts = next(i for i, (a, b) in enumerate(zip(path, walk.path)) if a != b)
                level, earlier = (parts, walk.calls) if parts >= level else (level, earlier)
            walk = _Walk(self, path, earlier, level)
            walks.append(walk)
            with self._standing(walk), _heard(others, walk.other):
                out = self.frame(x)
            if walk.blocks != len(self._places):
                raise self.out_of_order(walk.blocks)
            if self.is_chain is None:
                self.is_chain = self._chained(x, walk, out)
            reps |= {task: out for task in group if task in wanted}
        return reps

    @contextmanager
    def _standing(self, walk: _Walk) -> Iterator[None]:
        """Let the copies of the walk's leaf stand in the encoder, whose forward may look at them; their calls go through the walk."""
        stands = [place.take(self.copies(place.level), walk.path[place.level]) for place in self._places]
        places: dict[nn.Module, list[_Place]] = {}
        for module, place in zip(stands, self._places):
            places.setdefault(module, []).append(place)
        _put(self.frame, self._places, stands)
        try:
            with _heard(places.items(), walk.block):
                yield
        finally:
            _put(self.frame, self._places, self._places)

    def out_of_order(self, expected: int, found: _Place | None = None) -> HostError:
        """Return the error for an encoder that does not run its blocks as they are named."""
        called = "nothing" if found is None else repr(found.paths[0])
        next_one = repr(self._places[expected].paths[0]) if expected < len(self._places) else "no further block"
        return HostError(
            f"{type(self.frame).__name__}.forward does not run each of its blocks once and in their order ({called} was called where "
            f"{next_one} was expected): give their paths, in the order of the calls, as 'blocks' of the encoder or "
            "arch_args={'blocks': [...]}; what is in none stays shared"
        )

    def _chained(self, x: object, walk: _Walk, out: object) -> bool:
        """Whether the forward that was just run is no more than the blocks in a row, after a stem and before a last step."""
        calls = [(call, call.module) for call in walk.calls if isinstance(call.module, _Place)]
        made = [_carried(place.take(self.copies(place.level), 0), call.out) for call, place in calls]
        given = [call.args[0] if len(call.args) == 1 and not call.kwargs else None for call, _ in calls]
        if any(a is not b for a, b in zip(made, given[1:])):
            return False
        before, after = (getattr(self.frame, name, None) for name in ("before_blocks", "after_blocks"))
        if before is None and after is None:
            return given[0] is x and out is made[-1]
        random = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training for m in self.frame.modules())
        with torch.no_grad(), _own_buffers(self.frame):
            stem, last = (x if before is None else before(x)), (made[-1] if after is None else after(made[-1]))
        return random or (_same(stem, given[0]) and _same(last, out))

    def _run(self, x: object, wanted: Sequence[str], together: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
        before, after = (getattr(self.frame, name, None) for name in ("before_blocks", "after_blocks"))
        below: list[Any] = [x if before is None else before(x)]
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
                    version = _version((source,))
                    above[index] = run(copies[index], source)
                    if len(copies) > 1 and _version((source,)) != version:
                        raise HostError(
                            f"block {level + 1} changes its input in place, which its other copies need too: use inplace=False"
                        )
            below = above
        below = below if joint is None else list(joint.unbind())
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
                new.append(_copied(source) if source in new else source)
                if new[-1] is not source:
                    made += zip(source.parameters(), new[-1].parameters())
            self.levels[level] = nn.ModuleList(new)
        self.tree = tree
        return made


def _copied(module: nn.Module) -> nn.Module:
    """Return a deep copy, without what the last forward left on modules (the weight that ``torch.nn.utils.weight_norm`` makes)."""
    held = [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(module, {id(v): v.detach().clone() for v in held})


def _version(args: Sequence[object]) -> int:
    x = args[0] if args else None
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _same(a: object, b: object) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))


def _take(encoder: nn.Module, blocks: Sequence[Sequence[nn.Module]]) -> list[_Place]:
    """Leave a mark in the encoder where each of its modules was, so that no weight has two owners."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in encoder.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    stands = [module for block in blocks for module in block]
    places: list[_Place] = []
    for level, block in enumerate(blocks):
        for part, module in enumerate(block):
            if module not in paths:
                raise HostError(f"{HELP}; a block of {type(encoder).__name__} is not one of its submodules")
            own, levels = tuple(paths[module]), [i for i, each in enumerate(blocks) if module in each]
            if len(levels) > len(own):
                raise HostError(
                    f"{own[0]!r} of {type(encoder).__name__} is part of blocks {', '.join(str(i + 1) for i in levels)}: give each block "
                    "a module of its own"
                )
            if stands.count(module) == len(own):  # one path each time
                own = own[stands[: len(places)].count(module) :][:1]
            places.append(_Place(len(places), level, part if len(block) > 1 else None, own))
    _put(encoder, places, places)
    return places


def _put(encoder: nn.Module, places: Sequence[_Place], modules: Sequence[nn.Module]) -> None:
    """Let modules stand in the encoder where these places are."""
    for place, module in zip(places, modules):
        for path in place.paths:
            parent, _, name = path.rpartition(".")
            encoder.get_submodule(parent)._modules[name] = module


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules below that hold no block, outermost ones only."""
    for child in module.children():
        if any(isinstance(m, _Place) for m in child.modules()):
            if not isinstance(child, _Place):
                yield from _outermost(child)
        else:
            yield child


@contextmanager
def _heard(
    modules: Iterable[tuple[nn.Module, T]], ask: Callable[[T, Any, tuple[Any, ...], Mapping[str, Any]], object]
) -> Iterator[None]:
    """Let calls of modules, hooks and all, go to ``ask``, with what stands beside each and the module's own call."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    for module, beside in modules:
        own = vars(module)
        name = "_call_impl" if own.get("_compiled_call_impl") is None else "_compiled_call_impl"
        held.append((own, name, own.get(name)))
        own[name] = partial(_asked, ask, beside, getattr(module, name))
    try:
        yield
    finally:
        for own, name, before in held:
            if before is None:
                del own[name]
            else:
                own[name] = before


def _asked(ask: Callable[..., object], beside: object, call: Any, *args: Any, **kwargs: Any) -> object:
    return ask(beside, call, args, kwargs)


@contextmanager
def _own_buffers(module: nn.Module) -> Iterator[None]:
    """Let a module write into copies of its buffers, and forget them."""
    held = [(m, dict(m._buffers)) for m in module.modules()]
    for m, buffers in held:
        m._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for m, buffers in held:
            m._buffers.update(buffers)


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
