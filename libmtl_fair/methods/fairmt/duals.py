"""A multiplier for every binary task and attribute, raised and lowered by decisions (METHODS.md, 2.5): a proxy-Lagrangian.

Gradients are of smooth rates; the multipliers follow the difference of *decisions* over the last epoch. Arrays here are [A, K]:
attributes (one where they are crossed), and columns, a binary task or a label each; or [C, A, K]: the thresholds that decide, first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from libmtl_fair import functional as F
from libmtl_fair.functional._device import A, at_least, largest, library, on_host, widest
from libmtl_fair.methods.controllers import Pace
from libmtl_fair.methods.fairmt.constraint import Constraint
from libmtl_fair.methods.fairmt.pursuit import LEAST, MOST, START, Bound, pursue
from libmtl_fair.methods.targets import Target

CUTS = {"both": ("half", "base_rate"), "half": ("half",), "base_rate": ("base_rate",)}
"""Setting -> the thresholds that decide: 0.5, and what chooses as many as are positive."""
_SAID = "The difference did not fall with the multiplier at its bound, so the bound gave way, from {:g} to {:.2g}"
_BACK_AGAIN = "The difference did not fall with the multiplier at its bound, {:g}; with half the bound it rose"
_BOUND, _LEVELS = slice(1, 5), 5
"""Where the state has the bound of the multipliers, and plain training's differences; its first row is log eta."""


class Found(NamedTuple):
    """Of every constraint [A, K]: difference of decisions, whether it is there, strength of its gradient, None while plain.

    The difference is at the threshold where it is farther from what is asked. ``enough`` [A, G, 2K]: groups that have enough people;
    ``farther`` [K]: each column's such threshold, in the order of ``cuts``; ``unmet`` [A, K]: above 0 where the target is out of reach.
    """

    gap: Any
    present: Any
    strength: Any
    enough: Any
    farther: Any
    unmet: Any


