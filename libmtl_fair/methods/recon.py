"""Recon: the blocks in which the tasks' gradients conflict most are made each task's own, and training starts anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Strict
from torch import Tensor, nn

from libmtl_fair.errors import DataError, HostError
from libmtl_fair.libmtl.loading import AbsArchitecture
from libmtl_fair.methods.base import Declared, setting
from libmtl_fair.methods.fairbranch.blocks import find_blocks, is_sequential
from libmtl_fair.methods.fairbranch.branched import run

if TYPE_CHECKING:
    import pandas as pd


class ReconSettings(Declared):
    """Hyperparameters of :class:`Recon`: LibMTL's ``arch_args``."""

    own: Annotated[tuple[int, ...], Strict(False)] = setting(
        (),
        "numbers, from 1 at the input, of the blocks that every task has a copy of: those with the highest conflict scores",
        expected="a list of whole numbers of at least 1, such as [2, 3]",
    )

    def check(self) -> None:
        """Refuse numbers that name no block, or one twice."""
        if len(set(self.own)) < len(self.own) or any(number < 1 for number in self.own):
            raise self.refused("own", f"own must be different whole numbers of at least 1, found {list(self.own)}")


class Recon(AbsArchitecture):  # type: ignore[misc]
    """Hard sharing in which some blocks of the encoder are each task's own.

    A block here takes the part of the source's layer. In a first training the conflicts are noted (FBGrad with ``strength: 0``,
    ``where: everywhere`` and ``record_conflicts: true`` trains as plain joint training does), :func:`conflicting_blocks` ranks the
    blocks, and the training with ``own`` starts from new weights. A block that is shared and follows one that is not is run for each
    task. The weightings' shared parameters are those of the shared blocks. Source: arXiv:2302.11289 (Shi et al., ICLR 2023).

    Raises
    ------
    HostError
        An encoder that is no chain of blocks, or that has fewer.
    RecipeError
        A setting out of range.
    """

    settings_class: ClassVar[type[ReconSettings]] = ReconSettings
    source: ClassVar[str] = "arXiv:2302.11289"
    cost: ClassVar[str] = "what comes after the first own block runs once a task"
    encoder: SplitEncoder

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
        settings = ReconSettings.from_args("Recon", kwargs)
        self.encoder = SplitEncoder(encoder_class(), len(task_name), settings.own)

    def get_share_params(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the blocks that all tasks share."""
        return self.encoder.shared_parameters()


class SplitEncoder(nn.Module):
    """A chain of blocks, of which some exist once a task; gives one representation, or a list of one a task."""

    def __init__(self, encoder: nn.Module, n_tasks: int, own: tuple[int, ...]) -> None:
        super().__init__()
        blocks = [nn.Sequential(*modules) for modules in find_blocks(encoder)]
        named = isinstance(getattr(encoder, "blocks", None), (nn.ModuleList, nn.Sequential))
        if not named and not is_sequential(encoder):
            raise HostError(
                "Recon needs an encoder that is a chain of blocks, an nn.Sequential or a module with 'blocks' (see "
                f"libmtl_fair.models.MLP); found {type(encoder).__name__}"
            )
        if too_high := [number for number in own if number > len(blocks)]:
            raise HostError(f"Recon: own names block {too_high[0]}, and the encoder has {len(blocks)}")
        self.frame = encoder
        encoder.__dict__["_modules"] = {n: m for n, m in encoder.named_children() if not _within(m, blocks)}
        copies = [[block, *(copy.deepcopy(block) for _ in range(n_tasks - 1))] for block in blocks]
        self.blocks = nn.ModuleList(
            nn.ModuleList(each if i in own else each[:1]) for i, each in enumerate(copies, start=1)
        )

    def copies(self) -> list[list[nn.Module]]:
        """Return the copies of each block: one, or one a task."""
        return [list(copies.children()) for copies in self.blocks]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return the representation [B, d], or one a task where a block is their own."""
        before, after = (getattr(self.frame, name, None) for name in ("before_blocks", "after_blocks"))
        streams = [x if before is None else before(x)]
        for copies in self.copies():
            wide = max(len(copies), len(streams))
            streams = [
                _run(copies[t if len(copies) > 1 else 0], streams[t if len(streams) > 1 else 0]) for t in range(wide)
            ]
        made = streams if after is None else [after(stream) for stream in streams]
        return made if len(made) > 1 else made[0]

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the stem and of the blocks that exist once."""
        yield from self.frame.parameters()
        for copies in self.copies():
            if len(copies) == 1:
                yield from copies[0].parameters()


def _run(block: nn.Module, x: Tensor) -> Tensor:
    for module in block.children():
        x = run(module, x)
    return x


def _within(module: nn.Module, blocks: list[nn.Sequential]) -> bool:
    """Whether a part of the encoder is, or holds nothing but, what the blocks hold."""
    taken = {id(inner) for block in blocks for inner in block.modules()}
    return id(module) in taken or (
        isinstance(module, (nn.ModuleList, nn.Sequential)) and all(id(inner) in taken for inner in module.children())
    )


def conflicting_blocks(conflicts: pd.DataFrame, top: int, threshold: float = 0.0) -> list[int]:
    """Return the numbers of the ``top`` blocks with the highest conflict scores, ascending: what ``own`` takes.

    A block's score is how often the cosine of two tasks' accuracy gradients is below ``threshold`` (the source's S), over task pairs
    and what was recorded: the source takes every iteration, a run's record has the first batch of each epoch **(ours)**. Equal scores
    go to the block nearer to the heads **(ours)**.

    Parameters
    ----------
    conflicts : DataFrame
        ``conflicts.csv`` of a run, or :meth:`~libmtl_fair.methods.fairbranch.conflicts.ConflictRecord.frame`: columns layer, kind, cosine.
    top : int
        How many, at most as many as there are.
    threshold : float, default 0.0
        In [-1, 1].

    Raises
    ------
    DataError
        Not a record of conflicts, or fewer blocks.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = [("block 1", "accuracy", 0.4), ("block 2", "accuracy", -0.3), ("block 2", "fairness", -1.0)]
    >>> conflicting_blocks(pd.DataFrame(rows, columns=["layer", "kind", "cosine"]), 1)
    [2]
    """
    if lacking := {"layer", "kind", "cosine"} - set(conflicts.columns):
        raise DataError(
            f"conflicts: expected the columns layer, kind and cosine, found no {', '.join(sorted(lacking))}"
        )
    rows = conflicts[conflicts["kind"] == "accuracy"]
    numbers = rows["layer"].str.extract(r"(\d+)$")[0].astype(int)
    scores = (rows["cosine"] < threshold).groupby(numbers).sum().sort_index(ascending=False)
    if not 0 < top <= len(scores):
        raise DataError(f"top must be from 1 to the number of recorded blocks, {len(scores)}, found {top}")
    return sorted(int(number) for number in scores.sort_values(ascending=False, kind="stable").index[:top])
