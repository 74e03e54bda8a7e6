"""A whole bottleneck in bfloat16, as `loops_bottleneck` does it, on the processor's tiles."""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.loops_base import address, line, take
from pfsurgery.kernels.loops_blocks import blocks, clear_all, hold, pools
from pfsurgery.kernels.loops_tiles import configure, product, restore
from pfsurgery.kernels.vectors import BFLOAT16

_LOW = np.float32(-np.inf)
_ALL = np.int64(1) << 62  # behind every place: all results are written
_TILES = 8


@njit
def fill(p, source, held, first, sums):
    """What one block reads: rows of its images from `first` on."""
    begin, end = hold(p, source, held, first, 2)
    if begin >= end or p[at.FILL] != at.REDUCTION:
        return
    pitch = p[at.HELD_COLUMNS] * p[at.WIDTH] * 2
    last, most = end, end * pitch
    if p[at.GROUP] > 1:
        last, most = p[at.GROUP] * p[at.ROWS], _ALL
    until = (last * p[at.COLUMNS] + at.TILE_ROWS - 1) // at.TILE_ROWS
    product(
        source, p[at.PIXELS], begin * p[at.COLUMNS] // at.TILE_ROWS, until, p[at.CHANNELS] * 2,
        held - first * pitch, p[at.HELD_PIXELS], begin * pitch, most,
        p[at.RAMP], p[at.CHANNELS] // at.DEPTH,
        p[at.REDUCE], p[at.ZEROS], p[at.WIDTH], _LOW, sums, 0,
    )  # fmt: skip


all_pools = pools(2, BFLOAT16)


@njit
def block(p, source, target, first_output, scratch):
    sums = scratch + p[at.SUMS_SCRATCH]
    first = first_output * p[at.STRIDE] - p[at.TOP]
    fill(p, source, scratch, first, sums)
    all_pools(p, scratch, first, scratch + p[at.POOL_SCRATCH])
    low = np.float32(0) if p[at.RELU] else _LOW
    made = target + first_output * p[at.TARGET_COLUMNS] * p[at.OUTPUTS] * 2
    step = p[at.COLUMN_STEP]
    if p[at.WAIST]:
        waist = scratch + p[at.WAIST_SCRATCH]
        product(
            scratch, p[at.POSITIONS], 0, p[at.TILES], step,
            waist, p[at.WAIST_PIXELS], 0, _ALL,
            p[at.TABLE], p[at.COUNT], p[at.WEIGHTS], p[at.ZEROS], p[at.WAIST_WIDTH], _LOW, sums, 0,
        )  # fmt: skip
        product(
            waist, p[at.WAIST_STARTS], 0, p[at.WAIST_TILES], p[at.WAIST_WIDTH] * 2,
            made, p[at.TARGET_PIXELS], 0, _ALL,
            p[at.RAMP], p[at.WAIST_WIDTH] // at.DEPTH,
            p[at.EXPAND], p[at.BIAS], p[at.OUTPUTS], low, sums, p[at.ADDED],
        )  # fmt: skip
    else:
        product(
            scratch, p[at.POSITIONS], 0, p[at.TILES], step,
            made, p[at.TARGET_PIXELS], 0, _ALL,
            p[at.TABLE], p[at.COUNT],
            p[at.EXPAND], p[at.BIAS], p[at.OUTPUTS], low, sums, p[at.ADDED],
        )  # fmt: skip


@njit
def shape(target):
    """Describe tiles of 16 rows of 64 bytes, as the instruction wants it."""
    made = line(target, at.SHAPE, np.uint8)
    made[:] = 0
    made[0] = 1
    for tile in range(_TILES):
        made[16 + 2 * tile] = 64
        made[48 + tile] = at.TILE_ROWS


all_blocks = blocks(2, block, clear_all)


@njit
def work(data):
    p = line(data, at.ARGUMENTS, np.int64)
    scratch = p[at.SCRATCH] + take(data + at.THREAD * 8) * p[at.SCRATCH_SIZE]
    wanted = scratch + p[at.SHAPE_SCRATCH]
    before = wanted + at.SHAPE
    shape(wanted)
    configure(wanted, before)
    all_blocks(data, p, scratch)
    restore(before)


def bottleneck_bfloat16(data):
    work(address(data))
