"""The CPU kernels as functions of tensors: outputs, and gradients by the transposed axes."""

from __future__ import annotations

from array import array
from functools import cache, lru_cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from pfsurgery.kernels.axes import MOST_NUMBERS, Axis, are_near
from pfsurgery.kernels.layout import Group, dense, empty, images
from pfsurgery.kernels.threads import run, threads

_STRIP = 6144  # numbers in a strip's ring: they stay in the first-level cache
_PLANES = 4096  # numbers of the planes that are worked on together
_ROWS = 16384  # numbers of the rows that are worked on together
_HELD = 32768  # numbers of a buffer between two passes: they stay in the second-level cache
_VECTOR = 16  # numbers of a pixel that are worth the processor's vectors
_NARROW = 32  # columns of a plane below which rows are too short to be vectors


class _Work(NamedTuple):
    """What a kernel is called with beside its tensors.

    Attributes:
        kernel: Address of its code.
        units: Into how many parts the work is cut, which threads take one by one.
        images: As `layout.images` counts them.
        step: Numbers that lie side by side at a pixel.
        group: What a unit holds of rows, planes, columns or channels; which of these is the
            kernel's affair.
    """

    kernel: int
    units: int
    images: int
    step: int
    group: int


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
    count, step = images(x)
    narrow = across.outputs < _NARROW and not x.is_contiguous(memory_format=last)
    if narrow and not _is_near(x.dtype, step, down, across):
        out, names = max_pool_with_names(x.contiguous(memory_format=last), down, across)
        return out.contiguous(), names
    out = empty(x, down.outputs, across.outputs)
    names = torch.empty_like(out, dtype=torch.uint8)
    work = _naming(count, step, x.dtype, down, across, threads())
    _launch(work, x, out, names, down, across)
    return out, names


def max_pool_gradient(gradient: Tensor, names: Tensor, down: Axis, across: Axis) -> Tensor:
    """Gradient (N, C, H, W) of the input of `max_pool_with_names`."""
    last, plain = not names.is_contiguous(), gradient.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    gradient = gradient.contiguous(memory_format=layout)
    out = empty(names, down.size, across.size, gradient.dtype)
    work = _asking(*images(out), out.dtype, down, across, threads())
    _launch(work, gradient, out, names, down, across)
    return out.contiguous() if plain else out


