"""Shift: groups of channels copied from another place."""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels.loops_base import (
    ARGUMENTS,
    AXIS,
    COLUMNS,
    COUNTS,
    FIRST,
    GROUP,
    LAST,
    NAME,
    POSITIONS,
    ROWS,
    SOURCE,
    STEP,
    STRIDE,
    TARGET,
    TARGET_COLUMNS,
    TARGET_ROWS,
    UNITS,
    address,
    integer,
    line,
    take,
)


@njit
def copy(dtype, source, target, length):
    out = line(target, length, dtype)
    if source == 0:
        for i in range(length):
            out[i] = 0
        return
    a = line(source, length, dtype)
    for i in range(length):
        out[i] = a[i]


@njit
def move_row(dtype, source, target, columns, axis_at, step, length):
    """One row of outputs, `length` of the `step` numbers of each pixel."""
    size = line(source, 1, dtype).itemsize
    axis = line(axis_at, AXIS, np.int64)
    positions = line(axis[POSITIONS], columns, np.int64)
    counts = line(axis[COUNTS], columns, np.int64)
    o = 0
    while o < columns:
        run = 1
        if step == 1 and axis[STRIDE] == 1 and axis[FIRST] <= o < axis[LAST]:
            run = axis[LAST] - o
        here = target + o * step * size
        if counts[o] == 0:
            copy(dtype, 0, here, length)
        else:
            copy(dtype, source + positions[o] * step * size, here, run * length)
        o += run


@njit
def moves(dtype, data):
    """Each group of channels from another place; planes, or rows of pixels, are the units.

    NAME has, for each of the GROUP groups, its last channel and the axes of its one tap. Where an
    image is a plane, its channel is its number modulo the number of channels.
    """
    p, size = line(data, ARGUMENTS, np.int64), line(data, 1, dtype).itemsize
    step, rows, columns = p[STEP], p[TARGET_ROWS], p[TARGET_COLUMNS]
    table = line(p[NAME], 3 * p[GROUP], np.int64)
    channels = table[3 * p[GROUP] - 3]
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        image = unit if step == 1 else unit // rows
        top, bottom = (0, rows) if step == 1 else (unit % rows, unit % rows + 1)
        begin = 0
        for group in range(p[GROUP]):
            end, down, across = table[3 * group], table[3 * group + 1], table[3 * group + 2]
            channel = image % channels
            if step == 1 and not begin <= channel < end:
                begin = end
                continue
            offset = 0 if step == 1 else begin
            length = 1 if step == 1 else end - begin
            begin = end
            for y in range(top, bottom):
                here = p[TARGET] + ((image * rows + y) * columns * step + offset) * size
                if integer(integer(down, COUNTS), y) == 0:
                    for x in range(columns if step > 1 else 1):
                        width = length if step > 1 else columns
                        copy(dtype, 0, here + x * step * size, width)
                    continue
                row = image * p[ROWS] + integer(integer(down, POSITIONS), y)
                source = p[SOURCE] + (row * p[COLUMNS] * step + offset) * size
                move_row(dtype, source, here, columns, across, step, length)


def moves_2(data):
    moves(np.uint16, address(data))


def moves_4(data):
    moves(np.uint32, address(data))


def moves_8(data):
    moves(np.uint64, address(data))
