"""What a gap between groups is: a difference or a ratio, between groups or to the overall value, of one or more rates.

Gaps are written as disparities, 0 where all groups are equal: the difference, or 1 - ratio. They depend on the groups only
through the highest, the lowest and the overall value, which is what makes intervals cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from libmtl_fair.metrics.arrays import Floats

TINY = 1e-12


@dataclass(frozen=True)
class Gap:
    """A disparity over groups, combined over K components (TPR and FPR, or all classes): the largest or the mean.

    With ``mean`` and ``inner`` > 1 it is the mean of the largest of each ``inner`` neighbours: equalised odds of every class,
    averaged over classes.
    """

    ratio: bool = False
    to_overall: bool = False
    mean: bool = False
    inner: int = 1

    def of(self, top: Floats, bottom: Floats, overall: Floats) -> Floats:
        """Return the disparity of each component from the highest, lowest and overall value."""
        if not self.ratio:
            return np.maximum(top - overall, overall - bottom) if self.to_overall else np.asarray(top - bottom)
        if self.to_overall:
            return np.asarray(1 - np.minimum(_quotient(bottom, overall), _quotient(overall, top)))
        return np.asarray(1 - _quotient(bottom, top))

    def combine(self, parts: Floats) -> Floats:
        """Combine the components, axis 1."""
        if not self.mean:
            return np.asarray(parts.max(1))
        if self.inner > 1:
            parts = parts.reshape(parts.shape[0], -1, self.inner, *parts.shape[2:]).max(2)
        return np.asarray(parts.mean(1))

    def scale(self, target: Floats, centre: Floats, down: Floats, up: Floats) -> Floats:
        """Return s such that values from ``centre - s down`` to ``centre + s up`` have the disparity ``target``."""
        if not self.ratio:
            width = np.maximum(up, down) if self.to_overall else up + down
            return np.asarray(target / np.maximum(width, TINY))
        if self.to_overall:
            low = target * centre / np.maximum(down, TINY)
            high = target * centre / np.maximum((1 - target) * up, TINY)
            return np.minimum(low, high)
        return np.asarray(target * centre / np.maximum(down + (1 - target) * up, TINY))


def _quotient(low: Floats, high: Floats) -> Floats:
    # 0/0: no group reaches anything, so nothing sets them apart.
    return np.where(high > TINY, low / np.maximum(high, TINY), 1.0)
