"""A convolution that keeps its weights packed, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.kernels import onednn
from pfsurgery.sites import geometry_of


class PackedConv2d(nn.Conv2d):
    """A convolution (N, C, H, W) to (N, C', H', W') whose weights oneDNN has in its own order.

    With gradients, in other layouts than channels last, and wherever someone traces, it is the
    convolution that it was made from. Weights that are loaded later are not noticed.

    Args:
        conv: The convolution; its parameters are shared.
        input_shape: The (N, C, H, W) that the packed weights are best for.
    """

    def __init__(self, conv: nn.Conv2d, input_shape: tuple[int, ...]) -> None:
        window: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        further: Any = (conv.groups, conv.bias is not None, conv.padding_mode, "meta")
        super().__init__(conv.in_channels, conv.out_channels, *window, *further)
        self.weight, self.bias = conv.weight, conv.bias
        self._input_shape = input_shape
        self._pack()

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of (N, C, H, W)."""
        if self._packed is None or self._is_tracked(input) or not onednn.serves(input, self.weight):
            return super().forward(input)
        return self._packed(input)

    def _is_tracked(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *self.parameters())
        )

    def _pack(self) -> None:
        geometry = geometry_of(self)
        self._packed = onednn.packed(self.weight, self.bias, geometry, self._input_shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Packed weights go where the weights go."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but the packed weights, which cannot be copied."""
        return {**self.__dict__, "_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()
