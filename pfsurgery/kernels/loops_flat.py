"""Windows of 3x3 at stride 1, and shifts of planes, by passes over whole rows of all images."""

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
    GROUP,
    IMAGES,
    MOST,
    NAME,
    PADDING,
    POSITIONS,
    ROWS,
    SOURCE,
    STEP,
    TARGET,
    UNITS,
    WEIGHTS,
    address,
    integer,
    line,
    take,
)
from pfsurgery.kernels.loops_passes import (
    asked,
    careful_maxima,
    maxima,
    moved,
    named,
    named_again,
    sums,
)
from pfsurgery.kernels.vectors import BFLOAT16, FLOAT16, FLOAT32, LANES, SIZE


@njit
def weights_at(axis_at, output, weights):
    """The weights of an output's taps before it, at it and behind it."""
    axis = line(axis_at, AXIS, np.int64)
    at = output * axis[MOST]
    count = integer(axis[COUNTS], output)
    before = integer(axis[POSITIONS], at) == output - 1
    found = line(axis[WEIGHTS], at + count, np.float64)
    for k in range(count):
        weights[k if before else k + 1] = found[at + k]


@njit
def all_weights(axis_at, size, weights):
    """Those of the first output, of one inside, and of the last."""
    weights_at(axis_at, np.int64(0), weights[:3])
    weights_at(axis_at, min(np.int64(1), size - 1), weights[3:6])
    weights_at(axis_at, size - 1, weights[6:])


@njit
def flat(weighted, kind, data):
    """GROUP rows of all images at a time: across into a buffer, then down out of it."""
    p = line(data, ARGUMENTS, np.int64)
    width, rows = p[COLUMNS] * p[STEP], p[IMAGES] * p[ROWS]
    pitch = width * line(data, 1, kind).itemsize
    buffer = np.empty((p[GROUP] + 2) * width, np.float32)
    across, down = np.zeros(9, np.float32), np.zeros(9, np.float32)
    held = np.int64(buffer.ctypes.data)
    if weighted is not None:
        all_weights(p[ACROSS], p[COLUMNS], across)
        all_weights(p[DOWN], p[ROWS], down)
    of_across, of_down = np.int64(across.ctypes.data), np.int64(down.ctypes.data)
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return buffer, across, down  # read here, so that they live till then
        begin = unit * p[GROUP]
        end = min(begin + p[GROUP], rows)
        top, bottom = max(begin - 1, 0), min(end + 1, rows)
        source, target = p[SOURCE] + top * pitch, p[TARGET] + begin * pitch
        middle, place = held + (begin - top) * width * SIZE, begin % p[ROWS] * width
        read, made = (bottom - top) * width, (end - begin) * width
        none, step, period = np.int64(0), p[STEP], p[ROWS] * width
        if weighted is None:
            found = maxima(kind, FLOAT32, source, held, read, none, step, width, of_across)
            maxima(FLOAT32, kind, middle, target, made, place, width, period, of_down)
            if found:
                careful_maxima(kind, FLOAT32, source, held, read, none, step, width, of_across)
                careful_maxima(FLOAT32, kind, middle, target, made, place, width, period, of_down)
        else:
            sums(kind, FLOAT32, source, held, read, none, step, width, of_across)
            sums(FLOAT32, kind, middle, target, made, place, width, period, of_down)


@njit
def flat_picks(kind, data):
    """Max-pool with the tap that each maximum came from, GROUP rows of all images at a time."""
    p = line(data, ARGUMENTS, np.int64)
    width, rows = p[COLUMNS] * p[STEP], p[IMAGES] * p[ROWS]
    buffer = np.empty((p[GROUP] + 2) * width, np.float32)
    names = np.empty((p[GROUP] + 4) * width + LANES, np.uint8)  # a row is read beyond either end
    size = line(data, 1, kind).itemsize
    held, held_names = np.int64(buffer.ctypes.data), np.int64(names.ctypes.data) + width
    none = np.int64(0)
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return buffer, names  # read here, so that they live till then
        begin = unit * p[GROUP]
        end = min(begin + p[GROUP], rows)
        top, bottom = max(begin - 1, 0), min(end + 1, rows)
        source, skipped = p[SOURCE] + top * width * size, (begin - top) * width
        read = (bottom - top) * width
        named(kind, FLOAT32, source, none, held, held_names, read, none, p[STEP], width)
        # fmt: off
        named_again(
            FLOAT32, kind, held + skipped * SIZE, held_names + skipped,
            p[TARGET] + begin * width * size, p[NAME] + begin * width,
            (end - begin) * width, begin % p[ROWS] * width, width, p[ROWS] * width,
        )
        # fmt: on


@njit
def flat_gathers(kind, data):
    """Gradient of `flat_picks`; SOURCE has the gradients of outputs, TARGET gets the inputs'."""
    p = line(data, ARGUMENTS, np.int64)
    width, rows = p[COLUMNS] * p[STEP], p[IMAGES] * p[ROWS]
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        begin, end = unit * p[GROUP], min((unit + 1) * p[GROUP], rows)
        # fmt: off
        asked(
            kind, p[SOURCE], p[NAME], p[TARGET], begin * width, end * width, rows * width,
            p[STEP], width,
        )
        # fmt: on


@njit
def flat_moves(kind, data):
    """A shift of planes: a unit is the channels of one group in one image.

    NAME has, for each of the GROUP groups, its last channel and the axes of its one tap.
    """
    p = line(data, ARGUMENTS, np.int64)
    groups, plane, size = p[GROUP], p[ROWS] * p[COLUMNS], line(data, 1, kind).itemsize
    table = line(p[NAME], 3 * groups, np.int64)
    channels = table[3 * groups - 3]
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        image, group = unit // groups, unit % groups
        begin = table[3 * group - 3] if group else 0
        down = -integer(table[3 * group + 1], PADDING)
        across = -integer(table[3 * group + 2], PADDING)
        at, length = (image * channels + begin) * plane * size, (table[3 * group] - begin) * plane
        moved(kind, p[SOURCE] + at, p[TARGET] + at, length, down, across, p[COLUMNS], plane)


def max_flat_float32(data):
    flat(None, FLOAT32, address(data))


def sum_flat_float32(data):
    flat(True, FLOAT32, address(data))


def picks_flat_float32(data):
    flat_picks(FLOAT32, address(data))


def gathers_flat_float32(data):
    flat_gathers(FLOAT32, address(data))


def max_flat_bfloat16(data):
    flat(None, BFLOAT16, address(data))


def sum_flat_bfloat16(data):
    flat(True, BFLOAT16, address(data))


def picks_flat_bfloat16(data):
    flat_picks(BFLOAT16, address(data))


def gathers_flat_bfloat16(data):
    flat_gathers(BFLOAT16, address(data))


def max_flat_float16(data):
    flat(None, FLOAT16, address(data))


def sum_flat_float16(data):
    flat(True, FLOAT16, address(data))


def picks_flat_float16(data):
    flat_picks(FLOAT16, address(data))


def gathers_flat_float16(data):
    flat_gathers(FLOAT16, address(data))


def moves_flat_4(data):
    flat_moves(FLOAT32, address(data))


def moves_flat_2(data):
    flat_moves(FLOAT16, address(data))
