"""The weight that a layer multiplies with, which some classes make from the one that they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pfsurgery.sites import CONVOLUTIONS, Convolution

_PLAIN = (nn.Linear, *CONVOLUTIONS.values())
_MULTIPLY = {torch.conv1d, torch.conv2d, torch.conv3d, nn.functional.linear}


class _Watched(TorchFunctionMode):
    """Notes the weight of the last convolution or linear function that was called."""

    weight: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MULTIPLY:
            self.weight = args[1] if len(args) > 1 else kwargs["weight"]
        return func(*args, **kwargs)


def applied_weight(layer: Convolution | nn.Linear) -> Tensor:
    """The weight that `layer` multiplies with, found by one pass of zeros.

    It is `layer.weight` itself, but for classes that make another one from it in each pass: timm's
    `StdConv2d` standardises it, parametrizations do what they like.
    """
    if type(layer) in _PLAIN:
        return layer.weight
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (1, layer.in_features)
    else:
        spans = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = (1, layer.in_channels, *(dilation * (k - 1) + 1 for k, dilation in spans))
    held = layer.weight
    with torch.no_grad(), _Watched() as watched:
        layer.forward(held.new_zeros(shape))
    return held if watched.weight is None else watched.weight
