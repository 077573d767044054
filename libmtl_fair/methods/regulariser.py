"""GroupRegulariser: a disparity of the main heads' own outputs added to their losses (the sources' baselines)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.batch import FairBatch
from libmtl_fair.errors import DataError, RecipeError, unknown
from libmtl_fair.methods.base import Penalty, Settings, setting
from libmtl_fair.methods.heads.group_losses import WITHIN_CLASSES, GroupLoss


class GroupRegulariserSettings(Settings, GroupLoss):
    """Hyperparameters of :class:`GroupRegulariser` (METHODS.md, 4): a :class:`GroupLoss`, and of whom."""

    aliases: ClassVar[Mapping[str, str]] = {"lambda": "lam"}

    loss: str = setting("bgl", "bgl, dpl, fprl, tprl, glf, gld, gap, lift or norm")
    conditional: bool | None = setting(
        None, "within classes; null is as published, not within classes, but for gap, lift, fprl, tprl, norm"
    )
    lam: float = setting(
        0.5,
        "lambda, the share of the tasks' losses: lambda L + (1 - lambda) R; with a base other than EW it is the base's "
        "gradient that is multiplied by lambda",
        expected="lambda, a number in (0, 1]",
        gt=0,
        le=1,
        search=(0.3, 1.0),
    )
    sensitive: tuple[str, ...] | None = setting(
        None,
        "attributes; None is all that the loader gives",
        expected="a list of names, or null",
        strict=False,
        min_length=1,
    )
    tasks: tuple[str, ...] | None = setting(
        None, "regularised tasks; None is all", expected="a list of names, or null", strict=False, min_length=1
    )
    intersectional: bool = setting(False, "cross the attributes instead of summing over them")

    @property
    def within_classes(self) -> bool:
        """Whether groups are compared within classes."""
        return self.loss in WITHIN_CLASSES if self.conditional is None else self.conditional


class GroupRegulariser(Penalty):
    r"""BGL, DPL, FPRL, TPRL or a norm violation of the main heads' outputs as regularisers, in a fixed proportion to the losses.

    The objective is :math:`\lambda \sum_k L_k + (1 - \lambda) \sum_{k, a} R_{k, a}`.
    R is the disparity of task k between the groups of attribute a in the batch; it moves encoder and main heads.
    Records each step: ``regulariser``, the sum of R.
    """

    settings_class = GroupRegulariserSettings
    needs_known_kinds = True
    needs_groups = True
    source = "Agarwal et al. 2019 (BGL); GLF's baselines"
    cost = "1.3 to 2 plain steps with 2 to 40 tasks (docs/RESULTS.md)"
    settings: GroupRegulariserSettings
    needs_representation = False

    def configure(self, settings: Settings) -> None:
        """Take the settings."""
        super().configure(settings)
        self.loss_share = self.settings.lam

    def penalty(self, batch: FairBatch) -> Tensor:
        """Return the sum of the disparities, times 1 - lambda (scalar)."""
        names = self.settings.tasks or batch.main
        for name in set(names).difference(batch.main):
            raise RecipeError(f"GroupRegulariser: {unknown('task', name, batch.main)}")
        terms = []
        for together in [(name,) for name in names] if batch.multi_input else [names]:
            tasks = [batch.task(name) for name in together]
            for task in tasks:
                self.settings.check_task(task)
            compared = self.settings.columns(tasks, batch.outputs, batch.labels)
            terms += [self.settings.compare(compared, *groups).sum() for groups in self._groups(batch, together[0])]
        total = torch.stack(terms).sum()
        self.trace = {"regulariser": total.detach()}
        return (1 - self.settings.lam) * total

    def _groups(self, batch: FairBatch, task: str) -> list[tuple[Tensor, int]]:
        groups = batch.task_groups(task)
        attributes = self.settings.sensitive or tuple(groups)
        for name in attributes:
            if name not in groups:
                raise DataError(f"GroupRegulariser: {unknown('sensitive attribute', name, groups)}")
        found = [(groups[name], batch.n_groups[name]) for name in attributes]
        if not self.settings.intersectional:
            return found
        return [F.cross_groups([ids for ids, _ in found], [count for _, count in found])]
