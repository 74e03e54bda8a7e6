"""What the paper's two studies are made with: plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pfsurgery.errors import SurgeryError
from pfsurgery.recover.config import FinetuneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySetting:
    """Images, networks and training; the same for everything that is compared.

    Attributes:
        images: Training images, as many of each class; None for all.
        val_images: Validation images, as many of each class; None for all.
        size: Height and width that images at a path are resized to, in pixels.
        layers: Bottlenecks in each of the stages, at most four.
        width: Channels in the middle of the first stage's bottlenecks; each stage has twice as many
            as the one before. A bottleneck gives four times as many.
        stem_stride: Stride of the first convolution.
        epochs: Passes over the training images for each network.
        batch_size: Images in a batch.
        lr: Highest learning rate of stochastic gradient descent with Nesterov momentum; it falls
            to 0 as a cosine.
        weight_decay: Weight decay, of convolutions and the classifier.
        seeds: Trainings of each network, which differ in first weights and order of images.

    Raises:
        SurgeryError: A value is out of its range.
    """

    images: int | None
    val_images: int | None
    size: int = 32
    layers: tuple[int, ...] = (2, 2, 2)
    width: int = 16
    stem_stride: int = 3
    epochs: int = 5
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    seeds: int = 3

    def __post_init__(self) -> None:
        _check("images", self.images is None or self.images >= 2, "at least 2, or None")
        _check("val_images", self.val_images is None or self.val_images >= 1, "1 or more, or None")
        _check("layers", 1 <= len(self.layers) <= 4 and min(self.layers) >= 1, "1 to 4 numbers > 0")
        for name in ("size", "width", "stem_stride", "seeds"):
            _check(name, getattr(self, name) >= 1, "at least 1")
        self.training(0)

    def training(self, seed: int) -> FinetuneConfig:
        """How one network is trained."""
        return FinetuneConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer="sgd",
            lr=self.lr,
            weight_decay=self.weight_decay,
            channels_last=True,
            keep_last=1,
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """The setting as JSON-ready values."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _check(name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise SurgeryError(f"The study's {name} must be {allowed}.")
