"""A whole bottleneck, image by image in blocks of rows: reduce, operate, expand in the cache.

What the middle reads is held in scratch memory, padded, one block with its halo at a time: the
reduced channels, or a copy of the input, with pooled columns behind the channels of each pixel.
`loops_bottleneck_tiles` pools by it too and has to be touched when it changes, as Numba's cache on
disk does not notice.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.loops_base import address, line, take
from pfsurgery.kernels.loops_product import product

_NONE = np.float32(-np.inf)


@njit
def zero(target, numbers):
    line(target, numbers, np.float32)[:] = 0


@njit
def fill(p, source, held, first):
    """What one block reads: rows from `first` on, those outside of the image zero."""
    begin = min(max(first, 0), first + p[at.HELD_ROWS])
    end = max(begin, min(first + p[at.HELD_ROWS], p[at.ROWS]))
    pitch = p[at.HELD_COLUMNS] * p[at.WIDTH] * 4
    if begin > first:
        zero(held, (begin - first) * p[at.HELD_COLUMNS] * p[at.WIDTH])
    if end < first + p[at.HELD_ROWS]:
        here = held + (end - first) * pitch
        zero(here, (first + p[at.HELD_ROWS] - end) * p[at.HELD_COLUMNS] * p[at.WIDTH])
    if begin >= end:
        return
    source += begin * p[at.COLUMNS] * p[at.CHANNELS] * 4
    if p[at.FILL] == at.REDUCTION:
        places = p[at.HELD_PIXELS] + (begin - first) * p[at.COLUMNS] * 8
        pixels = (end - begin) * p[at.COLUMNS]
        # fmt: off
        product(
            source, p[at.PIXELS], held, places, pixels,
            p[at.RAMP], p[at.CHANNELS], p[at.REDUCE], p[at.ZEROS], p[at.REDUCED], _NONE,
        )
        # fmt: on
        return
    channels, width = p[at.CHANNELS], p[at.WIDTH]
    whole = p[at.COLUMNS] if channels == width else 1  # pixels that lie side by side on both sides
    numbers = channels * whole
    for row in range(end - begin):
        here = held + (begin - first + row) * pitch + p[at.LEFT] * width * 4
        for _ in range(0, p[at.COLUMNS], whole):
            read = line(source, numbers, np.float32)
            made = line(here, numbers, np.float32)
            for c in range(numbers):
                made[c] = read[c]
            source += numbers * 4
            here += width * whole * 4


def pools(size, read, write):
    """Pooled runs of numbers of `size` bytes; `read` makes float32 of them, `write` reverses it."""

    @njit
    def pack(p, q, source, packed):
        """A run's channels of one row of the image, side by side behind the padding on the left."""
        pooled, channels = q[at.POOLED], line(p[at.LISTS] + q[at.LIST] * 8, q[at.POOLED], np.uint64)
        first, neighbours = np.int64(channels[0]), channels[pooled - 1] - channels[0] == pooled - 1
        for x in range(p[at.COLUMNS]):
            made = line(packed + (p[at.LEFT] + x) * pooled * 4, pooled, np.float32)
            pixel = source + x * p[at.CHANNELS] * size
            if neighbours:
                for c in range(pooled):
                    made[c] = read(pixel, first + c)
            else:
                for c in range(pooled):
                    made[c] = read(pixel, channels[c])

    @njit
    def pool(p, q, source, held, first, scratch):
        """One pooled run of a block: across each row, then down, then behind its pixel.

        The channels of a run are packed side by side with the padding around, so that every pass
        goes over a whole row at once; where columns are strided, those between are computed in
        vain.
        """
        pooled, width = q[at.POOLED], p[at.HELD_COLUMNS] * q[at.POOLED]
        length = ((p[at.TARGET_COLUMNS] - 1) * q[at.COLUMN_STRIDE] + 1) * pooled
        packed, column, lines = scratch, scratch + width * 8, scratch + width * 12
        shares = line(scratch + width * 4, width, np.float32)
        line(packed, width, np.float32)[:] = _NONE if q[at.MAXIMUM] else np.float32(0)
        for x in range(length // pooled):
            seen = inside(x - p[at.LEFT] + q[at.FIRST_COLUMN], q[at.POOL_WIDTH], p[at.COLUMNS])
            shares[x * pooled : (x + 1) * pooled] = np.float32(1) / np.float32(max(1, seen))
        for r in range(max(0, -first), min(p[at.HELD_ROWS], p[at.ROWS] - first)):
            row = source + (first + r) * p[at.COLUMNS] * p[at.CHANNELS] * size
            pack(p, q, row, packed)
            made = lines + r * width * 4
            for k in range(q[at.POOL_WIDTH]):
                combine(
                    made, packed + (q[at.FIRST_COLUMN] + k) * pooled * 4, length, k, q[at.MAXIMUM]
                )
            if not q[at.MAXIMUM]:
                across = line(made, length, np.float32)
                for i in range(length):
                    across[i] *= shares[i]
        for o in range(p[at.BLOCK_ROWS]):
            top = o * p[at.STRIDE] + q[at.FIRST_ROW]
            seen = 0
            for r in range(top, top + q[at.POOL_HEIGHT]):
                if 0 <= first + r < p[at.ROWS]:
                    combine(column, lines + r * width * 4, length, seen, q[at.MAXIMUM])
                    seen += 1
            share = np.float32(1) if q[at.MAXIMUM] else np.float32(1) / np.float32(max(1, seen))
            place = (
                held + (o * p[at.STRIDE] * p[at.HELD_COLUMNS] * p[at.WIDTH] + q[at.PLACE]) * size
            )
            step = q[at.COLUMN_STRIDE]
            for x in range(p[at.TARGET_COLUMNS]):
                down = column + x * step * pooled * 4
                write(place + x * step * p[at.WIDTH] * size, down, pooled, share)

    return pool


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
def read(pixel, place):
    return line(pixel, place + 1, np.float32)[place]


@njit
def write(target, source, count, share):
    made, found = line(target, count, np.float32), line(source, count, np.float32)
    for c in range(count):
        made[c] = found[c] * share


pool = pools(4, read, write)


@njit
def block(p, source, target, first_output, scratch):
    first = first_output * p[at.STRIDE] - p[at.TOP]
    if p[at.FILL] == at.IN_PLACE:
        held = source + first * p[at.COLUMNS] * p[at.CHANNELS] * 4
    else:
        held = scratch
        fill(p, source, held, first)
    for run in range(p[at.POOL_COUNT]):
        q = line(p[at.POOLS] + run * at.POOL * 8, at.POOL, np.int64)
        pool(p, q, source, held, first, scratch + p[at.POOL_SCRATCH])
    positions = p[at.BLOCK_ROWS] * p[at.TARGET_COLUMNS]
    low = np.float32(0) if p[at.RELU] else _NONE
    made = target + first_output * p[at.TARGET_COLUMNS] * p[at.OUTPUTS] * 4
    # fmt: off
    if p[at.WAIST]:
        waist = scratch + p[at.WAIST_SCRATCH]
        product(
            held, p[at.POSITIONS], waist, p[at.WAIST_PIXELS], positions,
            p[at.TABLE], p[at.COUNT], p[at.WEIGHTS], p[at.ZEROS], p[at.WAIST_WIDTH], _NONE,
        )
        product(
            waist, p[at.WAIST_PIXELS], made, p[at.TARGET_PIXELS], positions,
            p[at.RAMP], p[at.WAIST], p[at.EXPAND], p[at.BIAS], p[at.OUTPUTS], low,
        )
    else:
        product(
            held, p[at.POSITIONS], made, p[at.TARGET_PIXELS], positions,
            p[at.TABLE], p[at.COUNT], p[at.EXPAND], p[at.BIAS], p[at.OUTPUTS], low,
        )
    # fmt: on


@njit
def all_blocks(data):
    p = line(data, at.ARGUMENTS, np.int64)
    scratch = p[at.SCRATCH] + take(data + at.THREAD * 8) * p[at.SCRATCH_SIZE]
    if p[at.FILL] != at.IN_PLACE:
        zero(scratch, p[at.HELD_ROWS] * p[at.HELD_COLUMNS] * p[at.WIDTH])
    while True:
        unit = take(data)
        if unit >= p[at.UNITS]:
            return
        image, part = unit // p[at.BLOCKS], unit % p[at.BLOCKS]
        # The last block overlaps the one before, so that all are of one size.
        first = min(part * p[at.BLOCK_ROWS], p[at.TARGET_ROWS] - p[at.BLOCK_ROWS])
        source = p[at.SOURCE] + image * p[at.ROWS] * p[at.COLUMNS] * p[at.CHANNELS] * 4
        target = p[at.TARGET] + image * p[at.TARGET_ROWS] * p[at.TARGET_COLUMNS] * p[at.OUTPUTS] * 4
        block(p, source, target, first, scratch)


def bottleneck_float32(data):
    all_blocks(address(data))
