"""The fitted bottleneck as a module: reduce, operate, expand, with standard operators only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.errors import UnsupportedSiteError
from pfsurgery.kernels import choice
from pfsurgery.kernels.fused import Fused, Weights, pack_weights
from pfsurgery.ops.base import Op, Support, register_op
from pfsurgery.ops.window import Window, in_layout_of
from pfsurgery.sites import Geometry, Site
from pfsurgery.structure import Run, Structure

_PLAIN = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")


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
        channels = torch.tensor([channel for run in runs for channel in run.channels])
        order = channels.argsort(stable=True)
        sorted_already = bool((order == torch.arange(len(order))).all())
        self.register_buffer(
            "order", order if in_order and not sorted_already else None, persistent=False
        )
        self.geometry = geometry
        self.window = Window.of(geometry)
        self.runs = runs
        for place, run in enumerate(runs):
            first, count = run.channels[0], len(run.channels)
            if run.channels != tuple(range(first, first + count)):
                self.register_buffer(
                    f"channels_{place}", torch.tensor(run.channels), persistent=False
                )

    def forward(self, x: Tensor) -> Tensor:
        """The columns, operation by operation or in the channels' order."""
        padded = self.window.pad(x)
        columns = []
        for place, run in enumerate(self.runs):
            if run.kind == "tap":
                columns.append(self._channels(self.window.tap(padded, (run.top, run.left)), place))
            else:
                columns.append(self._pooled(self._channels(x, place), run))
        joined = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        if self.order is not None:
            joined = joined.index_select(1, self.order)
        return in_layout_of(x, joined)

    def times(self, x: Tensor, product: Tensor) -> Tensor:
        """The columns of (N, C, H, W) times a product (outputs, B): (N, outputs, H', W').

        All taps together are one convolution whose kernel is mostly zeros. It has more
        multiply-adds than gathering the columns, but one backward pass that libraries do well.
        """
        height, width = self.window.kernel_size
        taps, places, first = [], [], 0
        pools: list[Tensor] = []
        pooled: list[Tensor] = []
        for place, run in enumerate(self.runs):
            part = product[:, first : first + len(run.channels)]
            first += len(run.channels)
            if run.kind == "tap":
                at = run.top * width + run.left
                taps.append(part)
                places += [channel * height * width + at for channel in run.channels]
            else:
                pools.append(part)
                pooled.append(self._pooled(self._channels(x, place), run))
        kernel = product.new_zeros(len(product), x.shape[1] * height * width)
        if taps:
            index = torch.tensor(places, device=x.device)
            kernel = kernel.index_add(1, index, torch.cat(taps, dim=1))
        kernel = kernel.view(len(product), x.shape[1], height, width)
        stride, dilation = self.window.stride, self.window.dilation
        made = F.conv2d(self.window.pad(x), kernel, stride=stride, dilation=dilation)
        if pooled:
            made = made + F.conv2d(torch.cat(pooled, 1), torch.cat(pools, 1)[:, :, None, None])
        return made

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


class Bottleneck(nn.Module):
    """Reduce, operate, expand: (N, C, H, W) to (N, C', H', W').

    The operation in the middle is parameter-free columns, or, in the dense forms, a convolution
    between reduced widths. The efficient bottleneck of Han et al. (ICLR 2022) with its operations
    chosen from data; see `pfsurgery.structure.Structure` for the forms.
    """

    def __init__(self, geometry: Geometry, structure: Structure) -> None:
        super().__init__()
        inputs, outputs = geometry.in_channels, geometry.out_channels
        self.form = structure.form
        width = structure.reduce or inputs
        self.reduce = nn.Conv2d(inputs, width, 1, bias=False) if structure.reduce else None
        self.columns: Columns | None = None
        self.waist: nn.Conv2d | None = None
        if structure.dense:
            self.waist = _thin(geometry, width, structure.waist or outputs)
        else:
            self.columns = Columns(geometry, structure.runs)
            if structure.waist:
                self.waist = nn.Conv2d(structure.columns, structure.waist, 1, bias=False)
        last = structure.waist or structure.columns
        self.expand = nn.Conv2d(last, outputs, 1)
        self.relu = False
        self._kernel = Fused(geometry, structure)
        self._frozen: Weights | None = None

    def freeze(self) -> None:
        """Pack the weights for the fused kernel once: it sees no later change of them."""
        self._frozen = self._packed()

    def forward(self, x: Tensor) -> Tensor:
        """The bottleneck's output; with `relu`, negative numbers are raised to 0."""
        if self._is_fused(x):
            return self._kernel(x, self._frozen or self._packed(), relu=self.relu)
        if self.reduce is not None:
            x = self.reduce(x)
        expanded: Tensor = self.expand(self._middle(x)) if self.waist else self._middle(x)
        return F.relu(expanded) if self.relu else expanded

    def _middle(self, x: Tensor) -> Tensor:
        """The columns and the first product behind them, or the thin convolution."""
        product = self.expand if self.waist is None else self.waist
        if self.columns is None:
            made: Tensor = product(x)
            return made
        if self.form == "bottleneck" or not self._is_tracked(x) or choice.why_stock(x) is not None:
            made = product(self.columns(x))
            return made
        made = self.columns.times(x, product.weight[:, :, 0, 0])
        return made if product.bias is None else made + product.bias[:, None, None]

    def _is_tracked(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.expand.weight.requires_grad)

    def _is_fused(self, x: Tensor) -> bool:
        return not self._is_tracked(x) and choice.why_unfused(x) is None

    def _packed(self) -> Weights:
        """The weights as matrices (inputs, outputs), in the order of the columns."""
        middle = self.expand if self.waist is None else self.waist
        expand = None if self.waist is None else _matrix(self.expand)
        reduce = None if self.reduce is None else _matrix(self.reduce)
        assert self.expand.bias is not None
        return pack_weights(reduce, _matrix(middle), expand, self.expand.bias.detach())


