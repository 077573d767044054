"""Fair multi-task learning for LibMTL. Importing this package loads LibMTL and registers the methods with it."""

from libmtl_fair import errors, functional, metrics
from libmtl_fair.data import Dataset, ResidentLoader, load_dataset
from libmtl_fair.libmtl import DivergenceError, FairTrainer, FairWeighting, heal, register
from libmtl_fair.methods import FairMT, FBGrad, GroupRegulariser, LambdaMix, ReLiF
from libmtl_fair.methods.fairbranch.fairbranch import FairBranch
from libmtl_fair.methods.heads.add_heads import add_fairness_heads, drop_fairness_heads
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import Binary, Multiclass, Multilabel, Regression, Task, task_dict

__version__ = "0.1.0"

register(FairBranch, FBGrad, FairMT, GroupRegulariser, LambdaMix, ReLiF)

__all__ = [
    "Binary",
    "Dataset",
    "DivergenceError",
    "FBGrad",
    "FairBranch",
    "FairMT",
    "FairTrainer",
    "FairWeighting",
    "GroupRegulariser",
    "LambdaMix",
    "Multiclass",
    "Multilabel",
    "Predictions",
    "ReLiF",
    "Regression",
    "ResidentLoader",
    "Task",
    "add_fairness_heads",
    "drop_fairness_heads",
    "errors",
    "functional",
    "heal",
    "load_dataset",
    "metrics",
    "register",
    "task_dict",
]
