"""FairBranch, which grows branches where the tasks' weights differ; auxiliary fairness heads; heads per group."""

from libmtl_fair.architecture.auxiliary_heads import add_fairness_heads, drop_fairness_heads
from libmtl_fair.architecture.fairbranch import BranchEvent, FairBranch, FairBranchSettings
from libmtl_fair.architecture.group_heads import GroupHeads
from libmtl_fair.architecture.tree import BranchTree

__all__ = [
    "BranchEvent",
    "BranchTree",
    "FairBranch",
    "FairBranchSettings",
    "GroupHeads",
    "add_fairness_heads",
    "drop_fairness_heads",
]
