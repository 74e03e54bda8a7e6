"""Convolutions by oneDNN whose weights are packed once, in the order in which it reads them.

torch's own call packs them each time, which is up to half of the time of a batch of one. The two
operators used here are those of torch.compile for frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pfsurgery.kernels.choice import why_off
from pfsurgery.sites import Geometry

Convolution = Callable[[Tensor], Tensor]


def packed(
    weight: Tensor, bias: Tensor | None, geometry: Geometry, input_shape: tuple[int, ...]
) -> Convolution | None:
    """A convolution of inputs that `serves` says yes to; None where oneDNN does not compute it.

    Args:
        weight: (C', C / groups, K, K); later changes are not seen.
        bias: (C',).
        geometry: What is computed.
        input_shape: The (N, C, H, W) that the order of the weights is best for; others go, too.
    """
    if geometry.padding == "same" or geometry.padding_mode != "zeros" or not _computes(weight):
        return None
    operators = torch.ops.mkldnn
    settings = geometry.padding, geometry.stride, geometry.dilation, geometry.groups
    reordered = operators._reorder_convolution_weight(weight.detach(), *settings, input_shape)
    bias = None if bias is None else bias.detach().clone()
    convolve = operators._convolution_pointwise.default

    def convolution(x: Tensor) -> Tensor:
        made: Tensor = convolve(x, reordered, bias, *settings, "none", (), "")
        return made

    return convolution


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether a packed convolution computes for an input (N, C, H, W) what torch's call would."""
    if why_off(x) is not None:  # asked first: not all of the rest can be traced
        return False
    plain = x.is_cpu and x.dtype == weight.dtype and not x.is_neg()
    laid_out = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not plain or not laid_out or not x.numel():
        return False
    return torch._C._get_mkldnn_enabled() and not torch.is_autocast_enabled("cpu")


def _computes(weight: Tensor) -> bool:
    if not weight.is_cpu or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
