"""Fairness methods, one file or folder each: LibMTL weightings, and FairBranch, an architecture.

A new method is a file here and its import below: recipes, the command line, studies and estimators find it then.
"""

from libmtl_fair.libmtl.loading import AbsArchitecture, AbsWeighting
from libmtl_fair.methods.fairbranch.fairbranch import FairBranch, FairBranchSettings
from libmtl_fair.methods.fairbranch.fbgrad import FBGrad, FBGradSettings
from libmtl_fair.methods.fairmt.fairmt import FairMT, FairMTSettings
from libmtl_fair.methods.heads.lambda_mix import LambdaMix, LambdaMixSettings
from libmtl_fair.methods.recon import Recon, ReconSettings
from libmtl_fair.methods.regulariser import GroupRegulariser, GroupRegulariserSettings
from libmtl_fair.methods.relif import ReLiF, ReLiFSettings
from libmtl_fair.methods.tag import TAG, TAGSettings

_BASES = (AbsWeighting, AbsArchitecture)
METHODS = [x for x in vars().values() if isinstance(x, type) and issubclass(x, _BASES) and x not in _BASES]
"""Every class imported above that LibMTL is to know."""

__all__ = [
    "METHODS",
    "TAG",
    "FBGrad",
    "FBGradSettings",
    "FairBranch",
    "FairBranchSettings",
    "FairMT",
    "FairMTSettings",
    "GroupRegulariser",
    "GroupRegulariserSettings",
    "LambdaMix",
    "LambdaMixSettings",
    "ReLiF",
    "ReLiFSettings",
    "Recon",
    "ReconSettings",
    "TAGSettings",
]
