"""Where a convolution looks: the geometry that ops share, with every kind of padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pfsurgery.kernels.axes import Axis, Weighing, axis
from pfsurgery.sites import Geometry, Pair, Size


@dataclass(frozen=True, slots=True)
class Window:
    """The windows of a convolution, without channels; fields as in `Geometry`."""

    kernel_size: Size
    stride: Size = (1, 1)
    padding: Size | Literal["same"] = (0, 0)
    dilation: Size = (1, 1)
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, geometry: Geometry) -> Window:
        """The windows that a convolution of this geometry looks through."""
        return cls(
            geometry.kernel_size,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.padding_mode,
        )

    @property
    def dims(self) -> int:
        """Axes that the windows slide along: 2 for images."""
        return len(self.kernel_size)

    @property
    def stock_padding(self) -> Size | None:
        """Padding as PyTorch's pooling takes it, None where it would refuse it."""
        if self.padding == "same" or self.padding_mode != "zeros":
            return None
        small = all(p <= k // 2 for p, k in zip(self.padding, self.kernel_size, strict=True))
        return self.padding if small else None

    @property
    def center(self) -> Size:
        """The tap in the middle of the kernel; of an even kernel, the one above and left of it."""
        return tuple((size - 1) // 2 for size in self.kernel_size)

    def pad(self, x: Tensor, value: float = 0.0, mode: str | None = None) -> Tensor:
        """Pad (N, C, H, W) so that windows need no padding any more.

        Args:
            x: The input.
            value: What `"zeros"` padding is filled with.
            mode: Padding mode in place of the window's own.
        """
        edges = [pixels for axis in reversed(self._pads(self._size(x))) for pixels in axis]
        if not any(edges):
            return x
        mode = mode or self.padding_mode
        if mode == "zeros":
            return F.pad(x, edges, value=value)
        return in_layout_of(x, F.pad(x, edges, mode=mode))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The dense convolution of (N, C, H, W) by (outputs, C, kh, kw) through these windows."""
        if self.padding == "same" or self.padding_mode != "zeros":
            return F.conv2d(self.pad(x), weight, None, self.stride, 0, self.dilation)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)

    def axes(self, x: Tensor, weighing: Weighing) -> tuple[Axis, Axis] | None:
        """The two axes of the windows on (N, C, H, W); None where they are not for the kernels."""
        if self.dims != 2:
            return None
        return _axes(self, (x.shape[2], x.shape[3]), weighing)

    def _size(self, x: Tensor) -> Size:
        """Sizes of the axes that the windows slide along, one by one, as `torch.fx` can trace."""
        return tuple(x.shape[axis] for axis in range(-self.dims, 0))

    def _pads(self, size: Size) -> tuple[Pair, ...]:
        geometry = Geometry(1, 1, self.kernel_size, self.stride, self.padding, self.dilation)
        return geometry.pads(size)

    def tap(self, padded: Tensor, position: Size) -> Tensor:
        """What one tap of the kernel sees: a view (N, C, H', W') of the padded input."""
        seen: tuple[Any, ...] = tuple(
            slice(i * d, size - (k - 1 - i) * d, s)
            for i, d, k, s, size in zip(
                position,
                self.dilation,
                self.kernel_size,
                self.stride,
                self._size(padded),
                strict=True,
            )
        )
        index = (..., *seen)
        return padded[index]

    def near_taps(self) -> tuple[Size, ...]:
        """The taps of the kernel's inner 3x3 (fewer where the kernel is smaller), center first."""
        near = [
            [i for i in (c - 1, c, c + 1) if 0 <= i < k]
            for c, k in zip(self.center, self.kernel_size, strict=True)
        ]
        return (self.center, *(tap for tap in product(*near) if tap != self.center))

    def why_empty(self) -> str | None:
        """Why some windows would hold nothing but padding, None where each holds a pixel."""
        if self.padding_mode != "zeros":
            return None
        spans = [(k - 1) * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        if self.padding == "same":
            uneven = any(
                k % 2 == 0 and d > 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)
            )
            return (
                "a dilated even kernel with 'same' padding can miss every pixel" if uneven else None
            )
        for padding, span, kernel, dilation in zip(
            self.padding, spans, self.kernel_size, self.dilation, strict=True
        ):
            uneven = kernel % 2 == 0 and dilation > 1 and padding > 0
            if padding > (span + 1) // 2 or uneven:
                return (
                    f"padding {padding} around a kernel that spans {span + 1} pixels: "
                    f"border windows could hold nothing but padding"
                )
        return None


@lru_cache(maxsize=1024)
def _axes(window: Window, size: Pair, weighing: Weighing) -> tuple[Axis, Axis] | None:
    if window.padding_mode != "zeros" or prod(window.kernel_size) > 256 or window.why_empty():
        return None
    made = []
    fields = (window.kernel_size, window.stride, window.dilation)
    for i, pad in enumerate(window._pads(size)):
        kernel_size, stride, dilation = (field[i] for field in fields)
        outputs = (size[i] + sum(pad) - dilation * (kernel_size - 1) - 1) // stride + 1
        if outputs < 1:
            return None
        made.append(axis(size[i], outputs, kernel_size, stride, dilation, pad[0], weighing))
    return made[0], made[1]


def in_layout_of(x: Tensor, made: Tensor) -> Tensor:
    """`made` (N, C, H, W) with its channels innermost where `x` has them so."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if layout is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return made  # vmap and its kin cannot say how the numbers lie
    return made.contiguous(memory_format=layout) if x.is_contiguous(memory_format=layout) else made
