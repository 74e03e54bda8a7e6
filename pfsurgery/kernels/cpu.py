"""The CPU kernels as functions of tensors: outputs, and gradients by the transposed axes."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from importlib import import_module

import torch
from torch import Tensor

from pfsurgery.kernels.axes import Axis
from pfsurgery.kernels.threads import run, threads

_STRIP = 6144  # numbers in a strip's ring: they stay in the first-level cache
_PLANES = 4096  # numbers of the planes that are worked on together
_ROWS = 16384  # numbers of the rows that are worked on together
_FIELDS = 14
_Arguments = ctypes.c_int64 * _FIELDS
Group = tuple[int, Axis, Axis]


def max_pool(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Maxima (N, C, H', W') of (N, C, H, W)."""
    return _separable("max", x, down, across)


def weighted_sum(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Weighted sums (N, C, H', W') of (N, C, H, W); the gradient has the transposed axes."""
    return _separable("sum", x, down, across)


def max_pool_with_names(x: Tensor, down: Axis, across: Axis) -> tuple[Tensor, Tensor]:
    """Maxima (N, C, H', W'), and the taps that they came from, one byte each."""
    x = dense(x)
    out = _empty(x, down.outputs, across.outputs)
    names = torch.empty_like(out, dtype=torch.uint8)
    images, step = _images(x)
    rows = _share(across.outputs * step, down.outputs)
    units = images * -(-down.outputs // rows)
    _launch("loops_max", f"picks_{_name(x)}", x, out, names, units, rows, down, across)
    return out, names


def max_pool_gradient(
    gradient: Tensor, names: Tensor, size: torch.Size, down: Axis, across: Axis
) -> Tensor:
    """Gradient (N, C, H, W) of the input of `max_pool_with_names`."""
    last = not names.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    gradient = gradient.contiguous(memory_format=layout)
    out = torch.empty(size, dtype=gradient.dtype, memory_format=layout)
    images, step = _images(out)
    if down.stride == across.stride == 1:
        group = _share(size[3] * step, images * size[2])
        units, entry = -(-images * size[2] // group), "gathers"
    else:
        group = 16 if last else 1
        units, entry = images * -(-step // group), "scatters"
    name = f"{entry}_{_name(gradient)}"
    _launch("loops_max", name, gradient, out, names, units, group, down, across)
    return out


def shift(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Groups of channels, given by the end of each, seen through windows of one tap."""
    x = dense(x)
    _, down, across = groups[0]
    out = _empty(x, down.outputs, across.outputs)
    images, step = _images(x)
    units = images if step == 1 else images * down.outputs
    table = _table(groups)
    entry = f"moves_{x.element_size()}"
    _launch("loops_move", entry, x, out, table, units, len(groups), down, across)
    return out


def dense(x: Tensor) -> Tensor:
    """`x` (N, C, H, W) itself, or a copy where its numbers do not fill its memory in order."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    last = x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _separable(kind: str, x: Tensor, down: Axis, across: Axis) -> Tensor:
    x = dense(x)
    out = _empty(x, down.outputs, across.outputs)
    images, step = _images(x)
    if step == 1 and x.shape == out.shape and down.stride == across.stride == 1:
        form = "planes"
        group = max(1, min(_PLANES // (down.size * across.size), images // threads()))
        units = -(-images // group)
    else:
        form = "strips"
        most = max(1, images * across.outputs // (4 * threads()))
        group = min(across.outputs, most, max(1, _STRIP // (down.span * step)))
        units = images * -(-across.outputs // group)
    _launch("loops", f"{kind}_{form}_{_name(x)}", x, out, None, units, group, down, across)
    return out


def _launch(
    module: str,
    entry: str,
    source: Tensor,
    target: Tensor,
    third: Tensor | None,
    units: int,
    group: int,
    down: Axis,
    across: Axis,
) -> None:
    images, step = _images(source)
    arguments = _Arguments(
        *(0, units, source.data_ptr(), target.data_ptr()),
        *(0 if third is None else third.data_ptr(), images, step),
        *(down.size, across.size, down.outputs, across.outputs),
        *(group, down.address, across.address),
    )
    run(_compiled(module, entry), ctypes.addressof(arguments), min(threads(), units))


@cache
def _compiled(module: str, entry: str) -> int:
    """Address of an entry point, compiled now or loaded from Numba's cache on disk."""
    from numba import cfunc, types

    loops = import_module(f"pfsurgery.kernels.{module}")
    made = cfunc(types.void(types.voidptr), cache=True)(getattr(loops, entry))
    setattr(loops, entry, made)  # the code lives as long as this object
    return int(made.address)


@lru_cache(maxsize=1024)
def _table(groups: tuple[Group, ...]) -> Tensor:
    return torch.tensor([[end, down.address, across.address] for end, down, across in groups])


def _images(x: Tensor) -> tuple[int, int]:
    """Images and numbers side by side at a pixel, as `loops_base` counts them."""
    batch, channels = x.shape[:2]
    return (batch * channels, 1) if x.is_contiguous() else (batch, channels)


def _empty(x: Tensor, rows: int, columns: int) -> Tensor:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty((*x.shape[:2], rows, columns), dtype=x.dtype, memory_format=layout)


def _share(width: int, rows: int) -> int:
    """Rows of `width` numbers for one unit: enough to be worth it, few enough to be shared."""
    return max(1, min(_ROWS // max(1, width), -(-rows // threads())))


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
