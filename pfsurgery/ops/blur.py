"""Binomial blur: a fixed low-pass filter, per channel."""

from __future__ import annotations

from collections.abc import Callable
from math import comb, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.kernels import choice, functions
from pfsurgery.ops.base import Op, register_op
from pfsurgery.ops.window import Window, in_layout_of
from pfsurgery.sites import Site

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Blur(nn.Module):
    """Binomial filter of the window's size: (N, C, H, W) to (N, C, H', W').

    The filter is the outer product of two rows of Pascal's triangle, scaled to sum 1 (3x3: 1 2 1),
    computed as one-dimensional passes, one an axis (Zhang, ICML 2019, arXiv 1904.11486, uses it
    against aliasing). Equal to a depthwise convolution with that filter.

    Borders: edge pixels are repeated, so a constant input stays constant; with reflect or circular
    padding, as these say. No parameters; height + width of the kernel MACs per output.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        for axis, size in enumerate(window.kernel_size):
            shape = [size if axis == other else 1 for other in range(window.dims)]
            taps = _binomial(size).reshape(1, 1, *shape)
            self.register_buffer(f"taps{axis}", taps, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """The filtered input."""
        window = self.window
        # Under autocast the stock convolution would cast; a shadow's device has no autocast to ask.
        if choice.why_stock(input) is None and not torch.is_autocast_enabled(input.device.type):
            axes = window.axes(input, "binomial")
            if axes is not None and choice.has_loops(input, *axes, sums=True):
                return functions.weighted_sum(input, *axes)
        mode = "replicate" if window.padding_mode == "zeros" else window.padding_mode
        channels = input.shape[-1 - window.dims]
        convolve: Callable[..., Tensor] = _CONVOLVE[window.dims]
        made = window.pad(input, mode=mode)
        # torch 2.14 convolves a single strided channel wrongly in channels_last; tracers see no int
        if type(channels) is int and channels == 1:
            made = made.clone(memory_format=torch.contiguous_format)
        for axis in range(window.dims):
            taps: Tensor = getattr(self, f"taps{axis}").to(input.dtype)
            taps = taps.expand(channels, 1, *(-1 for _ in range(window.dims)))
            stride, dilation = ([1] * window.dims for _ in range(2))
            stride[axis], dilation[axis] = window.stride[axis], window.dilation[axis]
            made = convolve(made, taps, stride=stride, dilation=dilation, groups=channels)
        return in_layout_of(input, made)

    def extra_repr(self) -> str:
        """The window, for printing."""
        return str(self.window)


def _binomial(size: int) -> Tensor:
    return torch.tensor([comb(size - 1, i) / 2 ** (size - 1) for i in range(size)])


class BlurOp(Op):
    """Fixed binomial filter over the convolution's window."""

    name = "blur"
    summary = "fixed binomial filter; edge pixels are repeated"

    def build(self, site: Site) -> nn.Module:
        """A `Blur` with the site's window."""
        return Blur(Window.of(site.geometry))

    def macs_per_position(self, site: Site) -> int:
        """One pass an axis, which has taken the strides of its own and earlier axes only."""
        geometry = site.geometry
        passes = (
            size * prod(geometry.stride[i + 1 :]) for i, size in enumerate(geometry.kernel_size)
        )
        return geometry.in_channels * sum(passes)


register_op(BlurOp())
