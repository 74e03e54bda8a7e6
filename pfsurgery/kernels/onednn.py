"""Convolutions by oneDNN whose weights are packed once, in the order in which it reads them.

torch's own call packs them each time, which is up to half of the time of a batch of one. The
operators used here are those of torch.compile for frozen weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pfsurgery.kernels.choice import why_off, why_traced
from pfsurgery.sites import Geometry

_SHAPES = 32  # of inputs that are remembered


class Packed:
    """A convolution with packed weights.

    Args:
        geometry: What is computed.
        weight: (C', C / groups, K, K).
        input_shape: The (N, C, H, W) that the order of the weights is best for. There its numbers
            are taken for granted: compare them first.
    """

    def __init__(self, geometry: Geometry, weight: Tensor, input_shape: tuple[int, ...]) -> None:
        self._settings = geometry.padding, geometry.stride, geometry.dilation, geometry.groups
        self._is_pointwise = geometry.kind == "pointwise" and geometry.padding == (0, 0)
        self._weight, self._version = weight, weight._version
        operators = torch.ops.mkldnn
        self._packed = operators._reorder_convolution_weight(
            weight.detach(), *self._settings, input_shape
        )
        self._convolve = operators._convolution_pointwise.default
        self._fits = {torch.Size(input_shape): True}

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution (N, C', H', W') of an input that `serves` says yes to."""
        made: Tensor = self._convolve(x, self._packed, bias, *self._settings, "none", (), "")
        return made

    def serves(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it computes here and now what torch's call would for (N, C, H, W)."""
        if why_off(x) is not None:  # asked first: not all of the rest can be traced
            return False
        fresh = weight is self._weight and weight._version == self._version
        plain = x.is_cpu and x.dtype == weight.dtype and x.ndim == 4 and not x.is_neg()
        if not fresh or not plain or torch.is_autocast_enabled("cpu"):
            return False
        return self._is_laid_out(x) and torch._C._get_mkldnn_enabled() and self._is_known(x)

    def _is_laid_out(self, x: Tensor) -> bool:
        """Whether torch's call would make an output in channels last, too.

        Of an input of one channel, or one pixel, nobody can tell the layout.
        """
        if x.is_contiguous():
            return self._is_pointwise and x.shape[2:] == (1, 1)
        return x.is_contiguous(memory_format=torch.channels_last)

    def _is_known(self, x: Tensor) -> bool:
        """Whether torch's call goes to oneDNN, too: some narrow inputs are only right elsewhere."""
        fits = self._fits.get(x.shape)
        if fits is None:
            padding, stride, dilation, groups = self._settings
            window = stride, padding, dilation, False, (0, 0), groups
            backend = torch._C._select_conv_backend(x, self._weight, None, *window)
            fits = bool(backend.name == "Mkldnn")
            if len(self._fits) >= _SHAPES:
                self._fits.clear()
            self._fits[x.shape] = fits
        return fits


def pack(geometry: Geometry, weight: Tensor, input_shape: tuple[int, ...]) -> Packed | None:
    """A convolution with packed weights; None where oneDNN has none, or is known to be wrong."""
    if geometry.padding == "same" or geometry.padding_mode != "zeros" or not _computes(weight):
        return None
    if geometry.strided and geometry.dilation != (1, 1):
        return None  # torch 2.14 reads beyond narrow inputs
    return Packed(geometry, weight, input_shape)


def _computes(weight: Tensor) -> bool:
    if not weight.is_cpu or weight.is_inference() or not torch._C._has_mkldnn:
        return False
    if why_traced(weight) is not None:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
