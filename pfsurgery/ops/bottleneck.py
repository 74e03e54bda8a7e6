"""The fitted bottleneck as a module: reduce, operate, expand, with standard operators only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.errors import UnsupportedSiteError
from pfsurgery.kernels import choice
from pfsurgery.kernels.fused import Fused
from pfsurgery.kernels.fused_layout import Weights
from pfsurgery.modules import is_watched
from pfsurgery.ops.base import Op, Support, register_op
from pfsurgery.ops.columns import Columns
from pfsurgery.ops.pending import Pending
from pfsurgery.ops.window import Window
from pfsurgery.sites import Geometry, Site
from pfsurgery.structure import Structure

WIDEST_ON_GPU = 256  # a waist: what the registers of one program hold
_PLAIN = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")


class Bottleneck(nn.Module):
    """Reduce, operate, expand: (N, C, H, W) to (N, C', H', W').

    The operation in the middle is parameter-free columns, or, in the dense forms, a convolution
    between reduced widths. The efficient bottleneck of Han et al. (ICLR 2022) with its operations
    chosen from data; see `pfsurgery.structure.Structure` for the forms.

    Attributes:
        relu: Raise negative outputs to 0.
        summed: Nothing but an addition reads the output, so that the kernel may add.
        raised: Nothing but a ReLU reads the sum.
        on_gpu: Let one Triton kernel compute what it can on a GPU; `optimize` times it first.
    """

    on_gpu = summed = raised = False

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

    def forward(self, input: Tensor) -> Tensor:
        """The bottleneck's output; with `relu`, negative numbers are raised to 0.

        Where the kernel runs, and `summed` is set, it is computed when it is read.
        """
        if self._is_fused(input):
            if self.summed and not is_watched(self):
                return cast("Tensor", Pending(self.fused, input, raised=self.raised))
            return self.fused(input)
        if self.on_gpu and self._is_in_gpu_kernel(input):
            return self.in_gpu_kernel(input)
        if self.reduce is not None:
            input = self.reduce(input)
        expanded: Tensor = self.expand(self._middle(input)) if self.waist else self._middle(input)
        return F.relu(expanded) if self.relu else expanded

    def fused(self, x: Tensor, added: Tensor | None = None, relu: bool = False) -> Tensor:
        """The output by way of the CPU's kernel.

        Args:
            x: (N, C, H, W), of a kind that the kernel computes.
            added: What is added to the output (N, C', H', W').
            relu: Raise negative numbers to 0 after that, even if the attribute is not set.
        """
        weights = self._frozen or self._packed()
        return self._kernel(x, weights, added, relu=relu or self.relu)

    @property
    def fits_gpu_kernel(self) -> bool:
        """Whether `in_gpu_kernel` can compute it: a dense middle is better left to libraries."""
        narrow = self.waist is None or self.waist.out_channels <= WIDEST_ON_GPU
        return self.columns is not None and narrow

    def in_gpu_kernel(self, x: Tensor) -> Tensor:
        """The output by way of the Triton kernel: the reduction, then all the rest in one.

        Set `on_gpu` to let `forward` do so; `optimize` sets it where it is faster.
        """
        from pfsurgery.kernels.cuda_bottleneck import bottleneck

        assert self.columns is not None
        assert self.expand.bias is not None
        if self.reduce is not None:
            x = self.reduce(x)
        middle = self.expand if self.waist is None else self.waist
        taps = self.columns.taps(x)
        made = bottleneck(
            x,
            self.columns.pooled(x),
            taps,
            self.columns.geometry.output_size((x.shape[-2], x.shape[-1])),
            self.columns.geometry.stride,
            _matrix(middle)[taps.order],
            None if self.waist is None else _matrix(self.expand).contiguous(),
            self.expand.bias.detach(),
            relu=self.relu,
        )
        return made.contiguous() if x.is_contiguous() else made

    def _middle(self, x: Tensor) -> Tensor:
        """The columns and the first product behind them, or the thin convolution."""
        product = self.expand if self.waist is None else self.waist
        if self.columns is None:
            made: Tensor = product(x)
            return made
        if (
            not choice.is_tracked(x, self.parameters())
            or not self._is_plain()
            or choice.why_traced(x) is not None
        ):
            made = product(self.columns(x))
            return made
        made = self.columns.times(x, product.weight[:, :, 0, 0])
        return made if product.bias is None else made + product.bias[:, None, None].to(made.dtype)

    def _is_plain(self) -> bool:
        """Whether the products are convolutions that nothing watches: adapters, masks, hooks."""
        kinds = _plain_kinds()
        for name, conv in self._modules.items():
            if conv is None or name == "columns":
                continue
            if type(conv) not in kinds or is_watched(conv):
                return False
        return True

    def _goes_with(self, x: Tensor) -> bool:
        """Whether the weights are of the same kind, on the same device; devices compare slowly."""
        weight = self.expand.weight if self._frozen is None else self._frozen.middle
        same = weight.get_device() == x.get_device() and weight.is_cpu == x.is_cpu
        return same and weight.dtype == x.dtype

    def _is_fused(self, x: Tensor) -> bool:
        return (
            not choice.is_tracked(x, self.parameters())
            and choice.why_unfused(x) is None
            and self._kernel.computes(x)
            and self._is_plain()
            and self._goes_with(x)
        )

    def _is_in_gpu_kernel(self, x: Tensor) -> bool:
        return (
            x.is_cuda
            and not choice.is_tracked(x, self.parameters())
            and choice.why_stock(x) is None
            and not torch.is_autocast_enabled("cuda")
            and x.dtype != torch.float64
            and self._is_plain()
            and self._goes_with(x)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Packed weights go where the weights go."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._frozen is not None:
            self.freeze()
        return self

    def _packed(self) -> Weights:
        """The weights as matrices (inputs, outputs), in the order of the columns."""
        middle = self.expand if self.waist is None else self.waist
        expand = None if self.waist is None else _matrix(self.expand)
        reduce = None if self.reduce is None else _matrix(self.reduce)
        assert self.expand.bias is not None
        return self._kernel.pack(reduce, _matrix(middle), expand, self.expand.bias.detach())


@lru_cache
def _plain_kinds() -> frozenset[type]:
    """The classes of `_PLAIN`."""
    from timm.layers import Conv2dSame

    return frozenset({nn.Conv2d, Conv2dSame})


def _thin(geometry: Geometry, inputs: int, outputs: int) -> nn.Conv2d:
    """A dense convolution that looks where the original looked."""
    size, stride, dilation = geometry.kernel_size, geometry.stride, geometry.dilation
    if geometry.padding == "same":
        from timm.layers import Conv2dSame

        same: nn.Conv2d = Conv2dSame(inputs, outputs, size, stride, dilation=dilation, bias=False)
        return same
    padding: Any = geometry.padding
    return nn.Conv2d(inputs, outputs, *(size, stride, padding, dilation), bias=False)  # type: ignore[arg-type]


def _matrix(conv: nn.Conv2d) -> Tensor:
    """A convolution's weights as (taps * inputs, outputs)."""
    return conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2)


def fitted_module(geometry: Geometry, structure: Structure) -> nn.Module:
    """The module of a fitted site, its weights still to be set."""
    if structure.form == "bare":
        return Columns(geometry, structure.runs, in_order=True)
    with torch.random.fork_rng(devices=[]):  # its first weights are none of the caller's affair
        return Bottleneck(geometry, structure)


class MixedOp(Op):
    """Parameter-free columns chosen from data, between pointwise convolutions."""

    name = "mixed"
    summary = "columns chosen from data between pointwise convolutions (policy budget)"
    fitted = True

    def supports(self, site: Site) -> Support:
        """Convolutions that mix channels, with plain weights and zero padding."""
        if empty := Window.of(site.geometry).why_empty():
            return Support(empty)
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
        if empty := Window.of(site.geometry).why_empty():
            return Support(empty)
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
