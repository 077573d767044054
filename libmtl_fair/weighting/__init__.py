"""Fairness methods as LibMTL weightings, one file a method."""

from libmtl_fair.weighting.relif import ReLiF, ReLiFSettings

__all__ = ["ReLiF", "ReLiFSettings"]
