"""Common corruptions: noise, blur, contrast, JPEG and shift, in five severities.

The first four and their parameters are those of ImageNet-C (Hendrycks & Dietterich, ICLR 2019,
arXiv 1903.12261). Ours differ in that

- the width of the blur, there in pixels of an image of 224 x 224, scales with the shorter side;
- the result stays in floating point (but for JPEG), where ImageNet-C is stored as 8-bit JPEG files;
- what is random depends on the seed and on the place of an image, not on its batch, and is the same
  at all severities;
- `shift` is added: whole pixels along one of eight directions, with the edge repeated.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pfsurgery.errors import DataError, UnknownNameError, closest

SEVERITIES = (1, 2, 3, 4, 5)
PARAMETERS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, of pixels 0 to 1
    "gaussian_blur": (1, 2, 3, 4, 6),  # standard deviation in pixels at 224 x 224
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # share of the distance from the mean that is left
    "jpeg": (25, 18, 15, 10, 7),  # Pillow's quality
    "shift": (7, 14, 21, 28, 42),  # pixels at 224 x 224
}
_SIDE = 224  # pixels
_TRUNCATE = 4  # standard deviations at which the blur's kernel ends
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def corrupt(pixels: Tensor, name: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupted images.

    Shape:
        (N, 3, H, W) -> (N, 3, H, W), values from 0 to 1, float32.

    Args:
        pixels: Images with values from 0 to 1.
        name: One of `PARAMETERS`.
        severity: 1 to 5.
        seed: Of what is random.
        first: Place of the first image among all images, so that batches may have any size.

    Raises:
        UnknownNameError: There is no such corruption.
        DataError: The severity is not from 1 to 5, or `pixels` are not such images.

    Example:
        >>> corrupt(torch.full((1, 3, 2, 2), 0.25), "contrast", 5).unique()
        tensor([0.2500])
    """
    if name not in _CORRUPTIONS:
        raise UnknownNameError(f"No corruption {name!r}. {closest(name, _CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise DataError(f"Severities are 1 to 5, not {severity!r}.")
    if pixels.dim() != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise DataError(
            f"Corruptions need floating-point images of shape (N, 3, H, W), not {pixels.dtype} of "
            f"shape {tuple(pixels.shape)}."
        )
    if len(pixels) and not (float(pixels.min()) >= 0 and float(pixels.max()) <= 1):
        raise DataError("Corruptions need pixels from 0 to 1: undo the normalisation first.")
    amount = PARAMETERS[name][severity - 1]
    generators = [generator_of(seed, first + place) for place in range(len(pixels))]
    return _CORRUPTIONS[name](pixels.float(), amount, generators).clamp(0, 1)


def generator_of(seed: int, place: int) -> torch.Generator:
    """What is random about the image at a place among all images (on the CPU)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + place) % 2**32)


def _noise(pixels: Tensor, deviation: float, generators: list[torch.Generator]) -> Tensor:
    shape = pixels.shape[1:]
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return pixels + deviation * torch.stack(noise).to(pixels.device) if noise else pixels


def _blur(pixels: Tensor, deviation: float, _: list[torch.Generator]) -> Tensor:
    count, channels, height, width = pixels.shape
    deviation *= min(height, width) / _SIDE
    radius = int(_TRUNCATE * deviation + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=pixels.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / deviation) ** 2)
    kernel /= kernel.sum()
    planes = pixels.reshape(count * channels, 1, height, width)
    padded = F.pad(planes, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1)).view_as(pixels)


def _contrast(pixels: Tensor, left: float, _: list[torch.Generator]) -> Tensor:
    mean = pixels.mean((2, 3), keepdim=True)
    return mean + left * (pixels - mean)


def _jpeg(pixels: Tensor, quality: float, _: list[torch.Generator]) -> Tensor:
    whole = (pixels * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    coded = np.empty_like(whole)
    for place, image in enumerate(whole):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        coded[place] = np.asarray(Image.open(file))
    return torch.from_numpy(coded).permute(0, 3, 1, 2).to(pixels.device).float() / 255


def _shift(pixels: Tensor, distance: float, generators: list[torch.Generator]) -> Tensor:
    height, width = pixels.shape[2:]
    moved = torch.empty_like(pixels)
    for place, generator in enumerate(generators):
        chosen = int(torch.randint(len(_DIRECTIONS), (), generator=generator))
        indices = []
        for direction, size in zip(_DIRECTIONS[chosen], (height, width), strict=True):
            by = direction * max(1, round(distance * size / _SIDE))
            indices.append((torch.arange(size, device=pixels.device) - by).clamp(0, size - 1))
        moved[place] = pixels[place][:, indices[0]][:, :, indices[1]]
    return moved


_CORRUPTIONS: dict[str, Callable[[Tensor, float, list[torch.Generator]], Tensor]] = {
    "gaussian_noise": _noise,
    "gaussian_blur": _blur,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "shift": _shift,
}
