"""All knowledge of LibMTL's insides: loading, healing, registering, training."""

from libmtl_fair.host.healing import heal
from libmtl_fair.host.plugin import FairWeighting, Settings
from libmtl_fair.host.registry import architecture_names, register, weighting_names
from libmtl_fair.host.trainer import DivergenceError, FairTrainer

__all__ = [
    "DivergenceError",
    "FairTrainer",
    "FairWeighting",
    "Settings",
    "architecture_names",
    "heal",
    "register",
    "weighting_names",
]
