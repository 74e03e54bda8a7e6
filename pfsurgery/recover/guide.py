"""The teacher as the steps of a training ask it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import SurgeryError
from pfsurgery.fold import with_folded_norms
from pfsurgery.recover.compilation import compiled
from pfsurgery.recover.config import FinetuneConfig
from pfsurgery.recover.evaluate import logits_of


class Guide:
    """Gives the teacher's logits, without gradients, in the precision of the training.

    What is asked is a copy with folded norms, which shares all other weights and calls the same
    hooks; it is made when the first images come. A teacher that cannot be traced is asked itself.

    Args:
        teacher: In eval mode, on the accelerator's device.
        config: Settings.
        accelerator: Accelerate's.
    """

    def __init__(self, teacher: nn.Module, config: FinetuneConfig, accelerator: Any) -> None:
        self.teacher, self.config, self.accelerator = teacher, config, accelerator
        self._asked: nn.Module | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) on the device.

        Raises:
            TrainingError: The teacher returns something else.
        """
        if self._asked is None:
            self._asked = compiled(self._folded(images[:1]), self.config)
        with torch.no_grad(), self.accelerator.autocast():
            return logits_of(self._asked, images)

    def _folded(self, image: Tensor) -> nn.Module:
        try:
            return with_folded_norms(self.teacher, image)
        except SurgeryError:
            return self.teacher
