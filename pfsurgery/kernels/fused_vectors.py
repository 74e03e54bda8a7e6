"""Bottlenecks in float32: what `loops_bottleneck` needs, as tables and packed weights."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.fused_layout import (
    Cut,
    Program,
    Sizes,
    Weights,
    columns_read,
    common,
    lanes,
    measured,
    pool_tables,
    program,
    rounded,
)
from pfsurgery.sites import Geometry
from pfsurgery.structure import Structure

_SIZE = 4  # bytes of a number


def pack_vectors(
    reduce: Tensor | None, middle: Tensor, expand: Tensor | None, bias: Tensor
) -> Weights:
    """Packs float32 matrices (inputs, outputs) and the bias (C_out,) of the last product."""
    last = middle if expand is None else expand
    widths = [m.shape[1] for m in (reduce, middle, expand) if m is not None]
    return Weights(
        reduce=None if reduce is None else _pack(reduce),
        middle=_pack(middle),
        expand=None if expand is None else _pack(expand),
        bias=F.pad(bias, (0, _whole(last.shape[1]) - last.shape[1])),
        zeros=bias.new_zeros(_whole(max(widths))),
    )


def _pack(matrix: Tensor) -> Tensor:
    """Panels of outputs one after the other, each with its inputs' rows, filled with zeros."""
    outputs, panel = matrix.shape[1], _panel()
    padded = F.pad(matrix, (0, _whole(outputs) - outputs))
    return torch.cat([part.flatten() for part in torch.split(padded, panel, dim=1)])


def vector_program(
    geometry: Geometry, structure: Structure, shape: tuple[int, int, int], workers: int
) -> Program:
    """The program for so many images of so many rows and columns, and that many threads."""
    images, rows, columns = shape
    sizes = measured(geometry, structure, rows, columns, lanes())
    cut = sizes.cut(images, workers)
    held, waist, pools = sizes.scratch(cut)
    tables = _tables(geometry, structure, sizes, cut, (rows, columns))
    arguments = common(geometry, sizes, cut, (rows, columns)) | {
        at.SCRATCH_SIZE: (held + waist + pools) * _SIZE,
        at.REDUCED: _whole(structure.reduce or 0),
        at.COUNT: len(tables[at.TABLE]),
        at.WAIST: structure.waist or 0,
        at.WAIST_SCRATCH: held * _SIZE,
        at.POOL_COUNT: len(tables[at.POOLS]),
        at.POOL_SCRATCH: (held + waist) * _SIZE,
    }
    made = (geometry.out_channels, sizes.rows, sizes.columns)
    return program(arguments, tables, made, held + waist + pools)


def _tables(
    geometry: Geometry, structure: Structure, sizes: Sizes, cut: Cut, image: tuple[int, int]
) -> dict[int, Tensor]:
    """The tables by their places among the arguments; offsets are in bytes."""
    inputs, width, rows = geometry.in_channels, sizes.width, sizes.held_rows(cut.block)
    down, across = geometry.stride
    made = cut.group * cut.block * sizes.columns
    (tall, wide), columns = geometry.dilation, sizes.held_columns
    read = [
        (row * tall * columns + column * wide) * width + channel
        for (row, column), channels in columns_read(geometry, structure, sizes.inputs)
        for channel in channels
    ]
    pixels = _pixels(1, rows * image[1], 0, 1, inputs)
    held = _pixels(rows, image[1], columns, 1, width) + sizes.left * width * _SIZE
    positions = _pixels(cut.block, sizes.columns, down * columns, across, width)
    if cut.group > 1:
        first, last = sizes.top * image[1], min(rows, sizes.top + image[0]) * image[1]
        source = image[0] * image[1] * inputs * _SIZE
        there = source if sizes.fill == at.IN_PLACE else rows * columns * width * _SIZE
        pixels = _repeated(pixels[: last - first], cut.group, source)
        held = torch.cat([held[:first], _repeated(held[first:last], cut.group, there)])
        positions = _repeated(positions, cut.group, there)
    return {
        at.PIXELS: pixels,
        at.HELD_PIXELS: held,
        at.POSITIONS: positions,
        at.TARGET_PIXELS: _pixels(1, made, 0, 1, geometry.out_channels),
        at.WAIST_PIXELS: _pixels(1, made, 0, 1, sizes.waist),
        at.RAMP: torch.arange(max(inputs, structure.waist or 0)) * _SIZE,
        at.TABLE: torch.tensor(read) * _SIZE,
        **pool_tables(geometry, structure, sizes.inputs),
    }


def _repeated(offsets: Tensor, times: int, pitch: int) -> Tensor:
    """Offsets in each of several images, `pitch` bytes apart."""
    return (torch.arange(times)[:, None] * pitch + offsets).flatten()


def _pixels(height: int, width: int, pitch: int, step: int, numbers: int) -> Tensor:
    """Offsets of a grid of pixels of `numbers` numbers, `pitch` and `step` pixels apart."""
    places = torch.arange(height)[:, None] * pitch + torch.arange(width) * step
    return (places * numbers * _SIZE).flatten()


def _whole(numbers: int) -> int:
    return rounded(numbers, lanes())


@lru_cache
def _panel() -> int:
    """Outputs of a panel: what a tile holds of a row."""
    from pfsurgery.kernels import vectors

    return vectors.LANES * vectors.VECTORS
