"""The terms of the sum, one family a file; a new method is one class in one file here, with its test.

Families know only torch, and none imports another.
"""

from __future__ import annotations

from .adversarial import DANN as DANN
from .penalties import L1 as L1
from .penalties import L2 as L2
from .penalties import ConfidencePenalty as ConfidencePenalty
from .penalties import ElasticNet as ElasticNet
from .proximity import L2SP as L2SP
from .supervised import MSE as MSE
from .supervised import CrossEntropy as CrossEntropy
from .supervised import Focal as Focal
from .supervised import KLDivergence as KLDivergence

__all__ = [
    "DANN",
    "L1",
    "L2",
    "L2SP",
    "MSE",
    "ConfidencePenalty",
    "CrossEntropy",
    "ElasticNet",
    "Focal",
    "KLDivergence",
]
