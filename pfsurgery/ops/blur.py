"""Binomial blur: a fixed low-pass filter, per channel."""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.kernels import choice, functions
from pfsurgery.ops.base import Op, register_op
from pfsurgery.ops.window import Window
from pfsurgery.sites import Site


class Blur(nn.Module):
    """Binomial filter of the window's size: (N, C, H, W) to (N, C, H', W').

    The filter is the outer product of two rows of Pascal's triangle, scaled to sum 1 (3x3: 1 2 1),
    computed as two one-dimensional passes (Zhang, ICML 2019, arXiv 1904.11486, uses it against
    aliasing). Equal to a depthwise convolution with that filter.

    Borders: edge pixels are repeated, so a constant input stays constant; with reflect or circular
    padding, as these say. No parameters; height + width of the kernel MACs per output.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        height, width = window.kernel_size
        self.register_buffer("rows", _binomial(height).reshape(1, 1, height, 1), persistent=False)
        self.register_buffer("columns", _binomial(width).reshape(1, 1, 1, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The filtered input."""
        window = self.window
        # Under autocast the stock convolution would cast; a shadow's device has no autocast to ask.
        if choice.why_stock(x) is None and not torch.is_autocast_enabled(x.device.type):
            axes = window.axes(x, "binomial")
            if axes is not None:
                return functions.weighted_sum(x, *axes)
        mode = "replicate" if window.padding_mode == "zeros" else window.padding_mode
        channels = x.shape[-3]
        (down, right), (dilate_down, dilate_right) = window.stride, window.dilation
        x = window.pad(x, mode=mode)
        rows = self.rows.to(x.dtype).expand(channels, 1, -1, -1)
        columns = self.columns.to(x.dtype).expand(channels, 1, -1, -1)
        x = F.conv2d(x, rows, stride=(down, 1), dilation=(dilate_down, 1), groups=channels)
        return F.conv2d(x, columns, stride=(1, right), dilation=(1, dilate_right), groups=channels)

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
        """Two one-dimensional passes (the first at the stride of its own axis only)."""
        height, width = site.geometry.kernel_size
        return site.geometry.in_channels * (height * site.geometry.stride[1] + width)


register_op(BlurOp())
