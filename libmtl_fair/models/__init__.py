"""Encoders and heads."""

from libmtl_fair.models.heads import linear_heads
from libmtl_fair.models.mlp import MLP

__all__ = ["MLP", "linear_heads"]
