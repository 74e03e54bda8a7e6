"""Winning back accuracy after surgery."""

from pfsurgery.recover.config import EpochRecord, FinetuneConfig, FinetuneResult
from pfsurgery.recover.evaluate import Accuracy, evaluate
from pfsurgery.recover.finetune import finetune
from pfsurgery.recover.norms import recalibrate

__all__ = [
    "Accuracy",
    "EpochRecord",
    "FinetuneConfig",
    "FinetuneResult",
    "evaluate",
    "finetune",
    "recalibrate",
]
