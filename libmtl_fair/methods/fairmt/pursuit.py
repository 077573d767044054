"""A multiplier that follows decisions (METHODS.md, 2.5): the window that they are counted in, how it moves, and how it gives way.

Numbers here are elementwise, arrays or tensors: one multiplier or many, on any device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from libmtl_fair.functional._device import at_least, library, on_host

LEAST, START, MOST = 0.01, 0.3, 3.0
"""Lowest multiplier, the first, and the highest: a disparity is worth at most so many times what the labels hold."""
FASTEST = 0.3
"""Largest step of log eta."""
_BACK, _CLEARLY = math.log(2), 1.5
SLOTS = 256
"""Slots that a window has at most."""


def decay_of(rows: int, epoch_steps: int | None) -> float:
    """Return the decay of the smooth sums: 10 batches, or an epoch of 5 to 9; if small, 2,560 people or a quarter of an epoch.

    Examples
    --------
    >>> decay_of(512, 100), decay_of(512, 5), round(decay_of(8, 1000), 3), decay_of(8, 30)
    (0.9, 0.8, 0.996, 0.9)
    """
    epoch = math.inf if epoch_steps is None else epoch_steps
    return 1 - 1 / max(5.0, min(10.0, epoch), min(2560 / max(rows, 1), epoch / 4))


def between_moves(epoch_steps: int) -> int:
    """Return the steps from one move of the multipliers to the next: at most 4, and at least 16 moves an epoch if it has the steps.

    What they follow are decisions of a whole epoch, of which a step changes little.

    Examples
    --------
    >>> [between_moves(steps) for steps in (7, 32, 1000)]
    [1, 2, 4]
    """
    return max(1, min(4, epoch_steps // 16))


class Window:
    """Sums over the last ``length`` steps: a ring of at most 256 slots, of one step each where there are no more."""

    @staticmethod
    def rolled(
        ring: Tensor | None, recent: Tensor | None, now: Tensor, step: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the ring [slots, ...] and the sums in it after ``now`` [...], the step's, has taken the oldest one's place."""
        if ring is None or recent is None or len(ring) != min(length, SLOTS):
            ring, recent = now.new_zeros((min(length, SLOTS), *now.shape)), torch.zeros_like(now)
        each = -(-length // SLOTS)
        slots, total, new = on_host(ring), on_host(recent), on_host(now)
        slot = slots[(step // each) % len(ring)]
        if step % each == 0:
            total -= slot
            slot[...] = new
        else:
            slot += new
        total += new
        return ring, recent


def pursue(log_eta: Any, error: Any, gain: float, least: float, most: Any) -> Any:
    """Move ``log_eta`` in place by ``gain`` times ``error`` in [-1, 1]; return the strengths to use now.

    In use is ``eta (exp(error) - 1/e) / (1 - 1/e)``, at most ``most``: eta where the target is just met, nothing where there is no
    difference at all.

    Examples
    --------
    >>> log_eta = np.zeros(2)
    >>> pursue(log_eta, np.array([0.0, -1.0]), 0.1, 0.01, 3.0), log_eta
    (array([1., 0.]), array([ 0. , -0.1]))
    """
    xp = library(log_eta)
    most = xp.zeros_like(log_eta) + most if isinstance(most, float) else most
    log_eta[...] = xp.minimum(at_least(log_eta + gain * error, math.log(least)), xp.log(most))
    none = math.exp(-1)
    return xp.minimum(xp.exp(log_eta) * ((xp.exp(error) - none) * (1 / (1 - none))), most)


class Bound(NamedTuple):
    """The bound of a multiplier, and how it gives way where the target cannot be met; all elementwise.

    ``log_most``: the bound's logarithm; ``mark``: the excess that is compared with; ``since``: steps at the bound; ``unmet``: 0, 1 while it
    gives way, 2 where it stays.
    """

    log_most: Any
    mark: Any
    since: Any
    unmet: Any

    def move(self, log_eta: Any, excess: Any, patience: int) -> None:
        """Take in the difference over what is aimed at, and change the four in place.

        A multiplier at its bound whose difference is clearly too large, and after ``patience`` steps has not fallen by a tenth, is
        out of reach: the bound is halved, again and again while the difference does not rise by a tenth, and doubled once if it
        does.
        """
        xp = library(excess)
        there = log_eta >= self.log_most - 1e-9
        if xp is np and not there.any():  # as it is nearly always: nothing else changes
            self.since[...] = 0.0
            return
        there = there & (excess > _CLEARLY) & (self.unmet < 2)
        since = xp.where(there, self.since + 1, 0.0)
        mark = xp.where((since == 1) & (self.unmet == 0), excess, self.mark)
        due, trying = since >= patience, self.unmet == 1
        if xp is np and not due.any():
            self.mark[...], self.since[...] = mark, since
            return
        raised, falling = due & trying & (excess > 1.1 * mark), due & ~trying & (excess <= 0.9 * mark)
        back = due & ~raised & ~falling
        back_to, up_to = self.log_most - _BACK, self.log_most + _BACK
        moved = xp.where(back, back_to, xp.where(raised, up_to, self.log_most))
        self.mark[...] = xp.where(due & ~trying, excess, mark)
        self.since[...] = xp.where(due, 0.0, since)
        self.unmet[...] = xp.where(raised, 2.0, xp.where(back, 1.0, self.unmet))
        self.log_most[...] = xp.clip(moved, math.log(START), math.log(MOST))
