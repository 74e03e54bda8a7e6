"""Moving pixels: shift, and identity as the shift by nothing."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from pfsurgery.errors import ShapeError
from pfsurgery.kernels import choice, functions
from pfsurgery.kernels.axes import Axis
from pfsurgery.kernels.layout import Group
from pfsurgery.ops.base import Op, register_op
from pfsurgery.ops.window import Window, in_layout_of
from pfsurgery.sites import Site, Size


class Shift(nn.Module):
    """Move groups of channels by one pixel: (N, C, H, W) to (N, C, H', W').

    The channels are cut into contiguous groups, one for each tap of the kernel's inner 3x3: the
    first stays, the others move by one (dilated) pixel in the 8 directions (Wu et al., "Shift",
    CVPR 2018, arXiv 1711.08141); signals (N, C, L) have 2 directions, volumes 26. Equal to a
    depthwise convolution whose filters have a single 1.

    Borders: zeros move in, or what the window's padding mode says. No parameters, no MACs, no
    arithmetic.
    """

    def __init__(self, window: Window, channels: int) -> None:
        super().__init__()
        self.window = window
        taps = window.near_taps()
        base, rest = divmod(channels, len(taps))
        self.taps = tuple(
            (tap, base + (i < rest)) for i, tap in enumerate(taps) if base + (i < rest)
        )

    def forward(self, input: Tensor) -> Tensor:
        """Each group at its place."""
        if choice.why_stock(input) is None:
            given, wanted = input.shape[-1 - self.window.dims], sum(size for _, size in self.taps)
            if given != wanted:
                raise ShapeError(f"A shift of {wanted} channels was given {given}.")
            axes = self.window.axes(input, "none")
            if axes is not None:
                return functions.shift(input, _groups(axes, self.taps))
        padded = self.window.pad(input)
        channels = -1 - self.window.dims
        groups = torch.split(padded, [size for _, size in self.taps], dim=channels)
        moved = [self.window.tap(groups[i], tap) for i, (tap, _) in enumerate(self.taps)]
        return in_layout_of(input, torch.cat(moved, dim=channels))

    def extra_repr(self) -> str:
        """The window, for printing."""
        return str(self.window)


@lru_cache(maxsize=1024)
def _groups(axes: tuple[Axis, Axis], taps: tuple[tuple[Size, int], ...]) -> tuple[Group, ...]:
    """For each tap the end of its channels, and the axes that see it alone."""
    ends = accumulate(channels for _, channels in taps)
    down, across = axes
    return tuple(
        (end, down.tap(i), across.tap(j)) for end, ((i, j), _) in zip(ends, taps, strict=True)
    )


class Subsample(nn.Module):
    """The pixels under the middle of each window, copied: (N, C, H, W) to (N, C, H', W')."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, input: Tensor) -> Tensor:
        """A new tensor, so that a following in-place operation cannot reach the input."""
        centre = self.window.tap(self.window.pad(input), self.window.center)
        return in_layout_of(input, centre.clone())

    def extra_repr(self) -> str:
        """The window, for printing."""
        return str(self.window)


class ShiftOp(Op):
    """Channel groups moved by one pixel."""

    name = "shift"
    summary = "channel groups moved by one pixel in 8 directions, one group kept"

    def build(self, site: Site) -> nn.Module:
        """A `Shift` with the site's window."""
        return Shift(Window.of(site.geometry), site.geometry.in_channels)


class IdentityOp(Op):
    """Nothing at all, or, at a strided site, every s-th pixel."""

    name = "identity"
    summary = "the input itself, subsampled where the site has a stride"

    def build(self, site: Site) -> nn.Module:
        """A `Copy`, or a `Subsample` where the sizes differ."""
        window = Window.of(site.geometry)
        pads = site.geometry.pads(site.input_shape[-window.dims :])
        centred = all(
            (before, after) == (centre * dilation, (size - 1 - centre) * dilation)
            for (before, after), centre, dilation, size in zip(
                pads, window.center, window.dilation, window.kernel_size, strict=True
            )
        )
        if set(window.stride) == {1} and centred:
            return Copy()
        return Subsample(window)


class Copy(nn.Module):
    """The input as a new tensor, since what follows may change it in place."""

    def forward(self, input: Tensor) -> Tensor:
        """A copy of `input` (N, C, H, W)."""
        return input.clone()


register_op(ShiftOp())
register_op(IdentityOp())
