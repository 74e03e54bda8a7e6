"""Shift where a pixel's channels lie side by side: vectors put together from several pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

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
from pfsurgery.kernels.vectors import (
    FLOAT16,
    FLOAT32,
    INTEGER,
    LANES,
    at,
    bytes_of,
    first_lanes,
    load,
    raw,
    store,
)


@intrinsic
def blend(
    typing_context: Any,
    kind: Any,
    places: Any,
    lanes: Any,
    most: Any,
    target: Any,
    length: Any,
    pixels: Any,
    source_pitch: Any,
    target_pitch: Any,
) -> Any:
    """`length` numbers at `target` of each pixel: vectors of `most` pieces each.

    `places` and `lanes` are addresses of two tables (vectors, most): where lane 0 of a piece is at
    the first pixel, and bits of the lanes that it gives; lanes of no piece are 0. `most` is a
    power of 2 of at most LANES; pitches are bytes.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places, lanes, most, target, length, pixels, source_pitch, target_pitch = args[1:]
        bits, flags = ir.IntType(LANES), ir.VectorType(ir.IntType(1), LANES)
        width, size = (ir.Constant(INTEGER, LANES * n) for n in (1, bytes_of(kind)))
        whole = builder.udiv(length, width)
        rest = first_lanes(builder, builder.urem(length, width))
        ragged = builder.icmp_signed("<", builder.mul(whole, width), length)

        def vector_of(pieces: int, number: Any, moved: Any) -> Any:
            row = builder.mul(number, ir.Constant(INTEGER, 8 * pieces))
            sources, masks, made = builder.add(places, row), builder.add(lanes, row), None
            for piece in range(0, 8 * pieces, 8):
                source = builder.load(at(builder, sources, piece, INTEGER))
                mask = builder.trunc(builder.load(at(builder, masks, piece, INTEGER)), bits)
                mask = builder.bitcast(mask, flags)
                place = builder.add(source, moved)
                made = load(builder, place, 0, mask, kind=raw(kind), rest=made)
            return made

        def fill(pieces: int) -> None:
            with cgutils.for_range(builder, pixels, intp=INTEGER) as pixel:
                moved = builder.mul(pixel.index, source_pitch)
                here = builder.add(target, builder.mul(pixel.index, target_pitch))
                with cgutils.for_range(builder, whole, intp=INTEGER) as vector:
                    there = builder.mul(vector.index, size)
                    made = vector_of(pieces, vector.index, moved)
                    store(builder, made, builder.add(here, there))
                with builder.if_then(ragged):
                    there = builder.mul(whole, size)
                    made = vector_of(pieces, whole, moved)
                    store(builder, made, builder.add(here, there), 0, rest)

        pieces = 1
        while pieces <= LANES:
            with builder.if_then(builder.icmp_signed("==", most, ir.Constant(INTEGER, pieces))):
                fill(pieces)
            pieces *= 2
        return context.get_dummy_value()

    return types.none(kind, *[types.int64] * 8), generate


@njit
def pieces_of(table, owners, lanes):
    """Which groups a vector has lanes of, and which; how many at most, rounded up to a power of 2.

    `owners` and `lanes` (vectors, LANES) are written.
    """
    used, begin = np.zeros(len(owners), np.int64), np.int64(0)
    for group in range(len(table) // 3):
        end = table[3 * group]
        for vector in range(begin // LANES, (end + LANES - 1) // LANES):
            first, last = max(begin - vector * LANES, 0), min(end - vector * LANES, LANES)
            if first < last:
                owners[vector, used[vector]] = group
                lanes[vector, used[vector]] = (1 << last) - (1 << first)
                used[vector] += 1
        begin = end
    most = 1
    while most < used.max():
        most *= 2
    return most


@njit
def one_pixel(kind, table, sources, target, step, output):
    """One pixel of outputs, group by group: its taps may be in the padding."""
    begin = np.int64(0)
    out = line(target, step, kind)
    for group in range(len(sources)):
        end, across = table[3 * group], table[3 * group + 2]
        if sources[group] == 0 or integer(integer(across, COUNTS), output) == 0:
            out[begin:end] = 0
        else:
            place = integer(integer(across, POSITIONS), output)
            read = line(sources[group] + place * step * out.itemsize, step, kind)
            for channel in range(begin, end):
                out[channel] = read[channel]
        begin = end


@njit
def blended(kind, data):
    """Each group of channels from another place; a unit is a row of outputs.

    NAME has, for each of the GROUP groups, its last channel and the axes of its one tap.
    """
    p = line(data, ARGUMENTS, np.int64)
    rows, columns, step = p[TARGET_ROWS], p[TARGET_COLUMNS], p[STEP]
    size = line(data, 1, kind).itemsize
    pitch = step * size
    table = line(p[NAME], 3 * p[GROUP], np.int64)
    first, last, stride = np.int64(0), columns, np.int64(1)
    for group in range(p[GROUP]):
        across = line(table[3 * group + 2], AXIS, np.int64)
        first, last = max(first, across[FIRST]), min(last, across[LAST])
        stride = across[STRIDE]
    first = min(first, columns)
    last = max(first, last)
    vectors = (step + LANES - 1) // LANES
    owners, all_lanes = np.zeros((vectors, LANES), np.int64), np.zeros((vectors, LANES), np.int64)
    most = pieces_of(table, owners, all_lanes)
    sources = np.empty(p[GROUP], np.int64)  # row of each group, or 0 where that is in the padding
    places, lanes = np.empty((vectors, most), np.int64), np.empty((vectors, most), np.int64)
    at_places, at_lanes = np.int64(places.ctypes.data), np.int64(lanes.ctypes.data)
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return places, lanes  # read here, so that they live till then
        image, y = unit // rows, unit % rows
        for group in range(p[GROUP]):
            down = table[3 * group + 1]
            row = image * p[ROWS] + integer(integer(down, POSITIONS), y)
            read = integer(integer(down, COUNTS), y) != 0
            sources[group] = p[SOURCE] + row * p[COLUMNS] * pitch if read else 0
        target = p[TARGET] + unit * columns * pitch
        for output in range(columns):
            if not first <= output < last:
                one_pixel(kind, table, sources, target + output * pitch, step, output)
        if first == last:
            continue
        for vector in range(vectors):
            for piece in range(most):
                group, mask = owners[vector, piece], all_lanes[vector, piece]
                across, row = table[3 * group + 2], sources[group]
                place = integer(integer(across, POSITIONS), first)
                if mask == 0 or row == 0:
                    # An address that can be read: processors stumble over others, masked or not.
                    mask, row, place = np.int64(0), p[SOURCE], np.int64(0)
                lanes[vector, piece] = mask
                places[vector, piece] = row + place * pitch + vector * LANES * size
        here, pixels = target + first * pitch, last - first
        blend(kind, at_places, at_lanes, most, here, step, pixels, stride * pitch, pitch)


def moves_blended_4(data):
    blended(FLOAT32, address(data))


def moves_blended_2(data):
    blended(FLOAT16, address(data))
