"""Whole bottlenecks on the CPU: what `loops_bottleneck` needs, as tables and packed weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pfsurgery.errors import ShapeError
from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.cpu import compiled
from pfsurgery.kernels.memory import output
from pfsurgery.kernels.threads import run, threads
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure

_BLOCK = 65536  # numbers of scratch memory for one block: a part of the second-level cache
_PROGRAMS = 8  # image sizes that a bottleneck remembers
_SIZE = 4  # bytes of a number
_Arguments = ctypes.c_int64 * at.ARGUMENTS


@dataclass(frozen=True, slots=True)
class Weights:
    """A bottleneck's weights, packed in the order in which the kernel reads them.

    Attributes:
        reduce: Of the reduction, None without one.
        middle: Of the first product behind the columns or taps.
        expand: Of the second product, None without a waist.
        bias: (C_out,) and zeros to whole vectors.
        zeros: As many zeros as any product has outputs.
    """

    reduce: Tensor | None
    middle: Tensor
    expand: Tensor | None
    bias: Tensor
    zeros: Tensor


def pack_weights(
    reduce: Tensor | None, middle: Tensor, expand: Tensor | None, bias: Tensor
) -> Weights:
    """Packs matrices (inputs, outputs) of the products, and the bias (C_out,) of the last."""
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
    outputs, panel = matrix.shape[1], _tile()[1]
    padded = F.pad(matrix, (0, _whole(outputs) - outputs))
    return torch.cat([part.flatten() for part in torch.split(padded, panel, dim=1)])


@dataclass(frozen=True, slots=True)
class Program:
    """What the kernel is told of one bottleneck for images of one size.

    Attributes:
        arguments: The kernel's arguments; those that change from call to call are 0.
        tables: Tensors whose addresses are among the arguments.
        shape: Channels, rows and columns of an output.
        blocks: Blocks of an image.
        scratch: Numbers of scratch memory for one thread.
    """

    arguments: bytes
    tables: tuple[Tensor, ...]
    shape: tuple[int, int, int]
    blocks: int
    scratch: int


class Fused:
    """A bottleneck's programs, one for each size of image seen lately.

    Copies start without programs: these hold addresses.
    """

    def __init__(self, geometry: Geometry, structure: Structure) -> None:
        self.geometry, self.structure = geometry, structure
        self.programs: dict[tuple[int, int, int], Program] = {}

    def __reduce__(self) -> Any:
        """The bottleneck alone."""
        return Fused, (self.geometry, self.structure)

    def __call__(self, x: Tensor, weights: Weights, *, relu: bool = False) -> Tensor:
        """The bottleneck's output (N, C', H', W') of (N, C, H, W), in the layout of `x`.

        Args:
            x: The input, float32 on the CPU.
            weights: Packed by `pack_weights`.
            relu: Raise negative outputs to 0.

        Raises:
            ShapeError: `x` has other channels, or is smaller than the window.
        """
        plain = x.is_contiguous()
        x = x.contiguous(memory_format=torch.channels_last)
        images, channels, rows, columns = x.shape
        if channels != self.geometry.in_channels:
            raise ShapeError(
                f"A bottleneck of {self.geometry.in_channels} channels was given {channels}."
            )
        key = (rows, columns, -(-2 * threads() // images))
        program = self.programs.get(key)
        if program is None:
            if len(self.programs) >= _PROGRAMS:
                self.programs.clear()
            program = self.programs[key] = _program(self.geometry, self.structure, *key)
        made = _run(program, weights, x, relu)
        return made.contiguous() if plain else made


def _run(program: Program, weights: Weights, x: Tensor, relu: bool) -> Tensor:
    images = x.shape[0]
    out = output(images, *program.shape)
    units = images * program.blocks
    wanted = min(threads(), units)
    scratch = torch.empty(wanted * program.scratch, dtype=x.dtype)
    last = weights.middle if weights.expand is None else weights.expand
    arguments = _Arguments.from_buffer_copy(program.arguments)
    arguments[at.UNITS] = units
    arguments[at.SOURCE], arguments[at.TARGET] = x.data_ptr(), out.data_ptr()
    arguments[at.SCRATCH] = scratch.data_ptr()
    if weights.reduce is not None:
        arguments[at.REDUCE] = weights.reduce.data_ptr()
    arguments[at.WEIGHTS], arguments[at.EXPAND] = weights.middle.data_ptr(), last.data_ptr()
    arguments[at.BIAS], arguments[at.ZEROS] = weights.bias.data_ptr(), weights.zeros.data_ptr()
    arguments[at.RELU] = relu
    run(compiled("loops_bottleneck", "bottleneck_float32"), ctypes.addressof(arguments), wanted)
    return out


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How a bottleneck's images lie in memory.

    Attributes:
        top: Rows of padding above.
        left: Columns of padding on the left.
        rows: Rows of an output.
        columns: Columns of an output.
        held_columns: Columns of what the middle reads, with the padding.
        reach: Rows that one row of outputs reads.
        stride: Rows from one output to the next.
        width: Numbers of a pixel of what the middle reads.
        waist: Numbers of a pixel between the products, in whole vectors.
        pooled: Channels of the widest pooled run.
        fill: Where what the middle reads comes from.
    """

    top: int
    left: int
    rows: int
    columns: int
    held_columns: int
    reach: int
    stride: int
    width: int
    waist: int
    pooled: int
    fill: int

    def held_rows(self, block: int) -> int:
        """Rows that `block` rows of outputs read."""
        return (block - 1) * self.stride + self.reach

    def scratch(self, block: int) -> tuple[int, int, int]:
        """Numbers of scratch memory: what is held, the waist, the rows of a pool."""
        rows = self.held_rows(block)
        held = 0 if self.fill == at.IN_PLACE else rows * self.held_columns * self.width
        return (
            held,
            block * self.columns * self.waist,
            self.pooled * self.held_columns * (rows + 3),
        )


