"""Bottlenecks in bfloat16: what `loops_bottleneck_tiles` needs, as tables and packed weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.bottleneck_arguments import DEPTH, PANEL, TILE_ROWS
from pfsurgery.kernels.fused_layout import (
    Cut,
    Program,
    Sizes,
    Weights,
    columns_read,
    common,
    measured,
    pool_tables,
    pooled_numbers,
    program,
    rounded,
)
from pfsurgery.sites import Geometry
from pfsurgery.structure import Structure

_SIZE = 2  # bytes of a number
_SUMS = 4 * TILE_ROWS * TILE_ROWS * 2  # numbers of scratch memory for four tiles of float32
_SHAPE = at.SHAPE // _SIZE
_NOWHERE = -1  # instead of the place of a result that nobody wants


def pack_tiles(
    geometry: Geometry,
    structure: Structure,
    reduce: Tensor | None,
    middle: Tensor,
    expand: Tensor | None,
    bias: Tensor,
) -> Weights:
    """Packs bfloat16 matrices (inputs, outputs) and the bias (C_out,) of the last product."""
    inputs = rounded(structure.reduce or geometry.in_channels, DEPTH)
    rows = torch.tensor([chunk.rows for chunk in _chunks(geometry, structure, inputs)])
    widths = [m.shape[1] for m in (reduce, middle, expand) if m is not None]
    return Weights(
        reduce=None if reduce is None else _pack(reduce, _in_order(reduce)),
        middle=_pack(middle, rows),
        expand=None if expand is None else _pack(expand, _in_order(expand)),
        bias=F.pad(bias.float(), (0, rounded(len(bias), PANEL) - len(bias))),
        zeros=torch.zeros(rounded(max(widths), PANEL)),
    )


def _in_order(matrix: Tensor) -> Tensor:
    """(chunks, 32) rows of a matrix one after the other, and `_NOWHERE` behind the last."""
    count = len(matrix)
    rows = F.pad(torch.arange(count), (0, rounded(count, DEPTH) - count), value=_NOWHERE)
    return rows.view(-1, DEPTH)


def _pack(matrix: Tensor, rows: Tensor) -> Tensor:
    """Panels of 32 outputs, each with its chunks, each of two tiles of pairs of inputs.

    Args:
        matrix: Of the product (inputs, outputs).
        rows: (chunks, 32), which input each number of a chunk is; `_NOWHERE` for none.
    """
    outputs = matrix.shape[1]
    padded = F.pad(matrix, (0, rounded(outputs, PANEL) - outputs, 0, 1))  # row -1 is of zeros
    tiles = padded[rows].view(len(rows), TILE_ROWS, 2, -1, 2, TILE_ROWS)
    return tiles.permute(3, 0, 4, 1, 5, 2).contiguous()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """32 channels side by side, seen through one tap.

    Attributes:
        tap: Row and column of the pixel in the window.
        channel: The first channel.
        rows: Which input of the product each one is, `_NOWHERE` for none.
    """

    tap: tuple[int, int]
    channel: int
    rows: list[int]


def _chunks(geometry: Geometry, structure: Structure, inputs: int) -> list[_Chunk]:
    """Chunks that together hold every column once; a pixel has `inputs` numbers and pooled ones."""
    width = _width(geometry, structure, inputs)
    chunks, seen = [], 0
    for tap, channels in columns_read(geometry, structure, inputs):
        waiting = sorted(zip(channels, range(seen, seen + len(channels)), strict=True))
        seen += len(channels)
        while waiting:
            first, rows, later = min(waiting[0][0], width - DEPTH), [_NOWHERE] * DEPTH, []
            for channel, column in waiting:
                if channel < first + DEPTH and rows[channel - first] == _NOWHERE:
                    rows[channel - first] = column
                else:
                    later.append((channel, column))
            chunks.append(_Chunk(tap, first, rows))
            waiting = later
    return chunks


def _width(geometry: Geometry, structure: Structure, inputs: int) -> int:
    """Numbers of a pixel of `inputs` and pooled ones, in whole chunks."""
    return inputs + rounded(pooled_numbers(geometry, structure), DEPTH)


def tile_program(
    geometry: Geometry, structure: Structure, shape: tuple[int, int, int], workers: int
) -> Program:
    """The program for so many images of so many rows and columns, and that many threads."""
    rows, columns = shape[1:]
    sizes = measured(geometry, structure, rows, columns, DEPTH)
    sizes = replace(sizes, width=_width(geometry, structure, sizes.inputs))
    if sizes.fill == at.IN_PLACE:
        sizes = replace(sizes, fill=at.COPY)  # a tile may reach behind the last pixel
    least = _images_read(structure, rows * columns)
    images = max(shape[0], least)
    cut, step = sizes.cut(images, workers, least), geometry.stride[1] * sizes.width
    held, waist, pools = sizes.scratch(cut)
    held, waist, pools = held + TILE_ROWS * step, waist + TILE_ROWS * sizes.waist, 2 * pools
    scratch = rounded(held + waist + _SUMS + 2 * _SHAPE + pools, DEPTH)
    tables = _tables(geometry, structure, sizes, cut, (rows, columns))
    arguments = common(geometry, sizes, cut, (rows, columns)) | {
        at.SCRATCH_SIZE: scratch * _SIZE,
        at.COUNT: len(tables[at.TABLE]),
        at.WAIST: structure.waist or 0,
        at.WAIST_SCRATCH: held * _SIZE,
        at.SUMS_SCRATCH: (held + waist) * _SIZE,
        at.SHAPE_SCRATCH: (held + waist + _SUMS) * _SIZE,
        at.POOL_COUNT: len(tables[at.POOLS]),
        at.POOL_SCRATCH: (held + waist + _SUMS + 2 * _SHAPE) * _SIZE,
        at.TILES: len(tables[at.POSITIONS]),
        at.WAIST_TILES: len(tables[at.WAIST_STARTS]),
        at.COLUMN_STEP: step * _SIZE,
    }
    made = (geometry.out_channels, sizes.rows, sizes.columns)
    return program(arguments, tables, made, scratch)


def _images_read(structure: Structure, pixels: int) -> int:
    """Images that have to be read together: a reduction reads whole tiles of pixels."""
    return -(-TILE_ROWS // pixels) if structure.reduce else 1


def _tables(
    geometry: Geometry, structure: Structure, sizes: Sizes, cut: Cut, image: tuple[int, int]
) -> dict[int, Tensor]:
    """The tables by their places among the arguments; offsets are in bytes."""
    rows, made = sizes.held_rows(cut.block), cut.group * cut.block * sizes.columns
    each = image[0] * image[1]
    pixels = max(TILE_ROWS, cut.group * each)
    firsts = (torch.arange(-(-pixels // TILE_ROWS)) * TILE_ROWS).clamp(max=pixels - TILE_ROWS)
    read = (firsts[:, None] + torch.arange(TILE_ROWS)).flatten()
    number, row, column = read // each, read % each // image[1], read % image[1]
    held = (number * rows + row) * sizes.held_columns + column + sizes.left
    if cut.group > 1:
        held[row >= rows - sizes.top] = _NOWHERE
    starts, results = _lattice(geometry, sizes, cut)
    places = torch.arange(rounded(made, TILE_ROWS))
    places[made:] = _NOWHERE
    outputs = geometry.out_channels
    chunks = _chunks(geometry, structure, sizes.inputs)
    (down, across), columns = geometry.dilation, sizes.held_columns
    taps = [c.tap[0] * down * columns + c.tap[1] * across for c in chunks]
    near = [tap * sizes.width + c.channel for tap, c in zip(taps, chunks, strict=True)]
    return {
        at.PIXELS: firsts * geometry.in_channels * _SIZE,
        at.HELD_PIXELS: _bytes(held, sizes.width),
        at.POSITIONS: starts * sizes.width * _SIZE,
        at.WAIST_PIXELS: _bytes(results, sizes.waist),
        at.WAIST_STARTS: torch.arange(0, made, TILE_ROWS) * sizes.waist * _SIZE,
        at.TARGET_PIXELS: _bytes(places if structure.waist else results, outputs),
        at.RAMP: torch.arange(0, max(geometry.in_channels, sizes.waist), DEPTH) * _SIZE,
        at.TABLE: torch.tensor(near) * _SIZE,
        **pool_tables(geometry, structure, sizes.inputs),
    }


def _lattice(geometry: Geometry, sizes: Sizes, cut: Cut) -> tuple[Tensor, Tensor]:
    """Tiles over the outputs of a block: pixels that they start at, and their rows' outputs.

    The positions of a tile are one column's stride apart, so that a tile that reaches behind the
    end of a row goes on in the next where the strides fit, some rows of it unwanted in between.
    """
    down, across = geometry.stride
    tall, wide = sizes.held_rows(cut.block), sizes.held_columns
    places = product(range(cut.group), range(cut.block), range(sizes.columns))
    wanted = {
        (image * tall + row * down) * wide + column * across: output
        for output, (image, row, column) in enumerate(places)
    }
    starts, results = [], []
    while wanted:
        start = next(iter(wanted))
        starts.append(start)
        results += [wanted.pop(start + i * across, _NOWHERE) for i in range(TILE_ROWS)]
    return torch.tensor(starts), torch.tensor(results)


def _bytes(numbers: Tensor, width: int) -> Tensor:
    """Offsets of pixels of `width` numbers, those of `_NOWHERE` still negative."""
    return torch.where(numbers < 0, numbers, numbers * width * _SIZE)
