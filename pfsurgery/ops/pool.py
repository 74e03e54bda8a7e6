"""Pooling: the maximum or the mean of a window, per channel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.kernels import choice, functions
from pfsurgery.kernels.axes import Axis, Weighing
from pfsurgery.ops.base import Op, Support, register_op
from pfsurgery.ops.window import Window, in_layout_of
from pfsurgery.sites import Site, Size

_NARROW = 16
_MOST_FOR_INDUCTOR = 25  # taps of a max-pool; larger ones it leaves to ATen, which is slow
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_DOWN = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class MaxPool(nn.Module):
    """Maximum over a window: (N, C, H, W) to (N, C, H', W'), sizes as a convolution gives them.

    Borders: padding never wins (it is minus infinity); with reflect, replicate or circular padding
    the padded pixels count. Comparisons per output: kernel area - 1. No parameters, no MACs.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, input: Tensor) -> Tensor:
        """The window's maximum for each channel."""
        window = self.window
        if (axes := _axes(window, input, "none")) is not None:
            return functions.max_pool(input, *axes)
        pool: Callable[..., Tensor] = _MAX[window.dims]
        padded, padding = input, window.stock_padding
        if padding is None:
            padded, padding = window.pad(input, value=-math.inf), (0,) * window.dims
        if math.prod(window.kernel_size) > _MOST_FOR_INDUCTOR and _compiles():
            made = self._axis_by_axis(pool, padded, padding)
        else:
            made = pool(padded, window.kernel_size, window.stride, padding, window.dilation)
        return in_layout_of(input, made)

    def _axis_by_axis(self, pool: Callable[..., Tensor], x: Tensor, padding: Size) -> Tensor:
        """The same maxima, of those along the last axis first."""
        window = self.window
        for axis in reversed(range(window.dims)):
            size, stride = _along(axis, window.kernel_size, 1), _along(axis, window.stride, 1)
            x = pool(x, size, stride, _along(axis, padding, 0), _along(axis, window.dilation, 1))
        return x

    def extra_repr(self) -> str:
        """The window, for printing."""
        return str(self.window)


class AvgPool(nn.Module):
    """Mean over a window: (N, C, H, W) to (N, C, H', W'), sizes as a convolution gives them.

    Borders: padded zeros are left out of the mean, so a constant input stays constant; with
    reflect, replicate or circular padding the padded pixels count. Additions per output: kernel
    area - 1. Equal to a depthwise convolution with the constant filter 1 / area inside the
    borders. No parameters, no MACs.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, input: Tensor) -> Tensor:
        """The window's mean for each channel."""
        window = self.window
        if (axes := _axes(window, input, "mean")) is not None:
            return functions.weighted_sum(input, *axes)
        pool: Callable[..., Tensor] = _MEAN[window.dims]
        padding = window.stock_padding
        if padding is not None:
            made = pool(input, window.kernel_size, window.stride, padding, count_include_pad=False)
            return in_layout_of(input, made)
        means = in_layout_of(input, pool(window.pad(input), window.kernel_size, window.stride))
        if window.padding_mode != "zeros":
            return means
        ones = torch.ones_like(input.narrow(-1 - window.dims, 0, 1))
        return means / pool(window.pad(ones), window.kernel_size, window.stride)

    def extra_repr(self) -> str:
        """The window, for printing."""
        return str(self.window)


def _along(axis: int, values: Size, elsewhere: int) -> Size:
    """The value at one axis, and another at all others."""
    return tuple(value if i == axis else elsewhere for i, value in enumerate(values))


def _compiles() -> bool:
    """Whether `torch.compile` is tracing; who exports wants the operator itself."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _axes(window: Window, x: Tensor, weighing: Weighing) -> tuple[Axis, Axis] | None:
    """The window's axes where a kernel runs on `x`, None where the stock call does.

    On a CPU the stock call is faster at a stride in channels_last and on small planes (see
    `benchmarks/kernels.py`).
    """
    if choice.why_stock(x) is not None:
        return None
    small = not x.is_contiguous() or x.shape[3] < _NARROW
    if set(window.stride) != {1} and x.device.type == "cpu" and small:
        return None
    axes = window.axes(x, weighing)
    if axes is None or not choice.has_loops(x, *axes, sums=weighing != "none"):
        return None
    return axes


class MaxPoolOp(Op):
    """Maximum over the convolution's window (Han et al., ICLR 2022, the efficient bottleneck)."""

    name = "max_pool"
    summary = "maximum over the window; padding never wins"

    def build(self, site: Site) -> nn.Module:
        """A `MaxPool` with the site's window."""
        return MaxPool(Window.of(site.geometry))


class AvgPoolOp(Op):
    """Mean over the convolution's window."""

    name = "avg_pool"
    summary = "mean over the window; padded zeros are left out"

    def supports(self, site: Site) -> Support:
        """Any window without dilation."""
        if set(site.geometry.dilation) != {1}:
            return Support("average pooling has no dilation")
        return super().supports(site)

    def build(self, site: Site) -> nn.Module:
        """An `AvgPool` with the site's window."""
        return AvgPool(Window.of(site.geometry))


class AvgDownOp(Op):
    """2x2 mean in front of the same convolution at stride 1 (the hybrid network's stride-2 sites).

    From Han et al., ICLR 2022. Their code floors odd sizes and crashes where the shortcut rounds
    up; here the last row and column of an odd size are averaged on their own.
    """

    name = "avg_down"
    summary = "2x2 mean, then the same convolution at stride 1 (keeps its weights)"
    keeps_convolution = True

    def supports(self, site: Site) -> Support:
        """Stride 2 and an odd kernel whose padding keeps the size at stride 1."""
        geometry = site.geometry
        if set(geometry.stride) != {2}:
            return Support("only a stride of 2 can move into a 2x2 average pool")
        same = tuple(
            (k - 1) * d for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)
        )
        if geometry.padding == "same":
            return Support()
        if tuple(2 * p for p in geometry.padding) != same:
            return Support("its padding would change the size once its stride is 1")
        return Support()

    def build(self, site: Site) -> nn.Module:
        """A 2x2 average pool that rounds sizes up."""
        down: nn.Module = _DOWN[site.geometry.dims](2, 2, ceil_mode=True)
        return down


register_op(MaxPoolOp())
register_op(AvgPoolOp())
register_op(AvgDownOp())