def _sizes(geometry: Geometry, structure: Structure, rows: int, columns: int) -> _Sizes:
    (top, bottom), (left, right) = geometry.pads((rows, columns))
    reach = [(k - 1) * d + 1 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    padded = rows + top + bottom, columns + left + right
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ShapeError(
            f"An input of {rows} x {columns} pixels is smaller than the window of {geometry}."
        )
    made = geometry.output_size((rows, columns))
    pooled = [len(run.channels) for run in structure.runs if run.kind != "tap"]
    if structure.reduce:
        fill = at.REDUCTION
    else:
        fill = at.COPY if pooled or padded != (rows, columns) else at.IN_PLACE
    inputs = _whole(structure.reduce) if structure.reduce else geometry.in_channels
    return _Sizes(
        top=top,
        left=left,
        rows=made[0],
        columns=made[1],
        held_columns=padded[1],
        reach=reach[0],
        stride=geometry.stride[0],
        width=inputs + sum(pooled),
        waist=_whole(structure.waist or 0),
        pooled=max(pooled, default=0),
        fill=fill,
    )


def _program(
    geometry: Geometry, structure: Structure, rows: int, columns: int, shares: int
) -> Program:
    """The program for images of `rows` x `columns`, each cut into `shares` blocks or more."""
    sizes = _sizes(geometry, structure, rows, columns)
    block = -(-sizes.rows // shares)
    while block > 1 and sum(sizes.scratch(block)) > _BLOCK:
        block = -(-block // 2)
    held, waist, pools = sizes.scratch(block)
    tables = _tables(geometry, structure, sizes, block, columns)
    columns_read, pooled_runs = tables[_TABLES.index(at.TABLE)], tables[_TABLES.index(at.POOLS)]
    blocks, outputs = -(-sizes.rows // block), geometry.out_channels
    arguments = _Arguments()
    for place, value in {
        at.SCRATCH_SIZE: (held + waist + pools) * _SIZE,
        **dict(zip(_TABLES, (table.data_ptr() for table in tables), strict=True)),
        at.BLOCKS: blocks,
        at.BLOCK_ROWS: block,
        at.ROWS: rows,
        at.COLUMNS: columns,
        at.CHANNELS: geometry.in_channels,
        at.TARGET_ROWS: sizes.rows,
        at.TARGET_COLUMNS: sizes.columns,
        at.OUTPUTS: outputs,
        at.STRIDE: sizes.stride,
        at.TOP: sizes.top,
        at.LEFT: sizes.left,
        at.HELD_ROWS: sizes.held_rows(block),
        at.HELD_COLUMNS: sizes.held_columns,
        at.WIDTH: sizes.width,
        at.FILL: sizes.fill,
        at.REDUCED: _whole(structure.reduce or 0),
        at.COUNT: len(columns_read),
        at.WAIST: structure.waist or 0,
        at.WAIST_WIDTH: sizes.waist,
        at.WAIST_SCRATCH: held * _SIZE,
        at.POOL_COUNT: len(pooled_runs),
        at.POOL_SCRATCH: (held + waist) * _SIZE,
    }.items():
        arguments[place] = value
    shape = (outputs, sizes.rows, sizes.columns)
    return Program(bytes(arguments), tables, shape, blocks, held + waist + pools)


_TABLES = (
    *(at.PIXELS, at.HELD_PIXELS, at.POSITIONS, at.TARGET_PIXELS, at.WAIST_PIXELS),
    *(at.RAMP, at.TABLE, at.POOLS, at.LISTS),
)


def _tables(
    geometry: Geometry, structure: Structure, sizes: _Sizes, block: int, columns: int
) -> tuple[Tensor, ...]:
    """The tables in the order of `_TABLES`; offsets are in bytes."""
    inputs, width, rows = geometry.in_channels, sizes.width, sizes.held_rows(block)
    down, across = geometry.stride
    made = block * sizes.columns
    return (
        _pixels(1, rows * columns, 0, 1, inputs),
        _pixels(rows, columns, sizes.held_columns, 1, width) + sizes.left * width * _SIZE,
        _pixels(block, sizes.columns, down * sizes.held_columns, across, width),
        _pixels(1, made, 0, 1, geometry.out_channels),
        _pixels(1, made, 0, 1, sizes.waist),
        torch.arange(max(inputs, structure.waist or 0)) * _SIZE,
        *_columns(geometry, structure, sizes.held_columns, width),
    )


def _pixels(height: int, width: int, pitch: int, step: int, numbers: int) -> Tensor:
    """Offsets of a grid of pixels of `numbers` numbers, `pitch` and `step` pixels apart."""
    places = torch.arange(height)[:, None] * pitch + torch.arange(width) * step
    return (places * numbers * _SIZE).flatten()


def _columns(
    geometry: Geometry, structure: Structure, held_columns: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Byte offset of every column from its position; the pooled runs, and their channels."""
    (height, breadth), (down, across) = geometry.kernel_size, geometry.dilation

    def tap(row: int, column: int, channels: Sequence[int]) -> list[int]:
        pixel = (row * down * held_columns + column * across) * width
        return [(pixel + channel) * _SIZE for channel in channels]

    if structure.dense:
        read = range(structure.reduce or geometry.in_channels)
        taps = [(i, j) for i in range(height) for j in range(breadth)]
        return torch.tensor([o for i, j in taps for o in tap(i, j, read)]), _NONE, _NONE
    table: list[int] = []
    pools: list[list[int]] = []
    lists: list[int] = []
    place = width - sum(len(run.channels) for run in structure.runs if run.kind != "tap")
    for run_ in structure.runs:
        if run_.kind == "tap":
            table += tap(run_.top, run_.left, run_.channels)
            continue
        pools.append(_pool(run_, geometry, len(lists), place))
        lists += run_.channels
        table += [(place + i) * _SIZE for i in range(len(run_.channels))]
        place += len(run_.channels)
    return torch.tensor(table), torch.tensor(pools), torch.tensor(lists)


def _pool(run_: Run, geometry: Geometry, listed: int, place: int) -> list[int]:
    """A pooled run as the kernel reads it, from `at.MAXIMUM` to `at.PLACE`."""
    return [
        *(int(run_.kind == "maximum"), run_.top, run_.left, run_.height, run_.width),
        *(geometry.stride[1], len(run_.channels), listed, place),
    ]


_NONE = torch.zeros(0, dtype=torch.int64)


def _whole(numbers: int) -> int:
    """`numbers`, rounded up to whole vectors."""
    lanes = _tile()[0]
    return -(-numbers // lanes) * lanes


@lru_cache
def _tile() -> tuple[int, int]:
    """Numbers of a vector, and outputs of a panel: what a tile holds of a row."""
    from pfsurgery.kernels import vectors

    return vectors.LANES, vectors.LANES * vectors.VECTORS
