"""Separable windows: maxima and weighted sums, horizontal pass first, then vertical."""

from __future__ import annotations

import numpy as np
from numba import njit

from pfsurgery.kernels.loops_base import (
    ACROSS,
    ARGUMENTS,
    AXIS,
    COLUMNS,
    COUNTS,
    DOWN,
    FIRST,
    GROUP,
    IMAGES,
    LAST,
    MOST,
    MOST_TAPS,
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
    WEIGHTS,
    address,
    integer,
    line,
    take,
)

# Numba compiles a function anew for arguments of other types, and drops branches on None. So an
# argument that is None chooses what is computed, at no cost in the loops: `weights` is None for a
# maximum and an address for a weighted sum.


@njit(forceinline=True)
def weights_of(weighted, axis, output):
    if weighted is None:
        return None
    return axis[WEIGHTS] + output * axis[MOST] * 8


@njit(forceinline=True)
def weight(weights, tap, dtype):
    if weights is None:
        return None
    return dtype(line(weights, tap + 1, np.float64)[tap])


@njit(forceinline=True)
def first(a, weight):
    if weight is None:
        return a
    return a * weight


@njit(forceinline=True)
def then(a, b, weight):
    """`a` and one more number; of equal maxima the first stays, as in ATen."""
    if weight is None:
        return b if b > a else a
    return a + b * weight


@njit
def mix_with_nan(dtype, taps, count, stride, target, target_stride, length):
    """Make `target` the maxima, where the last NaN beats everything, as in ATen."""
    out = line(target, length * target_stride, dtype)
    a = line(integer(taps, 0), length * stride, dtype)
    for i in range(length):
        out[i * target_stride] = a[i * stride]
    for k in range(1, count):
        b = line(integer(taps, k), length * stride, dtype)
        for i in range(length):
            new, old = b[i * stride], out[i * target_stride]
            out[i * target_stride] = new if (new > old) | (new != new) else old


@njit
def has_nan(address, length, dtype):
    values = line(address, length, dtype)
    found = False
    for i in range(length):
        found |= values[i] != values[i]
    return found


@njit
def mix(weights, dtype, taps, count, target, length):
    """Make `target` the rows at the addresses `taps`, combined; say whether one has a NaN.

    Of a maximum's rows the first alone is looked at: see `rest_has_nan`.
    """
    out = line(target, length, dtype)
    found = False
    if count == 0:
        out[:] = 0
        return found
    a = line(integer(taps, 0), length, dtype)
    wa = weight(weights, 0, dtype)
    if count == 1:
        for i in range(length):
            if weights is None:
                found |= a[i] != a[i]
            out[i] = first(a[i], wa)
        return found
    b = line(integer(taps, 1), length, dtype)
    wb = weight(weights, 1, dtype)
    if count == 2:
        for i in range(length):
            if weights is None:
                found |= a[i] != a[i]
            out[i] = then(first(a[i], wa), b[i], wb)
        return found
    c = line(integer(taps, 2), length, dtype)
    wc = weight(weights, 2, dtype)
    for i in range(length):
        if weights is None:
            found |= a[i] != a[i]
        out[i] = then(then(first(a[i], wa), b[i], wb), c[i], wc)
    for k in range(3, count):
        d = line(integer(taps, k), length, dtype)
        wd = weight(weights, k, dtype)
        for i in range(length):
            out[i] = then(out[i], d[i], wd)
    return found


