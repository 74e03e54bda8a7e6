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
REDUCE, WEIGHTS, EXPAND, BIAS, ZEROS, RELU = range(7, 13)
PIXELS, HELD_PIXELS, POSITIONS, TARGET_PIXELS, WAIST_PIXELS = range(13, 18)
RAMP, TABLE, POOLS, LISTS = range(18, 22)
BLOCKS, BLOCK_ROWS, ROWS, COLUMNS, CHANNELS = range(22, 27)
TARGET_ROWS, TARGET_COLUMNS, OUTPUTS = range(27, 30)
STRIDE, TOP, LEFT, HELD_ROWS, HELD_COLUMNS, WIDTH, FILL = range(30, 37)
REDUCED, COUNT, WAIST, WAIST_WIDTH = range(37, 41)
WAIST_SCRATCH, POOL_COUNT, POOL_SCRATCH = range(41, 44)
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
    """One pooled run of a block: across each row, then down, then behind its pixel.

    The channels of a run are packed side by side with the padding around, so that every pass goes
    over a whole row at once; where columns are strided, those between are computed in vain.
    """
    pooled, size = q[POOLED], p[HELD_COLUMNS] * q[POOLED]
    length = ((p[TARGET_COLUMNS] - 1) * q[COLUMN_STRIDE] + 1) * pooled
    packed, column, lines = scratch, scratch + size * 8, scratch + size * 12
    shares = line(scratch + size * 4, size, np.float32)
    line(packed, size, np.float32)[:] = _NONE if q[MAXIMUM] else np.float32(0)
    for x in range(length // pooled):
        seen = inside(x - p[LEFT] + q[FIRST_COLUMN], q[POOL_WIDTH], p[COLUMNS])
        shares[x * pooled : (x + 1) * pooled] = np.float32(1) / np.float32(max(1, seen))
    for r in range(max(0, -first), min(p[HELD_ROWS], p[ROWS] - first)):
        row = source + (first + r) * p[COLUMNS] * p[CHANNELS] * 4
        pack(p, q, row, packed)
        made = lines + r * size * 4
        for k in range(q[POOL_WIDTH]):
            combine(made, packed + (q[FIRST_COLUMN] + k) * pooled * 4, length, k, q[MAXIMUM])
        if not q[MAXIMUM]:
            across = line(made, length, np.float32)
            for i in range(length):
                across[i] *= shares[i]
    for o in range(p[BLOCK_ROWS]):
        top = o * p[STRIDE] + q[FIRST_ROW]
        seen = 0
        for r in range(top, top + q[POOL_HEIGHT]):
            if 0 <= first + r < p[ROWS]:
                combine(column, lines + r * size * 4, length, seen, q[MAXIMUM])
                seen += 1
        share = np.float32(1) if q[MAXIMUM] else np.float32(1) / np.float32(max(1, seen))
        place = held + (o * p[STRIDE] * p[HELD_COLUMNS] * p[WIDTH] + q[PLACE]) * 4
        step = q[COLUMN_STRIDE]
        for x in range(p[TARGET_COLUMNS]):
            made = line(place + x * step * p[WIDTH] * 4, pooled, np.float32)
            down = line(column + x * step * pooled * 4, pooled, np.float32)
            for c in range(pooled):
                made[c] = down[c] * share


@njit
def pack(p, q, source, packed):
    """A run's channels of one row of the image, side by side behind the padding on the left."""
    pooled, channels = q[POOLED], line(p[LISTS] + q[LIST] * 8, q[POOLED], np.uint64)
    first, neighbours = channels[0], channels[pooled - 1] - channels[0] == pooled - 1
    for x in range(p[COLUMNS]):
        made = line(packed + (p[LEFT] + x) * pooled * 4, pooled, np.float32)
        pixel = source + x * p[CHANNELS] * 4
        if neighbours:
            read = line(pixel + np.int64(first) * 4, pooled, np.float32)
            for c in range(pooled):
                made[c] = read[c]
        else:
            read = line(pixel, p[CHANNELS], np.float32)
            for c in range(pooled):
                made[c] = read[channels[c]]


@njit
def combine(target, source, length, seen, maximum):
    """Make `target` the first row itself, then maxima (where a NaN stays) or sums."""
    made, read = line(target, length, np.float32), line(source, length, np.float32)
    if seen == 0:
        for i in range(length):
            made[i] = read[i]
    elif maximum:
        for i in range(length):
            new, old = read[i], made[i]
            made[i] = new if (new > old) | (new != new) else old
    else:
        for i in range(length):
            made[i] += read[i]


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
    positions = p[BLOCK_ROWS] * p[TARGET_COLUMNS]
    low = np.float32(0) if p[RELU] else _NONE
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
