"""Stacked trials: many trainings of one architecture as one batched model."""

from __future__ import annotations

from libmtl_fair.tune.stacked.engine import Rows, Stack
from libmtl_fair.tune.stacked.members import SUPPORTED, obstacle, shape

__all__ = ["SUPPORTED", "Rows", "Stack", "obstacle", "shape"]
