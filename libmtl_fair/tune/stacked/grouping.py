"""Which members of a stack have their gradients computed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from libmtl_fair.tune.stacked import fairmt, heads, relif
from libmtl_fair.tune.stacked.members import Member
from libmtl_fair.tune.stacked.parts import Own, Part, Plain

_Key = Callable[[Member], tuple[Any, ...] | None]


def _plain(member: Member) -> tuple[Any, ...] | None:
    return ("EW",) if member.plain else None


_KINDS: Sequence[tuple[_Key, type[Part]]] = (
    (_plain, Plain),
    (relif.key, relif.ReLiFPart),
    (fairmt.key, fairmt.FairMTPart),
    (heads.key, heads.HeadsPart),
)


def parts_of(members: Sequence[Member]) -> list[Part]:
    """Return the parts of a stack, each with the places of its members."""
    groups: dict[tuple[Any, ...], tuple[type[Part], list[int]]] = {}
    for place, member in enumerate(members):
        found = ((key(member), kind) for key, kind in _KINDS)
        key, kind = next(((k, kind) for k, kind in found if k is not None), (("own", place), Own))
        groups.setdefault(key, (kind, []))[1].append(place)
    return [kind(places, [members[m] for m in places]) for kind, places in groups.values()]
