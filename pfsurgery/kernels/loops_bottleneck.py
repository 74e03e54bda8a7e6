"""A whole bottleneck in blocks of rows, or of small images: reduce, operate, expand in the cache.

What the middle reads is held in scratch memory, padded, one block with its halo at a time: the
reduced channels, or a copy of the input, with pooled columns behind the channels of each pixel.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.loops_base import address, line, take
from pfsurgery.kernels.loops_blocks import blocks, clear_sides, hold, pools
from pfsurgery.kernels.loops_product import product
from pfsurgery.kernels.vectors import FLOAT32

_NONE = np.float32(-np.inf)


@njit
def fill(p, source, held, first):
    """What one block reads: rows of its images from `first` on."""
    begin, end = hold(p, source, held, first, 4)
    if begin >= end or p[at.FILL] != at.REDUCTION:
        return
    source += begin * p[at.COLUMNS] * p[at.CHANNELS] * 4
    places = p[at.HELD_PIXELS] + (begin - first) * p[at.COLUMNS] * 8
    pixels = p[at.GROUP] * (end - begin) * p[at.COLUMNS]
    # fmt: off
    product(
        source, p[at.PIXELS], held, places, pixels,
        p[at.RAMP], p[at.CHANNELS], p[at.REDUCE], p[at.ZEROS], p[at.REDUCED], _NONE, 0,
    )
    # fmt: on


all_pools = pools(4, FLOAT32)


@njit
def block(p, source, target, first_output, scratch):
    first = first_output * p[at.STRIDE] - p[at.TOP]
    if p[at.FILL] == at.IN_PLACE:
        held = source + first * p[at.COLUMNS] * p[at.CHANNELS] * 4
    else:
        held = scratch
        fill(p, source, held, first)
    all_pools(p, held, first, scratch + p[at.POOL_SCRATCH])
    positions = p[at.GROUP] * p[at.BLOCK_ROWS] * p[at.TARGET_COLUMNS]
    low = np.float32(0) if p[at.RELU] else _NONE
    made = target + first_output * p[at.TARGET_COLUMNS] * p[at.OUTPUTS] * 4
    # fmt: off
    if p[at.WAIST]:
        waist = scratch + p[at.WAIST_SCRATCH]
        product(
            held, p[at.POSITIONS], waist, p[at.WAIST_PIXELS], positions,
            p[at.TABLE], p[at.COUNT], p[at.WEIGHTS], p[at.ZEROS], p[at.WAIST_WIDTH], _NONE, 0,
        )
        product(
            waist, p[at.WAIST_PIXELS], made, p[at.TARGET_PIXELS], positions,
            p[at.RAMP], p[at.WAIST], p[at.EXPAND], p[at.BIAS], p[at.OUTPUTS], low, p[at.ADDED],
        )
    else:
        product(
            held, p[at.POSITIONS], made, p[at.TARGET_PIXELS], positions,
            p[at.TABLE], p[at.COUNT], p[at.EXPAND], p[at.BIAS], p[at.OUTPUTS], low, p[at.ADDED],
        )
    # fmt: on


all_blocks = blocks(4, block, clear_sides)


@njit
def work(data):
    p = line(data, at.ARGUMENTS, np.int64)
    scratch = p[at.SCRATCH] + take(data + at.THREAD * 8) * p[at.SCRATCH_SIZE]
    all_blocks(data, p, scratch)


def bottleneck_float32(data):
    work(address(data))