@njit
def rest_has_nan(weights, dtype, taps, count, length):
    """Whether there is a NaN behind the end of the first of rows that overlap."""
    if weights is not None or count < 2:
        return False
    size = line(taps, 1, dtype).itemsize
    end = integer(taps, 0) + length * size
    behind = integer(taps, count - 1) + length * size
    return has_nan(end, (behind - end) // size, dtype)


@njit
def mix_every(weights, dtype, taps, count, stride, target, target_stride, length):
    """`mix` of every `stride`-th number, written to every `target_stride`-th place, watching."""
    out = line(target, length * target_stride, dtype)
    found = False
    for i in range(length):
        out[i * target_stride] = 0
    for k in range(count):
        b = line(integer(taps, k), length * stride, dtype)
        wb = weight(weights, k, dtype)
        for i in range(length):
            y = b[i * stride]
            found |= y != y
            if k == 0:
                out[i * target_stride] = first(y, wb)
            else:
                out[i * target_stride] = then(out[i * target_stride], y, wb)
    return found


@njit
def across(weighted, nan, dtype, source, target, begin, end, step, axis_at, taps):
    """Outputs `begin` to `end` of one row: the horizontal pass. Whether there was a NaN."""
    size = line(source, 1, dtype).itemsize
    axis, tap = line(axis_at, AXIS, np.int64), line(taps, MOST_TAPS, np.int64)
    most, stride = axis[MOST], axis[STRIDE]
    positions = line(axis[POSITIONS], end * most, np.int64)
    counts = line(axis[COUNTS], end, np.int64)
    found, one = False, np.int64(1)
    o = begin
    while o < end:
        run = 1
        if (stride == 1 or step == 1) and axis[FIRST] <= o < axis[LAST]:
            run = min(end, axis[LAST]) - o
        count = counts[o]
        for k in range(count):
            tap[k] = source + positions[o * most + k] * step * size
        here = target + (o - begin) * step * size
        weights = weights_of(weighted, axis, o)
        if nan and run > 1 and stride > 1:
            mix_with_nan(dtype, taps, count, stride, here, one, run)
        elif nan:
            mix_with_nan(dtype, taps, count, one, here, one, run * step)
        elif run == 1 or stride == 1:
            found |= mix(weights, dtype, taps, count, here, run * step)
            found |= rest_has_nan(weights, dtype, taps, count, run * step)
        else:
            found |= mix_every(weights, dtype, taps, count, stride, here, one, run)
        o += run
    return found


@njit
def strip(weighted, nan, dtype, data, source, target, begin, end, ring, taps):
    """Columns `begin` to `end` of one image, row by row.

    Horizontal results stay in a ring of as many rows as a window is high. Gives up, and says False,
    at a NaN that `nan` does not allow for.
    """
    size = line(source, 1, dtype).itemsize
    p, tap = line(data, ARGUMENTS, np.int64), line(taps, MOST_TAPS, np.int64)
    down, step = line(p[DOWN], AXIS, np.int64), p[STEP]
    most, span = down[MOST], down[SPAN]
    positions = line(down[POSITIONS], p[TARGET_ROWS] * most, np.int64)
    slots = line(down[SLOTS], p[TARGET_ROWS] * most, np.int64)
    counts = line(down[COUNTS], p[TARGET_ROWS], np.int64)
    pitch = (end - begin) * step * size
    made, slot, one = 0, 0, np.int64(1)
    for o in range(p[TARGET_ROWS]):
        count = counts[o]
        while count and made <= positions[o * most + count - 1]:
            row = source + made * p[COLUMNS] * step * size
            free = ring + slot * pitch
            found = across(weighted, nan, dtype, row, free, begin, end, step, p[ACROSS], taps)
            if found and weighted is None:
                return False
            made += 1
            slot = 0 if slot + 1 == span else slot + 1
        for k in range(count):
            tap[k] = ring + slots[o * most + k] * pitch
        here = target + (o * p[TARGET_COLUMNS] + begin) * step * size
        if nan:
            mix_with_nan(dtype, taps, count, one, here, one, (end - begin) * step)
        else:
            weights = weights_of(weighted, down, o)
            mix(weights, dtype, taps, count, here, (end - begin) * step)
    return True


@njit
def all_strips(weighted, dtype, data, ring, taps):
    p, size = line(data, ARGUMENTS, np.int64), line(data, 1, dtype).itemsize
    no, yes = np.int64(0), np.int64(1)  # a literal would be compiled for on its own
    parts = (p[TARGET_COLUMNS] + p[GROUP] - 1) // p[GROUP]
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        image, part = unit // parts, unit % parts
        source = p[SOURCE] + image * p[ROWS] * p[COLUMNS] * p[STEP] * size
        target = p[TARGET] + image * p[TARGET_ROWS] * p[TARGET_COLUMNS] * p[STEP] * size
        begin = part * p[GROUP]
        end = min(begin + p[GROUP], p[TARGET_COLUMNS])
        if not strip(weighted, no, dtype, data, source, target, begin, end, ring, taps):
            strip(weighted, yes, dtype, data, source, target, begin, end, ring, taps)


@njit
def plane(weighted, nan, dtype, data, source, target, images, margin, taps):
    """Whole planes of the same size in and out as one vector; their borders are mended after."""
    size = line(source, 1, dtype).itemsize
    p, tap = line(data, ARGUMENTS, np.int64), line(taps, MOST_TAPS, np.int64)
    rows, columns, pixels = p[ROWS], p[COLUMNS], p[ROWS] * p[COLUMNS]
    read, made = source, margin + integer(p[DOWN], SPAN) * columns * size
    pitch, outputs, axis = 1, columns, line(p[ACROSS], AXIS, np.int64)
    found, one = False, np.int64(1)
    for vertical in range(2):
        most, low, high = axis[MOST], axis[FIRST], axis[LAST]
        positions = line(axis[POSITIONS], outputs * most, np.int64)
        counts = line(axis[COUNTS], outputs, np.int64)
        if low < high:
            for k in range(most):
                tap[k] = read + positions[low * most + k] * pitch * size
            here = made + low * pitch * size
            length = images * pixels - (outputs - high + low) * pitch
            if nan:
                mix_with_nan(dtype, taps, most, one, here, one, length)
            else:
                weights = weights_of(weighted, axis, low)
                found |= mix(weights, dtype, taps, most, here, length)
                found |= rest_has_nan(weights, dtype, taps, most, length)
        for o in range(outputs):
            if low <= o < high:
                continue
            # A column crosses all rows; of a row, each pixel crosses all planes.
            lines, stride = (columns, pixels) if vertical else (1, columns)
            for i in range(lines):
                for k in range(counts[o]):
                    tap[k] = read + (positions[o * most + k] * pitch + i) * size
                here = made + (o * pitch + i) * size
                length = images * pixels // stride
                if nan:
                    mix_with_nan(dtype, taps, counts[o], stride, here, stride, length)
                else:
                    weights = weights_of(weighted, axis, o)
                    found |= mix_every(
                        weights, dtype, taps, counts[o], stride, here, stride, length
                    )
        if found and weighted is None:
            return False
        read, made = made, target
        pitch, outputs, axis = columns, rows, line(p[DOWN], AXIS, np.int64)
    return True


@njit
def all_planes(weighted, dtype, data, buffer, taps):
    p, size = line(data, ARGUMENTS, np.int64), line(data, 1, dtype).itemsize
    no, yes = np.int64(0), np.int64(1)  # a literal would be compiled for on its own
    pixels = p[ROWS] * p[COLUMNS]
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        begin = unit * p[GROUP]
        images = min(p[GROUP], p[IMAGES] - begin)
        source, target = p[SOURCE] + begin * pixels * size, p[TARGET] + begin * pixels * size
        if not plane(weighted, no, dtype, data, source, target, images, buffer, taps):
            plane(weighted, yes, dtype, data, source, target, images, buffer, taps)


@njit
def strips(weighted, dtype, data):
    """A separable window over images, in strips of GROUP columns whose ring fits into the cache."""
    p = line(data, ARGUMENTS, np.int64)
    ring = np.empty(integer(p[DOWN], SPAN) * p[GROUP] * p[STEP], dtype)
    taps = np.empty(MOST_TAPS, np.int64)
    all_strips(weighted, dtype, data, np.int64(ring.ctypes.data), np.int64(taps.ctypes.data))
    return ring, taps  # read here, so that both live till then


@njit
def planes(weighted, dtype, data):
    """A separable window over images of one number a pixel, GROUP of them at a time."""
    p = line(data, ARGUMENTS, np.int64)
    margin = 2 * integer(p[DOWN], SPAN) * p[COLUMNS]
    buffer = np.empty(p[GROUP] * p[ROWS] * p[COLUMNS] + margin, dtype)
    taps = np.empty(MOST_TAPS, np.int64)
    all_planes(weighted, dtype, data, np.int64(buffer.ctypes.data), np.int64(taps.ctypes.data))
    return buffer, taps  # read here, so that both live till then


# Entry points. Each is compiled when it is first wanted, and kept on disk.


def max_strips_float32(data):
    strips(None, np.float32, address(data))


def max_strips_float64(data):
    strips(None, np.float64, address(data))


def max_planes_float32(data):
    planes(None, np.float32, address(data))


def max_planes_float64(data):
    planes(None, np.float64, address(data))


def sum_strips_float32(data):
    strips(True, np.float32, address(data))


def sum_strips_float64(data):
    strips(True, np.float64, address(data))


def sum_planes_float32(data):
    planes(True, np.float32, address(data))


def sum_planes_float64(data):
    planes(True, np.float64, address(data))
