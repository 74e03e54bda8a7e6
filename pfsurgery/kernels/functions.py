"""The kernels as differentiable functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pfsurgery.kernels import cpu
from pfsurgery.kernels.axes import Axis
from pfsurgery.kernels.choice import is_tracked
from pfsurgery.kernels.layout import Group


def max_pool(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Maxima of windows: (N, C, H, W) to (N, C, H', W'), as the axes describe them."""
    made: Tensor = (_MaxPool.apply if is_tracked(x) else _backend(x).max_pool)(x, down, across)
    return made


def weighted_sum(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Separable weighted sums of windows: (N, C, H, W) to (N, C, H', W')."""
    made: Tensor = (_WeightedSum.apply if is_tracked(x) else _backend(x).weighted_sum)(
        x, down, across
    )
    return made


def shift(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Groups of channels, each seen through a window of one tap: (N, C, H, W) to (N, C, H', W').

    Args:
        x: The input.
        groups: For each group the channel behind its last one, and its two axes.
    """
    made: Tensor = (_Shift.apply if is_tracked(x) else _backend(x).shift)(x, groups)
    return made


def _backend(x: Tensor) -> Any:
    if x.is_cuda:
        from pfsurgery.kernels import cuda

        return cuda
    return cpu


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Axis, across: Axis) -> Tensor:
        out: Tensor
        out, names = _backend(x).max_pool_with_names(x, down, across)
        ctx.save_for_backward(names)
        ctx.axes = down, across
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (names,) = ctx.saved_tensors
        pull = _backend(gradient).max_pool_gradient
        if is_tracked(gradient):
            pull = _MaxPoolGradient.apply
        return pull(gradient, names, *ctx.axes), None, None


class _MaxPoolGradient(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, names: Tensor, down: Axis, across: Axis) -> Tensor:
        ctx.save_for_backward(names)
        ctx.axes = down, across
        made: Tensor = _backend(gradient).max_pool_gradient(gradient, names, down, across)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Read at the maxima, by stock calls: few ever differentiate a pool twice."""
        (names,) = ctx.saved_tensors
        down, across = ctx.axes
        rows = torch.arange(down.outputs, device=names.device)[:, None] * down.stride
        columns = torch.arange(across.outputs, device=names.device) * across.stride
        rows = rows - down.padding + names.long() // across.kernel_size * down.dilation
        columns = columns - across.padding + names.long() % across.kernel_size * across.dilation
        places = (rows * across.size + columns).flatten(2)
        read = gradient.flatten(2).gather(2, places).reshape(names.shape)
        return read, None, None, None


class _WeightedSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Axis, across: Axis) -> Tensor:
        ctx.axes = down, across
        made: Tensor = _backend(x).weighted_sum(x, down, across)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        down, across = ctx.axes
        return weighted_sum(gradient, down.transposed, across.transposed), None, None


class _Shift(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[Group, ...]) -> Tensor:
        ctx.groups = groups
        made: Tensor = _backend(x).shift(x, groups)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        back = tuple((end, down.transposed, across.transposed) for end, down, across in ctx.groups)
        return shift(gradient, back), None
