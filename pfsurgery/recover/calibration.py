"""Calibration images, and frozen copies of the models that they run through."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from pfsurgery.batches import unlabelled_images
from pfsurgery.errors import DataError


def calibration_batches(images: Any, model: nn.Module) -> list[Tensor]:
    """Unlabelled images as batches (N, C, H, W) on the device and in the dtype of `model`.

    Raises:
        DataError: There are none.
    """
    if images is None:
        raise DataError(
            "This is fitted to images: pass images= (a few hundred to a few thousand, "
            "unlabelled), as an iterable of batches (N, C, H, W), a DataLoader or a path."
        )
    parameter = next(model.parameters())
    batches = [
        batch.to(parameter.device, parameter.dtype) for batch in unlabelled_images(images, model)
    ]
    if not batches:
        raise DataError("images= holds no batch; give at least one.")
    return batches


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose parameters need no gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)
