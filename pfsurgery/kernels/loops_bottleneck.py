"""A whole bottleneck, image by image in blocks of rows: reduce, operate, expand in the cache.

What the middle reads is held in scratch memory, padded, one block with its halo at a time: the
reduced channels, or a copy of the input, with pooled columns behind the channels of each pixel.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels.loops_base import address, line, take
from pfsurgery.kernels.loops_product import product

# Places in the block of 64-bit integers that the entry point reads its arguments from.
COUNTER, UNITS, THREAD, SOURCE, TARGET, SCRATCH, SCRATCH_SIZE = range(7)
BLOCKS, BLOCK_ROWS, ROWS, COLUMNS, CHANNELS = range(7, 12)
TARGET_ROWS, TARGET_COLUMNS, OUTPUTS, STRIDE, TOP = range(12, 17)
HELD_ROWS, HELD_COLUMNS, WIDTH, FILL, LEFT = range(17, 22)
REDUCE, REDUCED, PIXELS, HELD_PIXELS = range(22, 26)
POOLS, POOL_COUNT, POOL_SCRATCH = range(26, 29)
POSITIONS, TABLE, COUNT, WEIGHTS, WAIST, WAIST_WIDTH = range(29, 35)
WAIST_SCRATCH, WAIST_PIXELS, EXPAND, TARGET_PIXELS = range(35, 39)
RAMP, ZEROS, BIAS, RELU, LISTS = range(39, 44)
ARGUMENTS = 44
IN_PLACE, COPY, REDUCTION = range(3)
# Places in the row of integers that describes a pooled run of columns.
MAXIMUM, FIRST_ROW, FIRST_COLUMN, POOL_HEIGHT, POOL_WIDTH = range(5)
COLUMN_STRIDE, POOLED, LIST, PLACE = range(5, 9)
POOL = 9
_NONE = np.float32(-np.inf)


@njit
def zero(target, numbers):
    line(target, numbers, np.float32)[:] = 0


@njit
def fill(p, source, held, first):
    """What one block reads: rows from `first` on, those outside of the image zero."""
    begin, end = max(first, 0), min(first + p[HELD_ROWS], p[ROWS])
    pitch = p[HELD_COLUMNS] * p[WIDTH] * 4
    if begin > first:
        zero(held, (begin - first) * p[HELD_COLUMNS] * p[WIDTH])
    if end < first + p[HELD_ROWS]:
        here = held + (end - first) * pitch
        zero(here, (first + p[HELD_ROWS] - end) * p[HELD_COLUMNS] * p[WIDTH])
    if begin >= end:
        return
    source += begin * p[COLUMNS] * p[CHANNELS] * 4
    if p[FILL] == REDUCTION:
        places = p[HELD_PIXELS] + (begin - first) * p[COLUMNS] * 8
        pixels = (end - begin) * p[COLUMNS]
        # fmt: off
        product(
            source, p[PIXELS], held, places, pixels,
            p[RAMP], p[CHANNELS], p[REDUCE], p[ZEROS], p[REDUCED], _NONE,
        )
        # fmt: on
        return
    channels, width = p[CHANNELS], p[WIDTH]
    whole = p[COLUMNS] if channels == width else 1  # pixels that lie side by side on both sides
    numbers = channels * whole
    for row in range(end - begin):
        here = held + (begin - first + row) * pitch + p[LEFT] * width * 4
        for _ in range(0, p[COLUMNS], whole):
            read = line(source, numbers, np.float32)
            made = line(here, numbers, np.float32)
            for c in range(numbers):
                made[c] = read[c]
            source += numbers * 4
            here += width * whole * 4


@njit
def pool(p, q, source, held, first, scratch):
    """One pooled run of a block: horizontally into scratch rows, then vertically behind a pixel."""
    pooled, channels = q[POOLED], line(p[LISTS] + q[LIST] * 8, q[POOLED], np.int64)
    image = line(source, p[ROWS] * p[COLUMNS] * p[CHANNELS], np.float32)
    row_size = p[TARGET_COLUMNS] * pooled
    lines = line(scratch, p[HELD_ROWS] * row_size, np.float32)
    packed = line(scratch + p[HELD_ROWS] * row_size * 4, p[COLUMNS] * pooled, np.float32)
    for r in range(p[HELD_ROWS]):
        y = first + r
        if y < 0 or y >= p[ROWS]:
            continue
        for x in range(p[COLUMNS]):
            pixel = (y * p[COLUMNS] + x) * p[CHANNELS]
            for c in range(pooled):
                packed[x * pooled + c] = image[pixel + channels[c]]
        for o in range(p[TARGET_COLUMNS]):
            x = o * q[COLUMN_STRIDE] - p[LEFT] + q[FIRST_COLUMN]
            here, seen = r * row_size + o * pooled, 0
            for _ in range(q[POOL_WIDTH]):
                if 0 <= x < p[COLUMNS]:
                    combine(lines, here, packed, x * pooled, pooled, seen, q[MAXIMUM])
                    seen += 1
                x += 1
    out = line(held, p[HELD_ROWS] * p[HELD_COLUMNS] * p[WIDTH], np.float32)
    for o_row in range(p[BLOCK_ROWS]):
        for o in range(p[TARGET_COLUMNS]):
            start = o * q[COLUMN_STRIDE] - p[LEFT] + q[FIRST_COLUMN]
            wide = inside(start, q[POOL_WIDTH], p[COLUMNS])
            here = (o_row * p[STRIDE] * p[HELD_COLUMNS] + o * q[COLUMN_STRIDE]) * p[WIDTH]
            here += q[PLACE]
            r, high = o_row * p[STRIDE] + q[FIRST_ROW], 0
            for _ in range(q[POOL_HEIGHT]):
                if 0 <= first + r < p[ROWS] and wide:
                    combine(out, here, lines, r * row_size + o * pooled, pooled, high, q[MAXIMUM])
                    high += 1
                r += 1
            if high == 0 or not q[MAXIMUM]:
                share = np.float32(1) / np.float32(max(1, high * wide))
                for c in range(pooled):
                    out[here + c] = out[here + c] * share if high else np.float32(0)


@njit
def combine(target, to, source, at, numbers, seen, maximum):
    """The first number itself, then maxima (where a NaN stays) or sums."""
    if seen == 0:
        for c in range(numbers):
            target[to + c] = source[at + c]
    elif maximum:
        for c in range(numbers):
            new, old = source[at + c], target[to + c]
            target[to + c] = new if (new > old) | (new != new) else old
    else:
        for c in range(numbers):
            target[to + c] += source[at + c]


@njit
def inside(start, count, size):
    """How many of `count` places from `start` on are from 0 to below `size`."""
    return max(0, min(start + count, size) - max(start, 0))


@njit
def block(p, source, target, first_output, scratch):
    first = first_output * p[STRIDE] - p[TOP]
    if p[FILL] == IN_PLACE:
        held = source + first * p[COLUMNS] * p[CHANNELS] * 4
    else:
        held = scratch
        fill(p, source, held, first)
    for number in range(p[POOL_COUNT]):
        q = line(p[POOLS] + number * POOL * 8, POOL, np.int64)
        pool(p, q, source, held, first, scratch + p[POOL_SCRATCH])
    low = np.float32(0) if p[RELU] else _NONE
    positions = p[BLOCK_ROWS] * p[TARGET_COLUMNS]
    made = target + first_output * p[TARGET_COLUMNS] * p[OUTPUTS] * 4
    # fmt: off
    if p[WAIST]:
        waist = scratch + p[WAIST_SCRATCH]
        product(
            held, p[POSITIONS], waist, p[WAIST_PIXELS], positions,
            p[TABLE], p[COUNT], p[WEIGHTS], p[ZEROS], p[WAIST_WIDTH], _NONE,
        )
        product(
            waist, p[WAIST_PIXELS], made, p[TARGET_PIXELS], positions,
            p[RAMP], p[WAIST], p[EXPAND], p[BIAS], p[OUTPUTS], low,
        )
    else:
        product(
            held, p[POSITIONS], made, p[TARGET_PIXELS], positions,
            p[TABLE], p[COUNT], p[EXPAND], p[BIAS], p[OUTPUTS], low,
        )
    # fmt: on


@njit
def all_blocks(data):
    p = line(data, ARGUMENTS, np.int64)
    scratch = p[SCRATCH] + take(data + THREAD * 8) * p[SCRATCH_SIZE]
    if p[FILL] != IN_PLACE:
        zero(scratch, p[HELD_ROWS] * p[HELD_COLUMNS] * p[WIDTH])
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        image, part = unit // p[BLOCKS], unit % p[BLOCKS]
        # The last block overlaps the one before, so that all are of one size.
        first = min(part * p[BLOCK_ROWS], p[TARGET_ROWS] - p[BLOCK_ROWS])
        source = p[SOURCE] + image * p[ROWS] * p[COLUMNS] * p[CHANNELS] * 4
        target = p[TARGET] + image * p[TARGET_ROWS] * p[TARGET_COLUMNS] * p[OUTPUTS] * 4
        block(p, source, target, first, scratch)


def bottleneck_float32(data):
    all_blocks(address(data))
