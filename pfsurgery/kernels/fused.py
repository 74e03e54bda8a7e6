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

from pfsurgery.kernels.cpu import compiled
from pfsurgery.kernels.threads import run, threads
from pfsurgery.sites import Geometry, Pair
from pfsurgery.structure import Run, Structure

_BLOCK = 65536  # numbers of scratch memory for one block: a part of the second-level cache
_PROGRAMS = 8  # image sizes that a bottleneck remembers
_SIZE = 4  # bytes of a number
# Arguments of `loops_bottleneck` that change from call to call; the others are in `_program`.
_UNITS, _SOURCE, _TARGET, _SCRATCH = 1, 3, 4, 5
_REDUCE, _MIDDLE, _EXPAND, _BIAS, _ZEROS = range(7, 12)
_IN_PLACE, _COPY, _REDUCTION = range(3)
_Arguments = ctypes.c_int64 * 43


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
        output: Channels, rows and columns of an output.
        blocks: Blocks of an image.
        scratch: Numbers of scratch memory for one thread.
    """

    arguments: bytes
    tables: tuple[Tensor, ...]
    output: tuple[int, int, int]
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

    def __call__(self, x: Tensor, weights: Weights) -> Tensor:
        """The bottleneck's output (N, C', H', W') of (N, C, H, W), in the layout of `x`."""
        plain = x.is_contiguous()
        x = x.contiguous(memory_format=torch.channels_last)
        images, _, rows, columns = x.shape
        key = (rows, columns, -(-2 * threads() // images))
        if key not in self.programs:
            if len(self.programs) >= _PROGRAMS:
                self.programs.clear()
            self.programs[key] = _program(self.geometry, self.structure, *key)
        made = _run(self.programs[key], weights, x)
        return made.contiguous() if plain else made


def _run(program: Program, weights: Weights, x: Tensor) -> Tensor:
    images, like = x.shape[0], torch.channels_last
    out = torch.empty((images, *program.output), dtype=x.dtype, memory_format=like)
    units = images * program.blocks
    wanted = min(threads(), units)
    scratch = torch.empty(wanted * program.scratch, dtype=x.dtype)
    last = weights.middle if weights.expand is None else weights.expand
    arguments = _Arguments.from_buffer_copy(program.arguments)
    arguments[_UNITS] = units
    arguments[_SOURCE], arguments[_TARGET] = x.data_ptr(), out.data_ptr()
    arguments[_SCRATCH] = scratch.data_ptr()
    if weights.reduce is not None:
        arguments[_REDUCE] = weights.reduce.data_ptr()
    arguments[_MIDDLE], arguments[_EXPAND] = weights.middle.data_ptr(), last.data_ptr()
    arguments[_BIAS], arguments[_ZEROS] = weights.bias.data_ptr(), weights.zeros.data_ptr()
    run(compiled("loops_bottleneck", "bottleneck_float32"), ctypes.addressof(arguments), wanted)
    return out


def _program(
    geometry: Geometry, structure: Structure, rows: int, columns: int, shares: int
) -> Program:
    """The program for images of `rows` x `columns`, each cut into `shares` blocks or more."""
    (top, bottom), (left, right) = geometry.pads((rows, columns))
    out_rows, out_columns = _outputs(geometry, (rows, columns))
    (stride, across), inputs = geometry.stride, geometry.in_channels
    pooled = [run for run in structure.runs if run.kind != "tap"]
    wide = _whole(structure.reduce) if structure.reduce else inputs
    wide += sum(len(run.channels) for run in pooled)
    waist = _whole(structure.waist) if structure.waist else 0
    if structure.reduce:
        fill = _REDUCTION
    else:
        fill = _COPY if top or bottom or left or right or pooled else _IN_PLACE
    held_columns = columns + left + right

    def held_rows(block: int) -> int:
        return (block - 1) * stride + (geometry.kernel_size[0] - 1) * geometry.dilation[0] + 1

    def numbers(block: int) -> tuple[int, int, int]:
        """Of the held rows, the waist, and the rows of a pool."""
        held = 0 if fill == _IN_PLACE else held_rows(block) * held_columns * wide
        most = max((len(run.channels) for run in pooled), default=0)
        return (
            held,
            block * out_columns * waist,
            most * held_columns * (held_rows(block) + 3),
        )

    block = -(-out_rows // shares)
    while block > 1 and sum(numbers(block)) > _BLOCK:
        block = -(-block // 2)
    held, waist_numbers, pool_numbers = numbers(block)

    def pixels(height: int, width: int, pitch: int, step: int, of: int) -> Tensor:
        """Byte offsets of a grid of pixels of `of` numbers, `step` and `pitch` pixels apart."""
        places = torch.arange(height)[:, None] * pitch + torch.arange(width) * step
        return (places * of * _SIZE).flatten()

    table, pools, lists = _columns(geometry, structure, held_columns, wide)
    held_block, outputs = held_rows(block), geometry.out_channels
    held_pixels = pixels(held_block, columns, held_columns, 1, wide) + left * wide * _SIZE
    tables = (
        pixels(1, held_block * columns, 0, 1, inputs),
        held_pixels,
        pixels(block, out_columns, stride * held_columns, across, wide),
        pixels(1, block * out_columns, 0, 1, outputs),
        pixels(1, block * out_columns, 0, 1, waist),
        torch.arange(max(inputs, structure.waist or 0)) * _SIZE,
        table,
        pools,
        lists,
    )
    scratch = held + waist_numbers + pool_numbers
    blocks = -(-out_rows // block)
    arguments = _Arguments(
        *(0, 0, 0, 0, 0, 0, scratch * _SIZE),
        *(0, 0, 0, 0, 0),
        *(t.data_ptr() for t in tables),
        *(blocks, block, rows, columns, inputs, out_rows, out_columns, outputs),
        *(stride, top, left, held_block, held_columns, wide, fill),
        *(_whole(structure.reduce or 0), len(table), structure.waist or 0, waist),
        *(held * _SIZE, len(pooled), (held + waist_numbers) * _SIZE),
    )
    return Program(bytes(arguments), tables, (outputs, out_rows, out_columns), blocks, scratch)


def _columns(
    geometry: Geometry, structure: Structure, held_columns: int, wide: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Byte offset of every column from its position; the pooled runs, and their channels."""
    (height, width), (down, across) = geometry.kernel_size, geometry.dilation

    def tap(row: int, column: int, channels: Sequence[int]) -> list[int]:
        pixel = (row * down * held_columns + column * across) * wide
        return [(pixel + channel) * _SIZE for channel in channels]

    if structure.dense:
        read = range(structure.reduce or geometry.in_channels)
        taps = [(i, j) for i in range(height) for j in range(width)]
        return torch.tensor([o for i, j in taps for o in tap(i, j, read)]), _NONE, _NONE
    table: list[int] = []
    pools: list[list[int]] = []
    lists: list[int] = []
    place = wide - sum(len(run.channels) for run in structure.runs if run.kind != "tap")
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
    return [
        *(int(run_.kind == "maximum"), run_.top, run_.left, run_.height, run_.width),
        *(geometry.stride[1], len(run_.channels), listed, place),
    ]


_NONE = torch.zeros(0, dtype=torch.int64)


def _outputs(geometry: Geometry, size: Pair) -> Pair:
    rows, columns = (
        (length + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
        for length, pads, kernel, stride, dilation in zip(
            size,
            geometry.pads(size),
            geometry.kernel_size,
            geometry.stride,
            geometry.dilation,
            strict=True,
        )
    )
    return rows, columns


def _whole(numbers: int) -> int:
    """`numbers`, rounded up to whole vectors."""
    lanes = _tile()[0]
    return -(-numbers // lanes) * lanes


@lru_cache
def _tile() -> tuple[int, int]:
    """Numbers of a vector, and outputs of a panel: what a tile holds of a row."""
    from pfsurgery.kernels import vectors

    return vectors.LANES, vectors.LANES * vectors.VECTORS
