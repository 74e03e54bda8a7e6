"""Winning back accuracy after surgery."""

from pfsurgery.recover.budget import Budget, budget
from pfsurgery.recover.config import EpochRecord, FinetuneConfig, FinetuneResult
from pfsurgery.recover.evaluate import Accuracy, evaluate
from pfsurgery.recover.finetune import finetune
from pfsurgery.recover.norms import recalibrate
from pfsurgery.recover.reconstruct import Refit, reconstruct

__all__ = [
    "Accuracy",
    "Budget",
    "EpochRecord",
    "FinetuneConfig",
    "FinetuneResult",
    "Refit",
    "budget",
    "evaluate",
    "finetune",
    "recalibrate",
    "reconstruct",
]
