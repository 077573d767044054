"""Encoders and heads."""

from libmtl_fair.models.mlp import MLP, linear_heads

__all__ = ["MLP", "linear_heads"]
