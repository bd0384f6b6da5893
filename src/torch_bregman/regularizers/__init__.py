"""The regularisers, one idea per file. `base.py` has the interface, `traits.py` what they may say of themselves."""

from .base import Regularizer, bisect, broadcasts, check_regularizer, turning_point
from .groups import GROUPS, CutGroups, Grouped, GroupL1, SparseGroupL1, group_dims
from .l1 import L1, NonNegativeL1
from .nuclear import NuclearNorm
from .traits import GroupNorm, Lam, Traits

__all__ = [
    "GROUPS",
    "L1",
    "CutGroups",
    "GroupL1",
    "GroupNorm",
    "Grouped",
    "Lam",
    "NonNegativeL1",
    "NuclearNorm",
    "Regularizer",
    "SparseGroupL1",
    "Traits",
    "bisect",
    "broadcasts",
    "check_regularizer",
    "group_dims",
    "turning_point",
]
