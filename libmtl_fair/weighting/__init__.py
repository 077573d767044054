"""Fairness methods as LibMTL weightings, one file a method."""

from libmtl_fair.weighting.fairmt import FairMT, FairMTSettings
from libmtl_fair.weighting.fbgrad import FBGrad, FBGradSettings
from libmtl_fair.weighting.group_regularisers import GroupRegulariser, GroupRegulariserSettings
from libmtl_fair.weighting.lambda_mix import LambdaMix, LambdaMixSettings
from libmtl_fair.weighting.relif import ReLiF, ReLiFSettings

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
