"""Parameter-free columns: channels under shifts, averages and maxima, chosen one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.ops.window import Window, in_layout_of
from pfsurgery.sites import Geometry, Pair
from pfsurgery.structure import Run

if TYPE_CHECKING:
    from pfsurgery.kernels.cuda_bottleneck import Taps


class Columns(nn.Module):
    """Parameter-free columns: (N, C, H, W) to (N, B, H', W'), sizes as a convolution gives them.

    Each column is one channel under one operation: a tap of the kernel (a shift; zeros move in),
    the average (padded zeros left out) or the maximum (padding never wins) of a rectangle of taps.
    Columns of one operation are neighbours, so each operation works on one run of channels.

    Args:
        geometry: Of the convolution.
        runs: The columns, sorted by operation.
        in_order: Sort the columns by channel again, for a site that keeps its channels.
    """

    order: Tensor | None

    def __init__(
        self, geometry: Geometry, runs: tuple[Run, ...], *, in_order: bool = False
    ) -> None:
        super().__init__()
        channels = [channel for run in runs for channel in run.channels]
        order = sorted(range(len(channels)), key=channels.__getitem__)
        moved = in_order and order != list(range(len(order)))
        self.register_buffer("order", torch.tensor(order) if moved else None, persistent=False)
        self._taps: dict[tuple[Pair, torch.device], Taps] = {}
        self.geometry = geometry
        self.window = Window.of(geometry)
        self.runs = runs
        for place, run in enumerate(runs):
            first, count = run.channels[0], len(run.channels)
            if run.channels != tuple(range(first, first + count)):
                self.register_buffer(
                    f"channels_{place}", torch.tensor(run.channels), persistent=False
                )

    def forward(self, input: Tensor) -> Tensor:
        """The columns, operation by operation or in the channels' order."""
        padded = self.window.pad(input)
        columns = []
        for place, run in enumerate(self.runs):
            if run.kind == "tap":
                columns.append(self._channels(self.window.tap(padded, (run.top, run.left)), place))
            else:
                columns.append(self._pooled(self._channels(input, place), run))
        joined = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        if self.order is not None:
            joined = joined.index_select(1, self.order)
        return in_layout_of(input, joined)

    def times(self, x: Tensor, product: Tensor) -> Tensor:
        """The columns of (N, C, H, W) times a product (outputs, B): (N, outputs, H', W').

        All taps together are one convolution whose kernel is mostly zeros, and so are all sums
        over one rectangle; these are divided behind the product. It has more multiply-adds than
        gathering the columns, but one backward pass that libraries do well.
        """
        outputs = len(product)
        parts = torch.split(product, [len(run.channels) for run in self.runs], dim=1)
        maxima, products = [], []
        linear: dict[Run | None, list[tuple[Run, Tensor]]] = {}
        for place, (run, part) in enumerate(zip(self.runs, parts, strict=True)):
            if run.kind == "maximum":
                maxima.append(self._pooled(self._channels(x, place), run))
                products.append(part)
            else:
                rectangle = replace(run, channels=()) if run.kind == "average" else None
                linear.setdefault(rectangle, []).append((run, part))
        added = []
        if linear:
            kernels = [self._scattered(terms, x.shape[1]) for terms in linear.values()]
            sums = torch.split(self.window.convolve(x, torch.cat(kernels)), outputs, dim=1)
            added += [
                part if rectangle is None else part / self._pixels(x, rectangle)
                for rectangle, part in zip(linear, sums, strict=True)
            ]
        if maxima:
            weight = torch.cat(products, 1)[:, :, None, None]
            added.append(F.conv2d(torch.cat(maxima, 1), weight))
        total: Tensor = reduce(torch.add, added)
        return total

    def taps(self, x: Tensor) -> Taps:
        """Where the columns of (N, C, H, W) that are taps are read, on the device of `x`."""
        from pfsurgery.kernels.cuda_bottleneck import taps_of

        size = (x.shape[-2], x.shape[-1])
        if (size, x.device) not in self._taps:
            self._taps[size, x.device] = taps_of(self.runs, self.geometry, size, x.device)
        return self._taps[size, x.device]

    def pooled(self, x: Tensor) -> Tensor | None:
        """The columns of (N, C, H, W) that are not taps, (N, P, H', W'), None if all are."""
        made = [
            self._pooled(self._channels(x, place), run)
            for place, run in enumerate(self.runs)
            if run.kind != "tap"
        ]
        return torch.cat(made, dim=1) if made else None

    def _scattered(self, terms: list[tuple[Run, Tensor]], inputs: int) -> Tensor:
        """The kernel (outputs, inputs, kh, kw) that multiplies sums of taps by their products."""
        height, width = self.window.kernel_size
        places, parts = [], []
        for run, part in terms:
            rows = range(run.top, run.top + run.height)
            for at in (i * width + run.left + j for i in rows for j in range(run.width)):
                places += [channel * height * width + at for channel in run.channels]
                parts.append(part)
        weights = torch.cat(parts, dim=1)
        kernel = weights.new_zeros(len(weights), inputs * height * width)
        index = torch.tensor(places, device=weights.device)
        return kernel.index_add(1, index, weights).view(-1, inputs, height, width)

    def _pixels(self, x: Tensor, run: Run) -> Tensor:
        """How many pixels of the input each rectangle holds: (1, 1, H', W')."""
        ones = F.pad(torch.ones_like(x[:1, :1]), self._edges(x, run))
        size = (run.height, run.width)
        return F.avg_pool2d(ones, size, self.window.stride, divisor_override=1)

    def _channels(self, x: Tensor, place: int) -> Tensor:
        index = getattr(self, f"channels_{place}", None)
        if index is not None:
            return x.index_select(1, index)
        run = self.runs[place]
        return x.narrow(1, run.channels[0], len(run.channels))

    def _pooled(self, x: Tensor, run: Run) -> Tensor:
        edges = self._edges(x, run)
        size, stride = (run.height, run.width), self.window.stride
        if run.kind == "maximum":
            return F.max_pool2d(F.pad(x, edges, value=-math.inf), size, stride)
        ones = F.pad(torch.ones_like(x[:1, :1]), edges)
        return F.avg_pool2d(F.pad(x, edges), size, stride) / F.avg_pool2d(ones, size, stride)

    def _edges(self, x: Tensor, run: Run) -> tuple[int, int, int, int]:
        """Padding (negative: cropping) that lets a stock pool read just the run's rectangle."""
        edges: list[int] = []
        pads = self.geometry.pads((x.shape[-2], x.shape[-1]))
        for axis in (1, 0):
            before, after = pads[axis]
            skipped = (run.top, run.left)[axis]
            taken = (run.height, run.width)[axis]
            kernel = self.window.kernel_size[axis]
            edges += [before - skipped, after - (kernel - skipped - taken)]
        return edges[0], edges[1], edges[2], edges[3]
