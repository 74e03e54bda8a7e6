"""What the kernel of a bottleneck is given: packed weights, tables, how images lie in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pfsurgery.errors import ShapeError
from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure

_BLOCK = 65536  # numbers of scratch memory for one block: a part of the second-level cache


@dataclass(frozen=True, slots=True)
class Weights:
    """A bottleneck's weights, packed in the order in which the kernel reads them.

    Attributes:
        reduce: Of the reduction, None without one.
        middle: Of the first product behind the columns or taps.
        expand: Of the second product, None without a waist.
        bias: (C_out,) and zeros to whole vectors, or to whole tiles.
        zeros: As many zeros as any product has outputs.
    """

    reduce: Tensor | None
    middle: Tensor
    expand: Tensor | None
    bias: Tensor
    zeros: Tensor


@dataclass(frozen=True, slots=True)
class Program:
    """What the kernel is told of one bottleneck for images of one size.

    Attributes:
        arguments: The kernel's arguments; those that change from call to call are 0.
        tables: Tensors whose addresses are among the arguments.
        shape: Channels, rows and columns of an output.
        images: How many it computes; a few more than there are where these are tiny.
        units: Blocks of all images, or groups of images.
        scratch: Numbers of scratch memory for one thread.
    """

    arguments: bytes
    tables: tuple[Tensor, ...]
    shape: tuple[int, int, int]
    images: int
    units: int
    scratch: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How the work is cut into units, which threads take one by one.

    Attributes:
        images: How many there are.
        block: Rows of outputs in a unit.
        group: Images in a unit; several only where a block is a whole one.
    """

    images: int
    block: int
    group: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a bottleneck's images lie in memory.

    Attributes:
        top: Rows of padding above.
        left: Columns of padding on the left.
        rows: Rows of an output.
        columns: Columns of an output.
        held_columns: Columns of what the middle reads, with the padding.
        reach: Rows that one row of outputs reads.
        stride: Rows from one output to the next.
        inputs: Numbers of a pixel of what the middle reads, without pooled ones.
        width: With pooled ones behind them.
        waist: Numbers of a pixel between the products, in whole vectors.
        pools: Whether any run is pooled.
        fill: Where what the middle reads comes from.
    """

    top: int
    left: int
    rows: int
    columns: int
    held_columns: int
    reach: int
    stride: int
    inputs: int
    width: int
    waist: int
    pools: bool
    fill: int

    def held_rows(self, block: int) -> int:
        """Rows that `block` rows of outputs read."""
        return (block - 1) * self.stride + self.reach

    def cut(self, images: int, workers: int, least: int = 1) -> Cut:
        """Units that stay in the cache, about two for each of the workers or more.

        Of small images a unit has as many as let the workers end together: the rows of tiles that
        go beyond the positions are lost once for all of these, and the weights are read once. Where
        `least` images have to be together, a unit is larger than the cache if need be.
        """
        block = self.rows if least > 1 else -(-self.rows // -(-2 * workers // images))
        while block > 1 and least == 1 and sum(self.scratch(Cut(images, block, 1))) > _BLOCK:
            block = -(-block // 2)
        if block < self.rows:
            return Cut(images, block, 1)
        read = self.held_rows(block) * self.held_columns * self.width
        most = min(_BLOCK // (read + block * self.columns * self.waist), images // (2 * workers))
        groups = range(least, max(least, most) + 1)
        group = min(groups, key=lambda size: (-(-images // (size * workers)) * size, -size))
        return Cut(images, block, group)

    def scratch(self, cut: Cut) -> tuple[int, int, int]:
        """Numbers of scratch memory: what is held, the waist, a row of a pool and its shares."""
        rows = self.held_rows(cut.block)
        held = 0 if self.fill == at.IN_PLACE else rows * self.held_columns * self.width
        return (
            cut.group * held,
            cut.group * cut.block * self.columns * self.waist,
            self.held_columns * (lanes() + 1) if self.pools else 0,
        )


def measured(geometry: Geometry, structure: Structure, rows: int, columns: int, unit: int) -> Sizes:
    """How images of `rows` x `columns` lie; widths are rounded up to multiples of `unit`.

    Raises:
        ShapeError: The image is smaller than the window.
    """
    (top, bottom), (left, right) = geometry.pads((rows, columns))
    reach = [(k - 1) * d + 1 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    padded = rows + top + bottom, columns + left + right
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ShapeError(
            f"An input of {rows} x {columns} pixels is smaller than the window of {geometry}."
        )
    made = geometry.output_size((rows, columns))
    pools = any(run.kind != "tap" for run in structure.runs)
    if structure.reduce:
        fill = at.REDUCTION
    else:
        fill = at.COPY if pools or padded != (rows, columns) else at.IN_PLACE
    inputs = rounded(structure.reduce, unit) if structure.reduce else geometry.in_channels
    return Sizes(
        top=top,
        left=left,
        rows=made[0],
        columns=made[1],
        held_columns=padded[1],
        reach=reach[0],
        stride=geometry.stride[0],
        inputs=inputs,
        width=inputs + pooled_numbers(geometry, structure),
        waist=rounded(structure.waist or 0, unit),
        pools=pools,
        fill=fill,
    )


def columns_read(
    geometry: Geometry, structure: Structure, inputs: int
) -> list[tuple[tuple[int, int], Sequence[int]]]:
    """Which numbers of which pixel of the window the columns are, in their order.

    Args:
        geometry: Of the site.
        structure: Of the bottleneck.
        inputs: Numbers of a pixel; the pooled ones lie behind these.
    """
    if structure.dense:
        channels = range(structure.reduce or geometry.in_channels)
        height, width = geometry.kernel_size
        return [((row, column), channels) for row in range(height) for column in range(width)]
    read: list[tuple[tuple[int, int], Sequence[int]]] = []
    pooled = _pooled(geometry, structure, inputs)
    for run in structure.runs:
        if run.kind == "tap":
            read.append(((run.top, run.left), run.channels))
            continue
        _, firsts, begin = next(pooled)
        places: dict[int, int] = {}
        for number, first in enumerate(firsts):
            there = begin + number * lanes() - first
            places |= {channel: channel + there for channel in range(first, first + lanes())}
        read.append(((0, 0), [places[channel] for channel in run.channels]))
    return read


def pooled_numbers(geometry: Geometry, structure: Structure) -> int:
    """Numbers of a pixel that pooled runs take: of each the vectors that hold its channels."""
    return sum(len(firsts) for _, firsts, _ in _pooled(geometry, structure, 0)) * lanes()


def _pooled(
    geometry: Geometry, structure: Structure, inputs: int
) -> Iterator[tuple[Run, list[int], int]]:
    """Pooled runs, their vectors' first channels, and which number of a pixel they begin at."""
    for run in structure.runs:
        if run.kind != "tap":
            firsts = _vectors(run.channels, geometry.in_channels)
            yield run, firsts, inputs
            inputs += len(firsts) * lanes()


