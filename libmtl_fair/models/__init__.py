"""Encoders, entered in ``ENCODERS`` by name, and heads.

An encoder is a module here: a class (or function) that is ``registered``, with the ``out_features`` of its representation.
"""

from libmtl_fair.models.cnn import CNN, ConvNeXt
from libmtl_fair.models.dense_heads import HEADS, ASPPHead, ConvHead, PooledHead, map_heads
from libmtl_fair.models.encoders import ENCODERS, EncoderKind, encoder_for, registered
from libmtl_fair.models.heads import Heads, any_names, linear_heads
from libmtl_fair.models.lstm import LSTM, sequence_heads
from libmtl_fair.models.mlp import MLP
from libmtl_fair.models.resnet import ResNet
from libmtl_fair.models.weights import load_weights

__all__ = [
    "CNN",
    "ENCODERS",
    "HEADS",
    "LSTM",
    "MLP",
    "ASPPHead",
    "ConvHead",
    "ConvNeXt",
    "EncoderKind",
    "Heads",
    "PooledHead",
    "ResNet",
    "any_names",
    "encoder_for",
    "linear_heads",
    "load_weights",
    "map_heads",
    "registered",
    "sequence_heads",
]