def shift(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Groups of channels, given by the end of each, seen through windows of one tap."""
    x = dense(x)
    _, down, across = groups[0]
    out = empty(x, down.outputs, across.outputs)
    count, step = images(x)
    size = x.element_size()
    fits = size < 8 and down.size * across.size < MOST_NUMBERS
    if step == 1 and fits and _are_offsets(groups):
        kernel, units = compiled("loops_flat", f"moves_flat_{size}"), len(x) * len(groups)
    elif step > 1 and size < 8:
        kernel, units = compiled("loops_blend", f"moves_blended_{size}"), count * down.outputs
    else:
        kernel = compiled("loops_move", f"moves_{size}")
        units = count if step == 1 else count * down.outputs
    work = _Work(kernel, units, count, step, len(groups))
    _launch(work, x, out, _table(groups), down, across)
    return out


def _separable(kind: str, x: Tensor, down: Axis, across: Axis) -> Tensor:
    x = dense(x)
    out = empty(x, down.outputs, across.outputs)
    work = _mixing(kind, *images(x), x.dtype, down, across, threads())
    _launch(work, x, out, None, down, across)
    return out


@lru_cache(maxsize=1024)
def _mixing(
    kind: str, count: int, step: int, dtype: torch.dtype, down: Axis, across: Axis, workers: int
) -> _Work:
    """Maxima or sums: which loops, and how the work is cut."""
    near = _is_near(dtype, step, down, across)
    same = down.size == down.outputs and across.size == across.outputs
    module = "loops"
    if near and step >= _VECTOR:
        module, form = "loops_near", "near"
        group, units = _pairs(count, down.size, workers)
    elif near:
        module, form = "loops_flat", "flat"
        group = _share(across.size * step, count * down.size, _HELD, workers)
        units = -(-count * down.size // group)
    elif step == 1 and same and down.stride == across.stride == 1:
        form = "planes"
        group = max(1, min(_PLANES // (down.size * across.size), count // workers))
        units = -(-count // group)
    else:
        form = "strips"
        most = max(1, count * across.outputs // (4 * workers))
        group = min(across.outputs, most, max(1, _STRIP // (down.span * step)))
        units = count * -(-across.outputs // group)
    kernel = compiled(module, f"{kind}_{form}_{_name(dtype)}")
    return _Work(kernel, units, count, step, group)


@lru_cache(maxsize=1024)
def _naming(
    count: int, step: int, dtype: torch.dtype, down: Axis, across: Axis, workers: int
) -> _Work:
    """Maxima with the taps that they came from."""
    if _is_near(dtype, step, down, across):
        if step >= _VECTOR:
            group, units = _pairs(count, down.size, workers)
            kernel = compiled("loops_near_picks", f"picks_near_{_name(dtype)}")
            return _Work(kernel, units, count, step, group)
        group = _share(across.size * step, count * down.size, _HELD, workers)
        kernel = compiled("loops_flat", f"picks_flat_{_name(dtype)}")
        return _Work(kernel, -(-count * down.size // group), count, step, group)
    group = _share(across.outputs * step, down.outputs, _ROWS, workers)
    kernel = compiled("loops_max", f"picks_{_name(dtype)}")
    return _Work(kernel, count * -(-down.outputs // group), count, step, group)


@lru_cache(maxsize=1024)
def _asking(
    count: int, step: int, dtype: torch.dtype, down: Axis, across: Axis, workers: int
) -> _Work:
    """The gradient of maxima, by the names of their taps."""
    if down.stride == across.stride == 1:
        module, entry = "loops_max", "gathers"
        if _is_near(dtype, step, down, across):
            wide = step >= _VECTOR
            module = "loops_near_picks" if wide else "loops_flat"
            entry = "gathers_near" if wide else "gathers_flat"
        group = _share(across.size * step, count * down.size, _ROWS, workers)
        kernel = compiled(module, f"{entry}_{_name(dtype)}")
        return _Work(kernel, -(-count * down.size // group), count, step, group)
    group = 1 if step == 1 else 16
    kernel = compiled("loops_max", f"scatters_{_name(dtype)}")
    return _Work(kernel, count * -(-step // group), count, step, group)


def _is_near(dtype: torch.dtype, step: int, down: Axis, across: Axis) -> bool:
    """Whether the loops of `are_near` serve these numbers, too."""
    small = down.size * across.size * step < MOST_NUMBERS
    return small and dtype != torch.float64 and are_near(down, across)


def _launch(
    work: _Work, source: Tensor, target: Tensor, third: Tensor | None, down: Axis, across: Axis
) -> None:
    arguments = array("q", (
        0, work.units, source.data_ptr(), target.data_ptr(),
        0 if third is None else third.data_ptr(), work.images, work.step,
        down.size, across.size, down.outputs, across.outputs,
        work.group, down.address, across.address,
    ))  # fmt: skip
    run(work.kernel, arguments.buffer_info()[0], min(threads(), work.units))


@cache
def compiled(module: str, entry: str) -> int:
    """Address of an entry point, compiled now or loaded from Numba's cache on disk."""
    from numba import cfunc, types

    loops = import_module(f"pfsurgery.kernels.{module}")
    made = cfunc(types.void(types.voidptr), cache=True)(getattr(loops, entry))
    setattr(loops, entry, made)  # the code lives as long as this object
    return int(made.address)


@lru_cache(maxsize=1024)
def _are_offsets(groups: tuple[Group, ...]) -> bool:
    return all(axis.is_offset for _, down, across in groups for axis in (down, across))


@lru_cache(maxsize=1024)
def _table(groups: tuple[Group, ...]) -> Tensor:
    return torch.tensor([[end, down.address, across.address] for end, down, across in groups])


def _pairs(images: int, rows: int, workers: int) -> tuple[int, int]:
    """Rows of an image for one unit, an even number, and how many units there are."""
    shares = -(-4 * workers // max(1, images))
    group = 2 * -(-rows // (2 * shares))
    return group, images * -(-rows // group)


def _share(width: int, rows: int, numbers: int, workers: int) -> int:
    """Rows of `width` numbers for one unit: about `numbers`, in units that threads share evenly."""
    each = max(1, -(-rows * width // (numbers * workers)))
    return max(1, -(-rows // (each * workers)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
