"""Pixels from 0 to 1, as corruptions and attacks see them, and what models are given of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pfsurgery.digits import digits


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Models are given (pixel - mean) / std, with pixels from 0 to 1.

    Attributes:
        mean: Of each channel.
        std: Of each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def undo(self, images: Tensor) -> Tensor:
        """Pixels from 0 to 1 of normalised images (N, C, H, W), in float32."""
        mean, std = self._shaped(images)
        return (images.float() * std + mean).clamp(0, 1)

    def redo(self, pixels: Tensor) -> Tensor:
        """Normalised images of pixels (N, C, H, W); gradients pass through."""
        mean, std = self._shaped(pixels)
        return (pixels - mean) / std

    def _shaped(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return mean, std


def normalisation_of(model: nn.Module, source: object = None) -> Normalisation:
    """How images from `source` are normalised for `model`.

    Args:
        model: Its `pretrained_cfg` is read by timm's `resolve_model_data_config`.
        source: Where the images come from; the embedded `digits` have a normalisation of their own.
    """
    if str(source) == "digits":
        data = digits()
        return Normalisation(data.mean, data.std)
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    return Normalisation(tuple(config["mean"]), tuple(config["std"]))
