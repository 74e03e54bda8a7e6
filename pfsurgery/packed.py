"""A convolution that keeps its weights packed, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.kernels import onednn
from pfsurgery.kernels.choice import is_tracked
from pfsurgery.sites import geometry_of


class PackedConv2d(nn.Conv2d):
    """A convolution (N, C, H, W) to (N, C', H', W') whose weights oneDNN has in its own order, too.

    With gradients, in other layouts than channels last, after a change of the weights and wherever
    someone traces, it is the convolution that it was made from. Made by `packed`.
    """

    __jit_unused_properties__ = ("is_packed",)  # which torch.jit.script leaves out

    @property
    def is_packed(self) -> bool:
        """Whether oneDNN computes such a convolution."""
        return self._kernel is not None

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of (N, C, H, W)."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            kernel, weights = self._kernel, self.parameters(recurse=False)
            if kernel and kernel.serves(input, self.weight) and not is_tracked(input, weights):
                return kernel(input, self.bias)
        made: Tensor = self._conv_forward(input, self.weight, self.bias)
        return made

    def pack(self, input_shape: tuple[int, ...]) -> None:
        """Pack the weights for inputs (N, C, H, W)."""
        self._input_shape = input_shape
        self._kernel = onednn.pack(geometry_of(self), self.weight, input_shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Packed weights go where the weights go."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pack(self._input_shape)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but the packed weights, which cannot be copied."""
        return {**self.__dict__, "_kernel": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack(self._input_shape)


def packed(conv: nn.Conv2d, input_shape: tuple[int, ...]) -> PackedConv2d:
    """A convolution with packed weights that has all that `conv` has; it shares the parameters.

    Args:
        conv: A `torch.nn.Conv2d`, not of a subclass, which may compute something else.
        input_shape: The (N, C, H, W) that the packed weights are best for.
    """
    made = PackedConv2d.__new__(PackedConv2d)
    own = {name: dict(getattr(conv, name)) for name in ("_parameters", "_buffers", "_modules")}
    made.__dict__ = {**conv.__dict__, **own}
    made.pack(input_shape)
    return made
