"""All knowledge of LibMTL's insides: loading, healing, registering, training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from libmtl_fair._imports import lazy

if TYPE_CHECKING:
    from libmtl_fair.libmtl.compat import heal
    from libmtl_fair.libmtl.fair_step import FairStep
    from libmtl_fair.libmtl.registry import architecture_names, register, weighting_names
    from libmtl_fair.libmtl.trainer import DivergenceError, FairTrainer
    from libmtl_fair.methods.base import FairWeighting, Settings

__all__ = [
    "DivergenceError",
    "FairStep",
    "FairTrainer",
    "FairWeighting",
    "Settings",
    "architecture_names",
    "heal",
    "register",
    "weighting_names",
]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "libmtl.compat": "heal",
        "libmtl.fair_step": "FairStep",
        "libmtl.registry": "architecture_names register weighting_names",
        "libmtl.trainer": "DivergenceError FairTrainer",
        "methods.base": "FairWeighting Settings",
    },
)
