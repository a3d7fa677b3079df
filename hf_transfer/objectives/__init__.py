"""The terms of the sum, one family a file; a new method is one class in one file here, with its test.

Families know only torch, and none imports another.
"""

from __future__ import annotations

from .adversarial import DANN as DANN
from .contrast import CRD as CRD
from .features import PKD as PKD
from .features import AttentionTransfer as AttentionTransfer
from .features import Hint as Hint
from .logit_relations import DIST as DIST
from .logit_relations import MLKD as MLKD
from .logit_relations import LogitStandardization as LogitStandardization
from .logits import DKD as DKD
from .logits import JSD as JSD
from .logits import NKD as NKD
from .logits import LogitMSE as LogitMSE
from .logits import SoftTargets as SoftTargets
from .penalties import L1 as L1
from .penalties import L2 as L2
from .penalties import ConfidencePenalty as ConfidencePenalty
from .penalties import ElasticNet as ElasticNet
from .proximity import L2SP as L2SP
from .relations import CKA as CKA
from .relations import RKD as RKD
from .relations import SimilarityPreserving as SimilarityPreserving
from .review import ReviewKD as ReviewKD
from .supervised import MSE as MSE
from .supervised import CrossEntropy as CrossEntropy
from .supervised import Focal as Focal
from .supervised import KLDivergence as KLDivergence
from .transformers_distillation import MiniLMRelation as MiniLMRelation
from .transformers_distillation import TinyBERT as TinyBERT

__all__ = [
    "CKA",
    "CRD",
    "DANN",
    "DIST",
    "DKD",
    "JSD",
    "L1",
    "L2",
    "L2SP",
    "MLKD",
    "MSE",
    "NKD",
    "PKD",
    "RKD",
    "AttentionTransfer",
    "ConfidencePenalty",
    "CrossEntropy",
    "ElasticNet",
    "Focal",
    "Hint",
    "KLDivergence",
    "LogitMSE",
    "LogitStandardization",
    "MiniLMRelation",
    "ReviewKD",
    "SimilarityPreserving",
    "SoftTargets",
    "TinyBERT",
]
