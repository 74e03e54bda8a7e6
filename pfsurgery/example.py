"""The example input of a model: what the caller gave, or what the model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pfsurgery.errors import ShapeError

Example = Tensor | tuple[Any, ...]

IMAGE_FIELDS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
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


def images_in(args: tuple[Any, ...]) -> int:
    """How many images the arguments of a forward pass hold: a batch, or a list as detectors take.

    1 where there is none.
    """
    if isinstance(args[0], list | tuple):
        return max(1, len(args[0]))
    batches = [x.shape[0] for x in tree_leaves(args) if isinstance(x, Tensor) and x.dim()]
    return max([1, *batches[:1]])


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that `model` was made for; channels follow its first convolution if it has few.

    A first convolution with many input channels stands behind a transform of the image.
    """
    channels, height, width = _timm_config(model).get("input_size") or _DEFAULT_SIZE
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and reads_image(first):
        channels = first.in_channels
    return int(channels), int(height), int(width)


def image_config(model: nn.Module) -> dict[str, Any]:
    """What images `model` expects, as timm's configuration on it states."""
    config = _timm_config(model)
    return {key: config[key] for key in IMAGE_FIELDS if key in config}


def set_image_config(model: nn.Module, images: Mapping[str, Any]) -> None:
    """Note what images `model` expects, where timm does."""
    model.pretrained_cfg = {**_timm_config(model), **images}  # type: ignore[assignment]


def _timm_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def reads_image(first: nn.Conv2d) -> bool:
    """Whether a model's first convolution has as few channels as an image."""
    return first.in_channels < _MOST_IMAGE_CHANNELS
