"""Max-pool for training: which tap each maximum came from, and the gradient by it."""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels.loops_base import (
    ACROSS,
    ARGUMENTS,
    AXIS,
    COLUMNS,
    COUNTS,
    DILATION,
    DOWN,
    FIRST,
    GROUP,
    IMAGES,
    KERNEL,
    LAST,
    MOST,
    MOST_TAPS,
    NAME,
    NAMES,
    PADDING,
    POSITIONS,
    ROWS,
    SLOTS,
    SOURCE,
    SPAN,
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
def pick_three(dtype, taps, tap_names, names, scale, out, name, length):
    """`pick` of three taps in one go, the usual case."""
    a = line(integer(taps, 0), length, dtype)
    b = line(integer(taps, 1), length, dtype)
    c = line(integer(taps, 2), length, dtype)
    own = np.uint8(integer(names, 0) * scale)
    step = np.uint8(scale)
    if integer(tap_names, 0) == 0:
        for i in range(length):
            x, y, z = a[i], b[i], c[i]
            second = (y > x) | (y != y)
            best = y if second else x
            third = (z > best) | (z != z)
            out[i] = z if third else best
            name[i] = own + (np.uint8(2) if third else np.uint8(second))
        return
    a_name = line(integer(tap_names, 0), length, np.uint8)
    b_name = line(integer(tap_names, 1), length, np.uint8)
    c_name = line(integer(tap_names, 2), length, np.uint8)
    for i in range(length):
        x, y, z = a[i], b[i], c[i]
        nx, ny, nz = a_name[i], b_name[i] + step, c_name[i] + step + step
        second = (y > x) | (y != y)
        best, inner = (y, ny) if second else (x, nx)
        third = (z > best) | (z != z)
        out[i] = z if third else best
        name[i] = own + (nz if third else inner)


@njit
def pick(dtype, taps, tap_names, names, scale, count, target, target_name, length):
    """Maxima and which tap each came from, by ATen's rule: the first of equal ones, the last NaN.

    A tap's name is `scale` times its own number in `names`, plus what stands in the row of bytes
    at `tap_names` where the taps are themselves maxima (0 where they are not).
    """
    out, name = line(target, length, dtype), line(target_name, length, np.uint8)
    if count == 3:
        pick_three(dtype, taps, tap_names, names, scale, out, name, length)
        return
    for k in range(count):
        b = line(integer(taps, k), length, dtype)
        own = np.uint8(integer(names, k) * scale)
        inner = integer(tap_names, k)
        n = line(inner, length, np.uint8)
        if k == 0:
            for i in range(length):
                out[i] = b[i]
            for i in range(length):
                name[i] = own
            if inner != 0:
                for i in range(length):
                    name[i] += n[i]
        elif inner == 0:
            for i in range(length):
                new, old, old_name = b[i], out[i], name[i]
                better = (new > old) | (new != new)
                name[i] = own if better else old_name
                out[i] = new if better else old
        else:
            for i in range(length):
                new, old, new_name, old_name = b[i], out[i], np.uint8(own + n[i]), name[i]
                better = (new > old) | (new != new)
                name[i] = new_name if better else old_name
                out[i] = new if better else old


@njit
def pick_across(dtype, source, target, target_name, step, outputs, axis_at, taps):
    """The horizontal pass of one row, with names."""
    size = line(source, 1, dtype).itemsize
    axis, tap = line(axis_at, AXIS, np.int64), line(taps, 2 * MOST_TAPS, np.int64)
    tap[MOST_TAPS:] = 0
    most = axis[MOST]
    positions = line(axis[POSITIONS], outputs * most, np.int64)
    o = 0
    while o < outputs:
        run = 1
        if axis[STRIDE] == 1 and axis[FIRST] <= o < axis[LAST]:
            run = axis[LAST] - o
        count = integer(axis[COUNTS], o)
        for k in range(count):
            tap[k] = source + positions[o * most + k] * step * size
        names, zeros = axis[NAMES] + o * most * 8, taps + 8 * MOST_TAPS
        here, name = target + o * step * size, target_name + o * step
        pick(dtype, taps, zeros, names, 1, count, here, name, run * step)
        o += run


@njit
def all_picks(dtype, data, ring, ring_name, taps):
    p, size = line(data, ARGUMENTS, np.int64), line(data, 1, dtype).itemsize
    down, tap = line(p[DOWN], AXIS, np.int64), line(taps, 2 * MOST_TAPS, np.int64)
    kernel_width = integer(p[ACROSS], KERNEL)
    most, span, rows = down[MOST], down[SPAN], p[TARGET_ROWS]
    width = p[TARGET_COLUMNS] * p[STEP]
    positions = line(down[POSITIONS], rows * most, np.int64)
    slots = line(down[SLOTS], rows * most, np.int64)
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        parts = (rows + p[GROUP] - 1) // p[GROUP]
        image, begin = unit // parts, unit % parts * p[GROUP]
        source = p[SOURCE] + image * p[ROWS] * p[COLUMNS] * p[STEP] * size
        made = positions[begin * most] if begin * down[STRIDE] > span else 0
        for o in range(begin, min(begin + p[GROUP], rows)):
            count = integer(down[COUNTS], o)
            while made <= positions[o * most + count - 1]:
                row = source + made * p[COLUMNS] * p[STEP] * size
                slot = made % span * width
                free, free_name = ring + slot * size, ring_name + slot
                pick_across(
                    dtype, row, free, free_name, p[STEP], p[TARGET_COLUMNS], p[ACROSS], taps
                )
                made += 1
            for k in range(count):
                tap[k] = ring + slots[o * most + k] * width * size
                tap[MOST_TAPS + k] = ring_name + slots[o * most + k] * width
            names = down[NAMES] + o * most * 8
            place = (image * rows + o) * width
            here, name = p[TARGET] + place * size, p[NAME] + place
            pick(dtype, taps, taps + 8 * MOST_TAPS, names, kernel_width, count, here, name, width)


@njit
def picks(dtype, data):
    """Max-pool with the tap that each maximum came from, in one byte; GROUP rows at a time."""
    p = line(data, ARGUMENTS, np.int64)
    numbers = integer(p[DOWN], SPAN) * p[TARGET_COLUMNS] * p[STEP]
    ring, ring_name = np.empty(numbers, dtype), np.empty(numbers, np.uint8)
    taps = np.empty(2 * MOST_TAPS, np.int64)
    all_picks(
        dtype,
        data,
        np.int64(ring.ctypes.data),
        np.int64(ring_name.ctypes.data),
        np.int64(taps.ctypes.data),
    )
    return ring, ring_name, taps  # read here, so that they live till then


@njit
def gather_row(dtype, gradient, names, name, length, target):
    """Add the gradients of those windows whose maximum was tap `name`."""
    g, n = line(gradient, length, dtype), line(names, length, np.uint8)
    out, wanted = line(target, length, dtype), np.uint8(name)
    for i in range(length):
        new, mine = g[i], n[i] == wanted
        out[i] += new if mine else dtype(0)


@njit
def gathers(dtype, data):
    """Gradient of a max-pool with stride 1: each pixel asks the windows that could have taken it.

    SOURCE has the gradients of the outputs, TARGET gets those of the inputs, whose rows are the
    units. No two threads write to one row, and each sum has the order of ATen's.
    """
    p, size = line(data, ARGUMENTS, np.int64), line(data, 1, dtype).itemsize
    down, sideways = line(p[DOWN], AXIS, np.int64), line(p[ACROSS], AXIS, np.int64)
    step, columns = p[STEP], p[COLUMNS]
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        for row in range(unit * p[GROUP], min((unit + 1) * p[GROUP], p[IMAGES] * p[ROWS])):
            image, y = row // p[ROWS], row % p[ROWS]
            target = p[TARGET] + row * columns * step * size
            line(target, columns * step, dtype)[:] = 0
            for i in range(down[KERNEL] - 1, -1, -1):
                o = y + down[PADDING] - i * down[DILATION]
                if o < 0 or o >= p[TARGET_ROWS]:
                    continue
                outputs = (image * p[TARGET_ROWS] + o) * p[TARGET_COLUMNS]
                tap = i * sideways[KERNEL]
                width, left = p[TARGET_COLUMNS], sideways[PADDING]
                for j in range(sideways[KERNEL] - 1, -1, -1):
                    shift = j * sideways[DILATION] - left
                    begin = max(0, shift)
                    end = min(columns, width + shift)
                    if begin >= end:
                        continue
                    read = (outputs + begin - shift) * step
                    here = target + begin * step * size
                    length = (end - begin) * step
                    gather_row(
                        dtype, p[SOURCE] + read * size, p[NAME] + read, tap + j, length, here
                    )


@njit
def scatters(dtype, data):
    """Gradient of any max-pool: whole images, or GROUP of their channels, belong to one thread."""
    p = line(data, ARGUMENTS, np.int64)
    down, sideways = line(p[DOWN], AXIS, np.int64), line(p[ACROSS], AXIS, np.int64)
    step, columns, outputs = p[STEP], p[COLUMNS], p[TARGET_ROWS] * p[TARGET_COLUMNS]
    parts = (step + p[GROUP] - 1) // p[GROUP]
    pixels = p[ROWS] * columns
    gradients = line(p[SOURCE], p[IMAGES] * outputs * step, dtype)
    names = line(p[NAME], p[IMAGES] * outputs * step, np.uint8)
    target = line(p[TARGET], p[IMAGES] * pixels * step, dtype)
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        image, begin = unit // parts, unit % parts * p[GROUP]
        end = min(begin + p[GROUP], step)
        for pixel in range(image * pixels, (image + 1) * pixels):
            for c in range(begin, end):
                target[pixel * step + c] = 0
        for o in range(outputs):
            top = o // p[TARGET_COLUMNS] * down[STRIDE] - down[PADDING]
            left = o % p[TARGET_COLUMNS] * sideways[STRIDE] - sideways[PADDING]
            for c in range(begin, end):
                place = (image * outputs + o) * step + c
                y = top + names[place] // sideways[KERNEL] * down[DILATION]
                x = left + names[place] % sideways[KERNEL] * sideways[DILATION]
                target[((image * p[ROWS] + y) * columns + x) * step + c] += gradients[place]


# Entry points. Each is compiled when it is first wanted, and kept on disk.


def picks_float32(data):
    picks(np.float32, address(data))


def picks_float64(data):
    picks(np.float64, address(data))


def gathers_float32(data):
    gathers(np.float32, address(data))


def gathers_float64(data):
    gathers(np.float64, address(data))


def scatters_float32(data):
    scatters(np.float32, address(data))


def scatters_float64(data):
    scatters(np.float64, address(data))
