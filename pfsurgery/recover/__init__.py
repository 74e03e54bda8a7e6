"""Winning back accuracy after surgery."""

from pfsurgery.recover.bare import Bare, bare
from pfsurgery.recover.budget import Budget, budget
from pfsurgery.recover.config import EpochRecord, FinetuneConfig, FinetuneResult
from pfsurgery.recover.evaluate import Accuracy, evaluate
from pfsurgery.recover.finetune import finetune
from pfsurgery.recover.layers import refit_layers
from pfsurgery.recover.norms import recalibrate
from pfsurgery.recover.reconstruct import reconstruct
from pfsurgery.recover.refit import Refit

__all__ = [
    "Accuracy",
    "Bare",
    "Budget",
    "EpochRecord",
    "FinetuneConfig",
    "FinetuneResult",
    "Refit",
    "bare",
    "budget",
    "evaluate",
    "finetune",
    "recalibrate",
    "reconstruct",
    "refit_layers",
]
