"""Which modules of an encoder are its blocks, in order.

An encoder says so in ``blocks``: an ``nn.ModuleList``, an ``nn.Sequential``, or any sequence of its own submodules or of
their paths (``["resnet.layer1", "resnet.layer2", "hidden"]``). Without it they are found: the children of an
``nn.Sequential``, the stages of a ResNet wherever it stands, else the children that hold weights, in the order in which they
were made. What is in no block (a ResNet's stem) stays shared by all tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from libmtl_fair.errors import HostError, unknown

_RESNET_STEM = ("conv1", "bn1")
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
HELP = (
    "FairBranch needs an encoder made of ordered blocks: an nn.Sequential, or a module with 'blocks' (nn.ModuleList or "
    "nn.Sequential, see libmtl_fair.models.MLP; or paths of submodules, also as arch_args['blocks'])"
)


def find_blocks(encoder: nn.Module, paths: Sequence[str] | None = None) -> list[list[nn.Module]]:
    """Return the blocks of an encoder, each a list of the modules that it chains.

    A module without a weight matrix (norm, activation, dropout, pooling) belongs to the block before it.

    Parameters
    ----------
    encoder : nn.Module
        As ``encoder_class()`` made it.
    paths : sequence of str, optional
        Where the blocks are in the encoder, in the order in which its forward runs them. None: as ``encoder.blocks``
        says, or as found.

    Raises
    ------
    HostError
        No blocks; a path without a module; a weight that two blocks share, or one outside of modules given as ``blocks``.
    """
    name, named = type(encoder).__name__, getattr(encoder, "blocks", None) if paths is None else paths
    modules = _ordered_modules(encoder, named)
    strange = [type(m).__name__ for m in modules if not isinstance(m, nn.Module)]
    if strange or not modules:
        raise HostError(f"{HELP}; found {strange[0] if strange else 'an empty list'} in {name}")
    blocks: list[list[nn.Module]] = []
    for module in modules:
        if blocks and (not has_matrix(module) or not any(has_matrix(m) for m in blocks[-1])):
            blocks[-1].append(module)
        else:
            blocks.append([module])
    if not any(has_matrix(m) for m in blocks[0]):
        raise HostError(f"{HELP}; none of the blocks of {name} has a weight matrix")
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks, start=1):
        for parameter in nn.ModuleList(block).parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise HostError(
                    f"blocks {owner[id(parameter)]} and {index} of {name} share a weight, so they cannot branch apart; "
                    "put them into one block"
                )
    outside = [path for path, p in encoder.named_parameters() if id(p) not in owner]
    given = named is not None and modules == list(named)
    if outside and given and not hasattr(encoder, "before_blocks"):
        raise HostError(
            f"weight {outside[0]!r} of {name} is in none of its blocks: move it into the first one, or define before_blocks(x) "
            "if it is a stem that comes before them; where blocks are named by path, what is in none stays shared"
        )
    return blocks


def _ordered_modules(encoder: nn.Module, named: object) -> list[nn.Module]:
    if isinstance(named, (nn.ModuleList, nn.Sequential, list, tuple)):
        return [_at(encoder, module) if isinstance(module, str) else module for module in named]
    if named is not None:
        raise HostError(f"{HELP}; found 'blocks' of type {type(named).__name__} in {type(encoder).__name__}")
    if isinstance(encoder, nn.Sequential) and is_sequential(encoder):
        return list(encoder)
    found = list(dict.fromkeys(_found(encoder)))  # a part may have two names
    if not found:
        raise HostError(f"{HELP}; found {type(encoder).__name__}, which is neither")
    return found


def _at(encoder: nn.Module, path: str) -> nn.Module:
    try:
        return encoder.get_submodule(path)
    except AttributeError:
        there = [name for name, module in encoder.named_modules() if name and has_matrix(module)]
        raise HostError(f"FairBranch, {type(encoder).__name__}: {unknown('block', path, there)}") from None


def _found(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a module that hold weights: those of its own, or those of the one encoder that it wraps."""
    resnet = _is_resnet(module)
    parts = [m for name, m in module.named_children() if not (resnet and name in _RESNET_STEM)]
    parts = [m for m in parts if next(m.parameters(), None) is not None]
    alone = sum(map(has_matrix, parts)) == 1
    for part in parts:
        holds = isinstance(part, (nn.ModuleList, nn.ModuleDict))
        several = is_sequential(part) and sum(map(has_matrix, part.children())) > 1
        inner: list[nn.Module] = []
        if holds or (not resnet and has_matrix(part) and (alone or several or _is_resnet(part))):
            named = getattr(part, "blocks", None)
            inner = (
                _ordered_modules(part, named) if isinstance(named, (nn.ModuleList, nn.Sequential)) else [*_found(part)]
            )
        yield from inner or [part]


def is_sequential(module: nn.Module) -> bool:
    """Whether a module does no more than run its children in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def has_matrix(module: nn.Module) -> bool:
    """Whether a module has a weight of two or more dimensions; a lazy layer's are not known yet."""
    return any(is_lazy(p) or p.dim() >= 2 for p in module.parameters())


def _is_resnet(module: nn.Module) -> bool:
    """Whether a module has the parts of a ResNet, torchvision's or LibMTL's."""
    parts = (getattr(module, part, None) for part in (*_RESNET_STEM, *_RESNET_STAGES))
    return all(isinstance(part, nn.Module) for part in parts)