def _vectors(channels: Sequence[int], inputs: int) -> list[int]:
    """First channels of vectors that together hold ascending channels of so many.

    They lie as in memory that is cut into vectors, but for the last: that ends with the pixel.
    """
    found: list[int] = []
    for channel in channels:
        if not found or channel >= found[-1] + lanes():
            found.append(max(0, min(channel // lanes() * lanes(), inputs - lanes())))
    return found


@lru_cache
def lanes() -> int:
    """Numbers of a vector; asked for when a kernel is about to run, as Numba knows it."""
    from pfsurgery.kernels import vectors

    return vectors.LANES


def pool_tables(geometry: Geometry, structure: Structure, inputs: int) -> dict[int, Tensor]:
    """The pooled runs, each from `at.MAXIMUM` to `at.PLACE`, and their vectors' first channels."""
    pools: list[list[int]] = []
    lists: list[int] = []
    for run, firsts, begin in _pooled(geometry, structure, inputs):
        window = [int(run.kind == "maximum"), run.top, run.left, run.height, run.width]
        pools.append([*window, geometry.stride[1], len(firsts), len(lists), begin])
        lists += firsts
    return {at.POOLS: torch.tensor(pools), at.LISTS: torch.tensor(lists)}


def program(
    arguments: Mapping[int, int],
    tables: Mapping[int, Tensor],
    shape: tuple[int, int, int],
    scratch: int,
) -> Program:
    """A program of some arguments and of the addresses of some tables."""
    given = (ctypes.c_int64 * at.ARGUMENTS)()
    for place, value in arguments.items():
        given[place] = value
    for place, table in tables.items():
        given[place] = table.data_ptr()
    images, units = arguments[at.IMAGES], arguments[at.UNITS]
    return Program(bytes(given), tuple(tables.values()), shape, images, units, scratch)


def common(geometry: Geometry, sizes: Sizes, cut: Cut, image: tuple[int, int]) -> dict[int, int]:
    """The arguments that all kernels read, for images of `image` pixels."""
    blocks = -(-sizes.rows // cut.block)
    return {
        at.UNITS: -(-cut.images // cut.group) * blocks,
        at.IMAGES: cut.images,
        at.GROUP: cut.group,
        at.BLOCKS: blocks,
        at.BLOCK_ROWS: cut.block,
        at.ROWS: image[0],
        at.COLUMNS: image[1],
        at.CHANNELS: geometry.in_channels,
        at.TARGET_ROWS: sizes.rows,
        at.TARGET_COLUMNS: sizes.columns,
        at.OUTPUTS: geometry.out_channels,
        at.STRIDE: sizes.stride,
        at.TOP: sizes.top,
        at.LEFT: sizes.left,
        at.HELD_ROWS: sizes.held_rows(cut.block),
        at.HELD_COLUMNS: sizes.held_columns,
        at.WIDTH: sizes.width,
        at.WAIST_WIDTH: sizes.waist,
        at.FILL: sizes.fill,
    }


def rounded(numbers: int, unit: int) -> int:
    """`numbers`, rounded up to a multiple of `unit`."""
    return -(-numbers // unit) * unit
