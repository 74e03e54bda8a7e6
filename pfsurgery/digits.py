"""The embedded set of images, which needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pfsurgery.errors import needs
from pfsurgery.images import held_out


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A small labelled set of images, held in memory.

    Attributes:
        train: Pairs of an image (C, H, W), float32 and normalised, and its class index.
        val: The same, of the held-out images.
        classes: Name of each class.
        input_size: (C, H, W) of every image, in pixels.
        mean: What was subtracted from each channel, where pixels range from 0 to 1.
        std: What each channel was then divided by.
    """

    train: TensorDataset
    val: TensorDataset
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8x8 to 32x32 pixels and made RGB.

    The split is always the same: every fourth image of each class is held out (445 of 1,797).
    Nothing is downloaded.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with needs("demo", "The set of digits"):
        from sklearn.datasets import load_digits
    pixels, target = load_digits(return_X_y=True)
    labels = torch.as_tensor(target, dtype=torch.int64)
    small = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    large = nn.functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    train, val = held_out(labels.tolist(), every=4)
    mean, std = float(large[train].mean()), float(large[train].std())
    images = ((large - mean) / std).expand(-1, 3, -1, -1).contiguous()
    return ImageSet(
        train=TensorDataset(images[train], labels[train]),
        val=TensorDataset(images[val], labels[val]),
        classes=tuple(str(digit) for digit in range(10)),
        input_size=(3, 32, 32),
        mean=(mean,) * 3,
        std=(std,) * 3,
    )
