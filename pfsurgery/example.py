"""The example input of a model: what the caller gave, or what the model was made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import ShapeError

Example = Tensor | tuple[Any, ...]

_DEFAULT_SIZE = (3, 224, 224)
_MOST_IMAGE_CHANNELS = 16


def example_inputs(model: nn.Module, example: Example | None = None) -> tuple[Any, ...]:
    """The positional arguments of one forward pass.

    Args:
        model: The model that will be run.
        example: A tensor of shape (N, C, H, W), or a tuple of arguments. By default one image of
            zeros at the model's own input size (timm's `pretrained_cfg`, else 3x224x224), on the
            device and in the dtype of the model's parameters.

    Raises:
        ShapeError: `example` is neither a tensor nor a tuple.
    """
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, tuple) and example:
        return example
    if example is not None:
        raise ShapeError(
            f"example must be a tensor (N, C, H, W) or a non-empty tuple of arguments, "
            f"not {type(example).__name__}."
        )
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    shape = (1, *default_input_size(model))
    return (torch.zeros(shape, device=parameter.device, dtype=parameter.dtype),)


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that `model` was made for; channels follow its first convolution if it has few.

    A first convolution with many input channels stands behind a transform of the image.
    """
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    channels, height, width = size or _DEFAULT_SIZE
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and reads_image(first):
        channels = first.in_channels
    return int(channels), int(height), int(width)


def reads_image(first: nn.Conv2d) -> bool:
    """Whether a model's first convolution has as few channels as an image."""
    return first.in_channels < _MOST_IMAGE_CHANNELS
