"""Fairness methods as LibMTL weightings, one file a method."""

from libmtl_fair.methods.fairbranch.fbgrad import FBGrad, FBGradSettings
from libmtl_fair.methods.fairmt.fairmt import FairMT, FairMTSettings
from libmtl_fair.methods.heads.lambda_mix import LambdaMix, LambdaMixSettings
from libmtl_fair.methods.regulariser import GroupRegulariser, GroupRegulariserSettings
from libmtl_fair.methods.relif import ReLiF, ReLiFSettings

__all__ = [
    "FBGrad",
    "FBGradSettings",
    "FairMT",
    "FairMTSettings",
    "GroupRegulariser",
    "GroupRegulariserSettings",
    "LambdaMix",
    "LambdaMixSettings",
    "ReLiF",
    "ReLiFSettings",
]
