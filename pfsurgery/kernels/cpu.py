"""The CPU kernels as functions of tensors: outputs, and gradients by the transposed axes."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from importlib import import_module

import torch
from torch import Tensor

from pfsurgery.kernels.axes import Axis
from pfsurgery.kernels.layout import Group, dense, empty, images
from pfsurgery.kernels.threads import run, threads

_STRIP = 6144  # numbers in a strip's ring: they stay in the first-level cache
_PLANES = 4096  # numbers of the planes that are worked on together
_ROWS = 16384  # numbers of the rows that are worked on together
_VECTOR = 16  # numbers of a pixel that are worth the processor's vectors
_LONG = 48  # columns of a plane below which many planes are faster as one vector
_NARROW = 32  # columns of a plane below which rows are too short to be vectors
_FIELDS = 14
_Arguments = ctypes.c_int64 * _FIELDS


def max_pool(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Maxima (N, C, H', W') of (N, C, H, W)."""
    return _separable("max", x, down, across)


def weighted_sum(x: Tensor, down: Axis, across: Axis) -> Tensor:
    """Weighted sums (N, C, H', W') of (N, C, H, W); the gradient has the transposed axes."""
    return _separable("sum", x, down, across)


def max_pool_with_names(x: Tensor, down: Axis, across: Axis) -> tuple[Tensor, Tensor]:
    """Maxima (N, C, H', W'), and the taps that they came from, one byte each.

    The names may have another layout than the maxima: it is their gradient's business alone.
    """
    x = dense(x)
    last = torch.channels_last
    if not x.is_contiguous(memory_format=last) and across.outputs < _NARROW:
        out, names = max_pool_with_names(x.contiguous(memory_format=last), down, across)
        return out.contiguous(), names
    out = empty(x, down.outputs, across.outputs)
    names = torch.empty_like(out, dtype=torch.uint8)
    count, step = images(x)
    rows = _share(across.outputs * step, down.outputs)
    units = count * -(-down.outputs // rows)
    _launch("loops_max", f"picks_{_name(x)}", x, out, names, units, rows, down, across)
    return out, names


def max_pool_gradient(
    gradient: Tensor, names: Tensor, size: torch.Size, down: Axis, across: Axis
) -> Tensor:
    """Gradient (N, C, H, W) of the input of `max_pool_with_names`."""
    last, plain = not names.is_contiguous(), gradient.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    gradient = gradient.contiguous(memory_format=layout)
    out = torch.empty(size, dtype=gradient.dtype, memory_format=layout)
    count, step = images(out)
    if down.stride == across.stride == 1:
        group = _share(size[3] * step, count * size[2])
        units, entry = -(-count * size[2] // group), "gathers"
    else:
        group = 16 if last else 1
        units, entry = count * -(-step // group), "scatters"
    name = f"{entry}_{_name(gradient)}"
    _launch("loops_max", name, gradient, out, names, units, group, down, across)
    return out.contiguous() if plain else out


def shift(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Groups of channels, given by the end of each, seen through windows of one tap."""
    x = dense(x)
    _, down, across = groups[0]
    out = empty(x, down.outputs, across.outputs)
    count, step = images(x)
    units = count if step == 1 else count * down.outputs
    table = _table(groups)
    entry = f"moves_{x.element_size()}"
    _launch("loops_move", entry, x, out, table, units, len(groups), down, across)
    return out


def _separable(kind: str, x: Tensor, down: Axis, across: Axis) -> Tensor:
    x = dense(x)
    out = empty(x, down.outputs, across.outputs)
    count, step = images(x)
    if _is_near(down) and _is_near(across) and _pays(kind, x, step):
        form = "near"
        shares = -(-4 * threads() // max(1, count))
        group = 2 * -(-down.size // (2 * shares))
        units = count * -(-down.size // group)
    elif step == 1 and x.shape == out.shape and down.stride == across.stride == 1:
        form = "planes"
        group = max(1, min(_PLANES // (down.size * across.size), count // threads()))
        units = -(-count // group)
    else:
        form = "strips"
        most = max(1, count * across.outputs // (4 * threads()))
        group = min(across.outputs, most, max(1, _STRIP // (down.span * step)))
        units = count * -(-across.outputs // group)
    module = "loops_near" if form == "near" else "loops"
    _launch(module, f"{kind}_{form}_{_name(x)}", x, out, None, units, group, down, across)
    return out


def _is_near(axis: Axis) -> bool:
    """Whether the windows are three taps at stride 1, one of padding on each side."""
    same = axis.size == axis.outputs
    return same and (axis.kernel_size, axis.stride, axis.dilation, axis.padding) == (3, 1, 1, 1)


def _pays(kind: str, x: Tensor, step: int) -> bool:
    """Whether rows are long enough to go over two at a time; of sums, those of pixels alone."""
    long = step >= _VECTOR or (kind == "max" and x.shape[3] >= _LONG)
    return x.dtype == torch.float32 and long


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
    count, step = images(source)
    arguments = _Arguments(
        *(0, units, source.data_ptr(), target.data_ptr()),
        *(0 if third is None else third.data_ptr(), count, step),
        *(down.size, across.size, down.outputs, across.outputs),
        *(group, down.address, across.address),
    )
    run(compiled(module, entry), ctypes.addressof(arguments), min(threads(), units))


@cache
def compiled(module: str, entry: str) -> int:
    """Address of an entry point, compiled now or loaded from Numba's cache on disk."""
    from numba import cfunc, types

    loops = import_module(f"pfsurgery.kernels.{module}")
    made = cfunc(types.void(types.voidptr), cache=True)(getattr(loops, entry))
    setattr(loops, entry, made)  # the code lives as long as this object
    return int(made.address)


@lru_cache(maxsize=1024)
def _table(groups: tuple[Group, ...]) -> Tensor:
    return torch.tensor([[end, down.address, across.address] for end, down, across in groups])


def _share(width: int, rows: int) -> int:
    """Rows of `width` numbers for one unit: enough to be worth it, few enough to be shared."""
    return max(1, min(_ROWS // max(1, width), -(-rows // threads())))


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