class Duals:
    """Who is constrained, to what, and how the multipliers move.

    Parameters
    ----------
    rule : Constraint
        Of the columns' rates; told which parts of a column count.
    columns : sequence of str
        The task of each column. ``attributes``: their names. ``targets``: (task, attribute) -> its target.
    """

    def __init__(
        self,
        rule: Constraint,
        columns: Sequence[str],
        attributes: Sequence[str],
        targets: Mapping[tuple[str, str], Target],
        device: torch.device,
    ) -> None:
        self.cuts = CUTS[rule.settings.threshold]
        self.rule, self.columns, self.attributes, self.targets = rule, list(columns), list(attributes), targets
        tasks = [f"{t}[{columns[:k].count(t)}]" if columns.count(t) > 1 else t for k, t in enumerate(columns)]
        ends = [f"/{name}" for name in attributes] if len(attributes) > 1 else [""]
        self.tasks, self.labels = tasks, [f"{task}{end}" for end in ends for task in tasks]
        self.traced = dict.fromkeys(("eta", "gap", "psi", "out_of_reach"), self.labels)
        self.wanted = [f"{t}{e}" for e, a in zip(ends, attributes) for t, c in zip(tasks, columns) if (c, a) in targets]
        table = [[targets.get((task, name)) for task in columns] for name in attributes]

        def array(of: Any) -> Tensor:
            return torch.tensor([[of(t) for t in row] for row in table], device=device)

        self.floor, dtype = rule.settings.floor, widest(device)
        self.bound, self.relative = (
            array(lambda t: t.bound if t else 1.0).to(dtype),
            array(lambda t: bool(t and t.relative)),
        )
        self.alarms = array(lambda t: bool(t is None or t.metric != "eop"))
        each = torch.tensor([1 / columns.count(task) for task in columns], device=device, dtype=dtype)
        self.share = array(lambda t: float(t is not None)).to(dtype) * each
        parity = array(lambda t: bool(t and t.metric == "dp"))
        if any(target.metric == "dp" for target in targets.values()):
            rule.parity = torch.cat([parity, parity], -1).unsqueeze(-2)
        if any(target.metric == "eop" for target in targets.values()):
            rule.weights = torch.cat([torch.ones_like(self.alarms), self.alarms], -1).to(rule.dtype)

    def start(self) -> Tensor:
        """Return the state of a training that begins, [5 + C, A, K]: log eta, its :class:`Bound`, and plain training's differences."""
        state = self.bound.new_zeros((_LEVELS + len(self.cuts), *self.bound.shape))
        state[0], state[1] = math.log(START), math.log(MOST)
        return state

    def fits(self, state: Tensor) -> bool:
        """Whether a state is of this form: earlier versions had decisions at one threshold, and no bound."""
        return len(state) == _LEVELS + len(self.cuts)

    def tolerance(self, level: Any, bound: Any, relative: Any) -> Any:
        """Return the difference that each constraint tolerates."""
        return library(level).where(relative, at_least(bound * level, self.floor), bound)

    def decisions(self, recent: Any) -> tuple[Any, Any, Any, Any]:
        """Return difference and error [C, A, K], presence [1, A, K], and which groups have enough people [A, G, 2K].

        Of sums [A * G, (2 + 2C) K]: counts of positives and negatives, and of misses and false alarms among them at each threshold.
        """
        k, least, shape = self.rule.n_rates, self.rule.min_count, (len(recent), 1 + len(self.cuts), -1)
        xp, parts = library(recent), recent.reshape(shape).swapaxes(0, 1)
        rate, count = self.rule.rates(parts[1:], parts[:1])
        gap, noise, there = F.decision_gap(rate, count, least)
        alarms = there[..., k:] & (self.alarms if isinstance(recent, Tensor) else self.alarms.numpy())
        larger = alarms & (gap[..., k:] > gap[..., :k])
        worst, error = xp.where(larger, gap[..., k:], gap[..., :k]), xp.where(larger, noise[..., k:], noise[..., :k])
        return worst, error, there[..., :k] | alarms, count[0] >= least

    def update(self, state: Tensor, recent: Tensor, pace: Pace) -> Found:
        """Move the multipliers in ``state`` by the decisions of the last epoch; return what they are and how strong a step is.

        Plain numbers are read on the CPU, where numpy takes a fifth of torch's time for a dozen of them.
        """
        values = on_host(state)
        xp, local = library(values), not isinstance(values, Tensor)
        bound, relative, share = (x.numpy() if local else x for x in (self.bound, self.relative, self.share))
        sums = on_host(recent).astype(np.float64) if local else recent.to(state.dtype)
        gap, noise, there, enough = self.decisions(sums)
        limit, level, present = Bound(*values[_BOUND]), values[_LEVELS:], there[0]
        if pace.warm:
            level[...] = gap
        # a share of what plain training has cannot be told from chance below the standard error
        tolerance = (
            xp.where(relative, xp.maximum(at_least(bound * level, self.floor), noise), bound) * self.rule.settings.aim
        )
        excess = xp.where(there, gap / tolerance, -1.0)
        most, strength = largest(excess, 0), None
        if not pace.warm:
            error = xp.where(present, (most - 1).clip(-1, 1), 0.0)
            strength = pursue(values[0], error, pace.gain, LEAST, xp.exp(limit.log_most)) * share * self.units(sums)
            limit.move(values[0], most, pace.patience)
        shown, worst = xp.where(excess[-1] > excess[0], gap[-1], gap[0]), largest(excess, -2)
        return Found(shown, present, strength, enough, worst[-1] > worst[0], limit.unmet)

    def units(self, sums: Any) -> Any:
        """Return the entropy [A, K] of each column's base rate in nats: what its loss can be at most without knowing anything."""
        k, shape = self.rule.n_rates, (self.rule.n_attributes, self.rule.n_groups, 2, self.rule.n_rates)
        count = sums[:, : 2 * k].reshape(shape).sum(1)
        share = (count / at_least(count.sum(1), 1)[:, None]).clip(1e-12, 1 - 1e-12)
        return -(share * library(share).log(share)).sum(1)

    def to_sums(self, slope: A, strength: A, divisor: A) -> A:
        """Return the gradient of ``strength . psi`` to every summed cost [A * G, 2K], from psi's slopes to the rates."""
        parts, k = (*slope.shape[:-1], 2, self.rule.n_rates), self.rule.n_rates
        found = (slope.reshape(parts) * strength[..., None, None, :]).reshape(slope.shape) / at_least(divisor, 1e-12)
        if self.rule.parity is not None:
            xp, parity = library(found), self.rule.parity if isinstance(found, Tensor) else self.rule.parity.numpy()
            refused = found[..., :k] - found[..., k:]
            found = xp.where(parity, xp.concatenate([refused, -refused], -1), found)
        flat: A = found.reshape(-1, 2 * k)
        return flat

    def selected(self, sums: Tensor) -> Tensor:
        """Return the share of people who are passed at each threshold, [C, A, K]."""
        shape = (self.rule.n_attributes, self.rule.n_groups, 2 + 2 * len(self.cuts), self.rule.n_rates)
        parts = sums.reshape(shape).sum(1).movedim(1, 0)
        positive, negative, missed, alarms = parts[0], parts[1], parts[2::2], parts[3::2]
        return (positive - missed + alarms) / (positive + negative).clamp(min=1)

    def rows(self, state: Tensor, **sums: Tensor) -> list[dict[str, Any]]:
        """Return a row a constraint and threshold: task, attribute, target, what is tolerated, and what was reached in each part.

        ``sums`` [A * G, (2 + 2C) K] of each part. Met: the difference is at most one standard error above what is tolerated.
        """
        state = state.cpu()
        tolerance = self.tolerance(state[_LEVELS:], self.bound.cpu(), self.relative.cpu())
        parts = {part: (*self.decisions(values)[:3], self.selected(values)) for part, values in sums.items()}
        found = []
        for a, k in [(a, k) for a in range(len(self.attributes)) for k in range(len(self.tasks))]:
            target = self.targets.get((self.columns[k], self.attributes[a]))
            if target is None:
                continue
            eta, most, unmet = math.exp(state[0, a, k]), math.exp(state[1, a, k]), bool(state[4, a, k] > 0)
            for c, cut in enumerate(self.cuts):
                tau = float(tolerance[c, a, k])
                row: dict[str, Any] = {"task": self.tasks[k], "attribute": self.attributes[a], "target": str(target)}
                row |= {"threshold": cut, "tolerance": tau, "plain": float(state[_LEVELS + c, a, k])}
                row |= {"eta": eta, "at_bound": eta > 0.99 * most, "eta_bound": most}
                for part, values in parts.items():
                    gap, noise, there, passed = (x[min(c, len(x) - 1), a, k].item() for x in values)
                    row[part] = gap if there else None
                    if there:
                        row |= {f"{part}_error": noise, f"{part}_met": gap <= tau + noise, f"{part}_selected": passed}
                found.append(row)
            own = found[-len(self.cuts) :]
            reached = all(row.get("train_met", True) for row in own)
            for row in own:
                row["out_of_reach"] = unmet and not reached
                said = _SAID if most < 0.99 * MOST else _BACK_AGAIN
                row["said"] = said.format(MOST, most) if row["out_of_reach"] else ""
        return found