def _thin(geometry: Geometry, inputs: int, outputs: int) -> nn.Conv2d:
    """A dense convolution that looks where the original looked."""
    size, stride, dilation = geometry.kernel_size, geometry.stride, geometry.dilation
    if geometry.padding == "same":
        from timm.layers import Conv2dSame

        same: nn.Conv2d = Conv2dSame(inputs, outputs, size, stride, dilation=dilation, bias=False)
        return same
    return nn.Conv2d(inputs, outputs, size, stride, geometry.padding, dilation, bias=False)


def _matrix(conv: nn.Conv2d) -> Tensor:
    """A convolution's weights as (taps * inputs, outputs)."""
    return conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2)


def fitted_module(geometry: Geometry, structure: Structure) -> nn.Module:
    """The module of a fitted site, its weights still to be set."""
    if structure.form == "bare":
        return Columns(geometry, structure.runs, in_order=True)
    return Bottleneck(geometry, structure)


class MixedOp(Op):
    """Parameter-free columns chosen from data, between pointwise convolutions."""

    name = "mixed"
    summary = "columns chosen from data between pointwise convolutions (policy budget)"
    fitted = True

    def supports(self, site: Site) -> Support:
        """Convolutions that mix channels, with plain weights and zero padding."""
        if site.kind == "depthwise":
            return Support("a product would cost more than this depthwise convolution")
        if site.module not in _PLAIN:
            return Support(f"{site.module} computes its weights, which are not read")
        if site.geometry.padding_mode != "zeros":
            return Support(f"fitted columns pad with zeros, this with {site.geometry.padding_mode}")
        return Support()

    def build(self, site: Site) -> nn.Module:
        """Raises an UnsupportedSiteError: without a structure there is nothing to build."""
        raise UnsupportedSiteError(
            f"{site.name}: {self.name} needs a structure, which is fitted to images (see budget)."
        )


class ThinOp(MixedOp):
    """A dense convolution between reduced widths; not parameter-free."""

    name = "thin"
    summary = "a dense convolution between reduced widths (policy budget); has parameters"


class BareOp(MixedOp):
    """One parameter-free operation a channel; the pointwise layer that follows is refitted."""

    name = "bare"
    summary = "one operation a channel, chosen from data; the next pointwise is refitted"

    def supports(self, site: Site) -> Support:
        """Sites that keep their channels and have a pointwise layer behind them."""
        geometry, around = site.geometry, site.neighbours
        if geometry.in_channels != geometry.out_channels:
            return Support("the number of channels changes")
        if site.kind not in ("dense", "depthwise"):
            return Support(f"one operation a channel does not stand for a {site.kind} convolution")
        if around.pointwise_after is None or site.calls != 1:
            return Support("no pointwise layer reads this site and nothing else")
        if site.kind == "dense" and around.norm is not None and around.norm not in around.tail:
            return Support(f"its norm {around.norm} is used elsewhere too")
        if geometry.padding_mode != "zeros":
            return Support(f"fitted columns pad with zeros, this with {geometry.padding_mode}")
        return Support()


register_op(MixedOp())
register_op(ThinOp())
register_op(BareOp())
