"""Fair multi-task learning for LibMTL. Importing this package loads LibMTL and registers the methods with it."""

from __future__ import annotations

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

from libmtl_fair import errors
from libmtl_fair._imports import OldNames, lazy

if TYPE_CHECKING:
    from libmtl_fair import data, deploy, functional, metrics, report, sklearn, tune
    from libmtl_fair.data import Dataset, ResidentLoader, load_dataset, load_table
    from libmtl_fair.deploy import Predictor, load
    from libmtl_fair.libmtl import DivergenceError, FairStep, FairTrainer, FairWeighting, heal, register
    from libmtl_fair.libmtl.losses import task_dict
    from libmtl_fair.methods import FairMT, FBGrad, GroupRegulariser, LambdaMix, ReLiF
    from libmtl_fair.methods.fairbranch.fairbranch import FairBranch
    from libmtl_fair.methods.heads.auxiliary import add_fairness_heads, drop_fairness_heads
    from libmtl_fair.metrics.fairlearn_bridge import post_process
    from libmtl_fair.predictions import Predictions
    from libmtl_fair.tasks import (
        Binary,
        BinarySequence,
        Depth,
        Multiclass,
        MulticlassSequence,
        Multilabel,
        Normals,
        Regression,
        Segmentation,
        Task,
    )

__version__ = "0.1.0"

__all__ = [
    "Binary",
    "BinarySequence",
    "Dataset",
    "Depth",
    "DivergenceError",
    "FBGrad",
    "FairBranch",
    "FairMT",
    "FairStep",
    "FairTrainer",
    "FairWeighting",
    "GroupRegulariser",
    "LambdaMix",
    "Multiclass",
    "MulticlassSequence",
    "Multilabel",
    "Normals",
    "Predictions",
    "Predictor",
    "ReLiF",
    "Regression",
    "ResidentLoader",
    "Segmentation",
    "Task",
    "add_fairness_heads",
    "data",
    "deploy",
    "drop_fairness_heads",
    "errors",
    "functional",
    "heal",
    "load",
    "load_dataset",
    "load_table",
    "metrics",
    "post_process",
    "register",
    "report",
    "sklearn",
    "task_dict",
    "tune",
]

_HOMES = {
    **dict.fromkeys(("data", "deploy", "functional", "metrics", "report", "sklearn", "tune"), ""),
    "data.catalogue": "load_dataset load_table",
    "data.dataset": "Dataset",
    "data.loader": "ResidentLoader",
    "deploy.loading": "load",
    "deploy.predictor": "Predictor",
    "libmtl.losses": "task_dict",
    "libmtl": "DivergenceError FairStep FairTrainer FairWeighting heal register",
    "methods": "FBGrad FairMT GroupRegulariser LambdaMix ReLiF",
    "methods.fairbranch.fairbranch": "FairBranch",
    "methods.heads.auxiliary": "add_fairness_heads drop_fairness_heads",
    "metrics.fairlearn_bridge": "post_process",
    "predictions": "Predictions",
    "tasks": "Binary BinarySequence Depth Multiclass MulticlassSequence Multilabel Normals Regression Segmentation Task",
}
__getattr__, __dir__ = lazy(__name__, _HOMES)


def register_methods() -> None:
    """Load LibMTL and make our methods known to it, by every name that recipes and scripts can use."""
    from libmtl_fair.libmtl.registry import discover, register
    from libmtl_fair.methods import METHODS

    register(*METHODS)
    discover()


if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
    sys.meta_path.append(OldNames())
if PurePath(sys.argv[0] if getattr(sys, "argv", None) else "").stem != "libmtl-fair":  # its commands do so, not --help
    register_methods()
