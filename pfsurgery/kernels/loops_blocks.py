"""What bottlenecks of all kinds of numbers have in common: blocks of rows, their borders, pools.

Numba's cache on disk notices changes of the files with entry points only: who changes this one has
to touch `loops_bottleneck` and `loops_bottleneck_tiles`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.loops_base import line, take

_NONE = np.float32(-np.inf)


def blocks(size, block):
    """All blocks of all images of numbers of `size` bytes, one by one, until none is left.

    Of small images a block holds several whole ones.
    """

    @njit
    def all_blocks(data, p, scratch):
        if p[at.FILL] != at.IN_PLACE:
            held = p[at.HELD_ROWS] * p[at.HELD_COLUMNS] * p[at.WIDTH] * size
            zero(scratch, p[at.GROUP] * held)
        pixels, made = p[at.ROWS] * p[at.COLUMNS], p[at.TARGET_ROWS] * p[at.TARGET_COLUMNS]
        while True:
            unit = take(data)
            if unit >= p[at.UNITS]:
                return
            part = unit % p[at.BLOCKS]
            # The last block of rows or images overlaps the one before: all are of one size.
            image = min(unit // p[at.BLOCKS] * p[at.GROUP], p[at.IMAGES] - p[at.GROUP])
            first = min(part * p[at.BLOCK_ROWS], p[at.TARGET_ROWS] - p[at.BLOCK_ROWS])
            source = p[at.SOURCE] + image * pixels * p[at.CHANNELS] * size
            target = p[at.TARGET] + image * made * p[at.OUTPUTS] * size
            block(p, source, target, first, scratch)

    return all_blocks


@njit
def zero(target, count):
    line(target, count, np.uint8)[:] = 0


@njit
def borders(p, held, first, size):
    """Rows of the image that a block reads, from `first` on; those outside of it become zero."""
    begin = min(max(first, 0), first + p[at.HELD_ROWS])
    end = max(begin, min(first + p[at.HELD_ROWS], p[at.ROWS]))
    pitch = p[at.HELD_COLUMNS] * p[at.WIDTH] * size
    if begin > first:
        zero(held, (begin - first) * pitch)
    if end < first + p[at.HELD_ROWS]:
        zero(held + (end - first) * pitch, (first + p[at.HELD_ROWS] - end) * pitch)
    return begin, end


@njit
def hold(p, source, held, first, size):
    """Zero what is outside of a block's images, and copy their rows unless these are reduced.

    Returns which rows of an image the block reads: of those from `first` on, the ones that exist.
    """
    row = p[at.HELD_COLUMNS] * p[at.WIDTH] * size
    for image in range(p[at.GROUP]):
        there = held + image * p[at.HELD_ROWS] * row
        begin, end = borders(p, there, first, size)
        if begin < end and p[at.FILL] != at.REDUCTION:
            pixels = (image * p[at.ROWS] + begin) * p[at.COLUMNS]
            here = source + pixels * p[at.CHANNELS] * size
            copy(p, here, there + (begin - first) * row, end - begin, size)
    return begin, end


@njit
def copy(p, source, held, rows, size):
    """Rows of an image as they are, `held` being the place of the first one's."""
    channels, width = p[at.CHANNELS] * size, p[at.WIDTH] * size
    whole = p[at.COLUMNS] if channels == width else 1  # pixels that lie side by side on both sides
    count = channels * whole
    for row in range(rows):
        here = held + (row * p[at.HELD_COLUMNS] + p[at.LEFT]) * width
        for _ in range(0, p[at.COLUMNS], whole):
            made, read = line(here, count, np.uint8), line(source, count, np.uint8)
            for i in range(count):
                made[i] = read[i]
            source += count
            here += width * whole


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

    @njit
    def all_pools(p, source, held, first, scratch):
        """All pooled runs of all images of a block."""
        for image in range(p[at.GROUP]):
            here = source + image * p[at.ROWS] * p[at.COLUMNS] * p[at.CHANNELS] * size
            there = held + image * p[at.HELD_ROWS] * p[at.HELD_COLUMNS] * p[at.WIDTH] * size
            for run in range(p[at.POOL_COUNT]):
                q = line(p[at.POOLS] + run * at.POOL * 8, at.POOL, np.int64)
                pool(p, q, here, there, first, scratch)

    return all_pools


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
