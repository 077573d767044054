"""Encoders, entered in ``ENCODERS`` by name, and heads.

An encoder is a module here: a class (or function) that is ``registered``, with the ``out_features`` of its representation.
"""

from libmtl_fair.models.encoders import ENCODERS, EncoderKind, encoder_for, registered
from libmtl_fair.models.heads import Heads, any_names, linear_heads
from libmtl_fair.models.lstm import LSTM, sequence_heads
from libmtl_fair.models.mlp import MLP

__all__ = [
    "ENCODERS",
    "LSTM",
    "MLP",
    "EncoderKind",
    "Heads",
    "any_names",
    "encoder_for",
    "linear_heads",
    "registered",
    "sequence_heads",
]
