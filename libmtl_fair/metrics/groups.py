"""Group metrics of several tasks and sensitive attributes, streamed on the device (methods.md, section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics.gap_rows import GapWriter, ReportOptions
from libmtl_fair.metrics.group_attributes import Attributes
from libmtl_fair.metrics.group_rows import GroupRows, to_frame
from libmtl_fair.metrics.group_state import TaskState
from libmtl_fair.metrics.group_tasks import write_task
from libmtl_fair.metrics.rates import check_option

Threshold = float | str


class GroupMetrics:
    """Rates, errors and AUC of every group, their differences and ratios, with intervals, for every task and attribute.

    Parameters
    ----------
    tasks : the tasks (:mod:`libmtl_fair.tasks`).
    n_groups : attribute -> number of groups G; ids are 0..G-1, -1 unknown.
    threshold : a probability above it is a positive decision. One number, or task -> number, or ``"base_rate"``: the
        threshold that selects as many examples as are positive. Multiclass tasks decide for the likeliest class.
    empty : a rate without denominator is ``"missing"`` (NaN, and out of the gaps), or 0 as in ``"fairlearn"``.
    missing : rows of unknown group: ``"drop"`` (counted), ``"group"`` (a group named unknown), or ``"error"``.
    min_group_size : smaller groups, and gaps that rest on one, are flagged ``"small"``.
    group_names : attribute -> names in the order of ids; the ids themselves where not given.
    intersections : attributes to cross, ``[("sex", "race")]``, or True for all; shown as ``"sex & race"``.
    method : gaps ``"between_groups"`` or ``"to_overall"``; agg : equalised odds, ``"worst_case"`` or ``"mean"``.
    confidence : level of the intervals; None leaves them out. n_bootstrap, seed : their replicates. Nominal 95 % covered
        93 to 97 % in simulations with groups of 100 or more, but for corners that :mod:`libmtl_fair.metrics.intervals` names.
    auc : AUC per group; keeps every score until :meth:`compute`.

    >>> import torch, libmtl_fair as lf
    >>> metrics = GroupMetrics([lf.Binary("income")], {"sex": 2}, confidence=None)
    >>> batch = {"income": torch.tensor([2.0, -1.0, 3.0, -2.0])}, {"income": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    >>> table = metrics.update(*batch, {"sex": torch.tensor([0, 0, 1, 1])}).compute()
    >>> table.query("metric == 'equalized_odds' and group == 'difference'").value.item()
    0.5
    """

    def __init__(
        self,
        tasks: Sequence[Any],
        n_groups: Mapping[str, int],
        threshold: Threshold | Mapping[str, Threshold] = 0.5,
        empty: str = "missing",
        missing: str = "drop",
        *,
        min_group_size: int = 30,
        group_names: Mapping[str, Sequence[str]] | None = None,
        intersections: bool | Iterable[Sequence[str]] | None = None,
        method: str = "between_groups",
        agg: str = "worst_case",
        confidence: float | None = 0.95,
        n_bootstrap: int = 1000,
        seed: int = 0,
        auc: bool = True,
    ) -> None:
        """Check the options; nothing is allocated before the first :meth:`update`."""
        if not tasks:
            raise RecipeError("GroupMetrics needs at least one task")
        check_option("rule for empty", empty, ("missing", "fairlearn"))
        check_option("method", method, ("between_groups", "to_overall"))
        check_option("agg", agg, ("worst_case", "mean"))
        if confidence is not None and not 0 < confidence < 1:
            raise RecipeError(f"GroupMetrics: confidence must lie in (0, 1) or be None, found {confidence!r}")
        self.attributes = Attributes(n_groups, missing, group_names, intersections)
        self.options = ReportOptions(empty, method, agg, confidence, n_bootstrap)
        self.min_group_size, self.seed = min_group_size, seed
        self._states = {t.name: TaskState(t, _threshold(threshold, t.name), auc) for t in tasks}
        self.reset()

    def reset(self) -> GroupMetrics:
        """Forget everything that was accumulated."""
        for state in self._states.values():
            state.reset(self.attributes.sizes)
        self.attributes.reset()
        return self

    def update(
        self,
        outputs: Mapping[str, Tensor],
        labels: Mapping[str, Any],
        groups: Mapping[str, Tensor],
        sample_weight: Tensor | None = None,
    ) -> GroupMetrics:
        """Add a batch: raw outputs and labels by task, group ids [B] by attribute, optionally weights [B].

        Raises
        ------
        DataError : a task or attribute is missing, lengths differ, ids outside of -1..G-1, or a score that is not finite
            where a label is (on a GPU the last two are found by :meth:`compute`, so that no step waits).
        """
        size = len(next(iter(groups.values()))) if groups else 0
        ids = self.attributes.ids(groups)
        weight = None if sample_weight is None else sample_weight.detach()
        if weight is not None and len(weight) != size:
            raise DataError(f"sample_weight has {len(weight)} entries for a batch of {size}")
        for name, state in self._states.items():
            for what, given in (("outputs", outputs), ("labels", labels)):
                if name not in given:
                    raise DataError(f"{what} lack task {name!r}; found: {', '.join(map(str, given)) or '(none)'}")
            state.update(outputs[name].detach(), labels[name], ids, weight)
        if not any(i.is_cuda for i in ids.values()):
            self._check()
        return self

    def merge(self, other: GroupMetrics) -> GroupMetrics:
        """Add what ``other``, with the same tasks and attributes, has accumulated (another process, another part)."""
        if list(self._states) != list(other._states) or self.attributes.sizes != other.attributes.sizes:
            raise DataError("GroupMetrics can be merged only with the same tasks, attributes and numbers of groups")
        for name, state in self._states.items():
            state.merge(other._states[name])
        self.attributes.merge(other.attributes)
        return self

    def compute(self) -> pd.DataFrame:
        """Return the long table: task, attribute, metric, group, value, n, low, high, flag.

        ``group`` is a group's name, ``overall``, ``difference`` or ``ratio``. ``flag`` is ``small`` (a group under
        ``min_group_size``), ``undefined`` (no denominator, nothing seen), ``single`` (a gap of one group), ``dropped``
        (count of unknown rows left out), or empty.
        """
        self._check()
        parts = []
        for t, state in enumerate(self._states.values()):
            for a, attribute in enumerate(self.attributes.sizes):
                parts.append(self._rows(state, attribute, np.random.default_rng((self.seed, t, a))))
        return to_frame(parts)

    def _rows(self, state: TaskState, attribute: str, rng: np.random.Generator) -> GroupRows:
        counts, unknown = state.counts(attribute)
        rows = GroupRows(state.task.name, attribute, self.attributes.names[attribute], counts, self.min_group_size)
        rows.add_groups("count", np.asarray(counts, dtype=np.float64))
        rows.add_overall("count", float(counts.sum()))
        if self.attributes.missing != "group":
            rows.add_unknown(float(unknown), "dropped" if unknown else "")
        write_task(GapWriter(rows, self.options, rng), state, attribute)
        return rows

    def _check(self) -> None:
        self.attributes.check()
        for state in self._states.values():
            state.check()


def _threshold(given: Threshold | Mapping[str, Threshold], task: str) -> Threshold:
    value = given.get(task, 0.5) if isinstance(given, Mapping) else given
    if value == "base_rate":
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"threshold of task {task!r} must be a number or 'base_rate', found {value!r}")
    return float(value)
