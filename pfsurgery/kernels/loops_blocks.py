"""What bottlenecks of all kinds of numbers have in common: blocks of rows, their borders, pools.

Numba's cache on disk does not notice a change here, see CONTRIBUTING.md.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.loops_base import integer, line, take
from pfsurgery.kernels.loops_pool import (
    LINE,
    maxima_across,
    maxima_down,
    sums_across,
    sums_down,
)
from pfsurgery.kernels.vectors import LANES, SIZE

_NONE, _ZERO = np.float32(-np.inf), np.float32(0)


def blocks(size, block, clear):
    """All blocks of all images of numbers of `size` bytes, one by one, until none is left.

    Of small images a block holds several whole ones. `clear` zeroes once what `block` does not
    write, as far as it is read.
    """

    @njit
    def all_blocks(data, p, scratch):
        if p[at.FILL] != at.IN_PLACE:
            clear(p, scratch, size)
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
def clear_all(p, held, size):
    """Zero all that a block's images hold."""
    zero(held, p[at.GROUP] * p[at.HELD_ROWS] * p[at.HELD_COLUMNS] * p[at.WIDTH] * size)


@njit
def clear_sides(p, held, size):
    """Zero the padding on the left and on the right of a block's images."""
    pixel = p[at.WIDTH] * size
    right = p[at.LEFT] + p[at.COLUMNS]
    for _ in range(p[at.GROUP] * p[at.HELD_ROWS]):
        zero(held, p[at.LEFT] * pixel)
        zero(held + right * pixel, (p[at.HELD_COLUMNS] - right) * pixel)
        held += p[at.HELD_COLUMNS] * pixel


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


def pools(size, kind):
    """Pooled runs of numbers of a kind, of `size` bytes each."""

    @njit
    def pool(p, q, held, first, scratch):
        """One pooled run of a block, a vector of channels at a time, behind the channels.

        A row of windows one pixel wide lies in the scratch memory, with the padding around.
        """
        shares, row = scratch, scratch + p[at.TARGET_COLUMNS] * SIZE
        line(row, p[at.HELD_COLUMNS] * LANES, np.float32)[:] = _NONE if q[at.MAXIMUM] else _ZERO
        pixel, across = p[at.WIDTH] * size, q[at.COLUMN_STRIDE]
        pitch = p[at.HELD_COLUMNS] * pixel
        for vector in range(q[at.VECTORS]):
            channel = integer(p[at.LISTS], q[at.LIST] + vector)
            place = held + (q[at.PLACE] + vector * LANES) * size
            seen = -1
            for output in range(p[at.BLOCK_ROWS]):
                top = first + output * p[at.STRIDE] + q[at.FIRST_ROW]
                rows = inside(top, q[at.POOL_HEIGHT], p[at.ROWS])
                if rows != seen:
                    share_out(p, q, rows, shares)
                    seen = rows
                begin = (max(top, 0) - first) * pitch + p[at.LEFT] * pixel + channel * size
                # fmt: off
                row_of_windows(
                    kind, q[at.MAXIMUM], held + begin, pitch, rows, pixel,
                    p[at.COLUMNS], p[at.CHANNELS] - channel, row + p[at.LEFT] * LINE,
                    row + q[at.FIRST_COLUMN] * LINE, across * LINE, q[at.POOL_WIDTH], shares,
                    p[at.TARGET_COLUMNS], place + output * p[at.STRIDE] * pitch, across * pixel,
                )
                # fmt: on

    @njit
    def all_pools(p, held, first, scratch):
        """All pooled runs of all images of a block, which holds their channels already."""
        for image in range(p[at.GROUP]):
            there = held + image * p[at.HELD_ROWS] * p[at.HELD_COLUMNS] * p[at.WIDTH] * size
            for run in range(p[at.POOL_COUNT]):
                q = line(p[at.POOLS] + run * at.POOL * 8, at.POOL, np.int64)
                pool(p, q, there, first, scratch)

    return all_pools


@njit
def row_of_windows(
    kind, maximum, source, pitch, rows, pixel, columns, channels, row,
    first, step, width, shares, windows, target, place,
):  # fmt: skip
    """The windows of one row of outputs: what `rows` rows have, then across these."""
    if rows == 0:
        line(row, columns * LANES, np.float32)[:] = _NONE if maximum else _ZERO
    elif maximum:
        maxima_down(kind, source, pitch, rows, pixel, columns, channels, row)
    else:
        sums_down(kind, source, pitch, rows, pixel, columns, channels, row)
    if maximum:
        maxima_across(kind, first, step, width, shares, windows, target, place)
    else:
        sums_across(kind, first, step, width, shares, windows, target, place)


@njit
def share_out(p, q, rows, shares):
    """What each pixel of a window has of its average, where `rows` of its rows are inside."""
    made = line(shares, p[at.TARGET_COLUMNS], np.float32)
    for x in range(p[at.TARGET_COLUMNS]):
        left = x * q[at.COLUMN_STRIDE] - p[at.LEFT] + q[at.FIRST_COLUMN]
        pixels = rows * inside(left, q[at.POOL_WIDTH], p[at.COLUMNS])
        made[x] = np.float32(1) / np.float32(max(1, pixels))


@njit
def inside(start, count, size):
    """How many of `count` places from `start` on are from 0 to below `size`."""
    return max(0, min(start + count, size) - max(start, 0))
