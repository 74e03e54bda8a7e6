"""Windows of three rows and three columns at stride 1: two rows of outputs in one go.

A row of an image is one run of numbers, and so is each of its taps: the same run, a pixel to the
left or right. Nothing but the outputs is written. A tap in the padding is read from the pixel
beside it: a maximum does not notice, and of a weighted sum it gets a part of that pixel's weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pfsurgery.kernels.loops_base import (
    ACROSS,
    ARGUMENTS,
    AXIS,
    COLUMNS,
    COUNTS,
    DOWN,
    GROUP,
    MOST,
    POSITIONS,
    ROWS,
    SOURCE,
    STEP,
    TARGET,
    UNITS,
    WEIGHTS,
    address,
    line,
    take,
)
from pfsurgery.kernels.loops_passes import Unordered, for_vectors
from pfsurgery.kernels.vectors import (
    BFLOAT16,
    FLOAT,
    FLOAT16,
    FLOAT32,
    INTEGER,
    SIZE,
    Rule,
    at,
    bytes_of,
    larger,
    load_numbers,
    multiply_add,
    splat,
    store_numbers,
)


def _two_rows(rule: Rule) -> Any:
    """Two rows of outputs of four rows of inputs, `length` numbers of each.

    The function takes the kind of the numbers, addresses of the four rows and the two targets, how
    far the left and the right tap are in bytes, and the address of nine weights: of the columns,
    then of each target's rows. It says whether it saw a NaN in the middle; then a maximum is not to
    be relied upon unless it was made with care.
    """

    @intrinsic
    def two_rows(
        typing_context: Any,
        kind: Any,
        top: Any,
        upper: Any,
        lower: Any,
        bottom: Any,
        first: Any,
        second: Any,
        left: Any,
        right: Any,
        length: Any,
        weights: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, targets, (left, right, length, weights) = args[1:5], args[5:7], args[7:]
            size = bytes_of(kind)
            unordered = Unordered(builder)
            factors = [
                splat(builder, builder.load(at(builder, weights, i * SIZE, FLOAT)))
                for i in range(9)
            ]

            def joined(numbers: list[Any], of: list[Any]) -> Any:
                if rule != "sum":
                    first = larger(builder, rule, numbers[0], numbers[1])
                    return larger(builder, rule, first, numbers[2])
                made = builder.fmul(numbers[0], of[0])
                made = multiply_add(builder, numbers[1], of[1], made)
                return multiply_add(builder, numbers[2], of[2], made)

            def step(done: Any, mask: Any) -> None:
                place = builder.mul(done, ir.Constant(INTEGER, size))
                across = []
                for row in rows:
                    middle = builder.add(row, place)
                    taps = [
                        load_numbers(builder, kind, builder.add(middle, left), mask),
                        load_numbers(builder, kind, middle, mask),
                        load_numbers(builder, kind, builder.add(middle, right), mask),
                    ]
                    if rule == "maximum":
                        unordered.note(taps[1])
                    across.append(joined(taps, factors[:3]))
                # The second first: the last row of an odd number is made twice, at one place.
                made = joined(across[1:], factors[6:]), joined(across[:3], factors[3:6])
                store_numbers(builder, kind, made[0], builder.add(targets[1], place), mask)
                store_numbers(builder, kind, made[1], builder.add(targets[0], place), mask)

            for_vectors(builder, length, step)
            return unordered.any()

        return types.int64(kind, *[types.int64] * 10), generate

    return two_rows


_two_maxima, _two_careful, _two_sums = map(_two_rows, ("maximum", "careful", "sum"))


@njit
def split(axis_at, output, weights):
    """Three weights of an output whose window may lack its first or last tap."""
    axis = line(axis_at, AXIS, np.int64)
    at = output * axis[MOST]
    count = line(axis[COUNTS], output + 1, np.int64)[output]
    found = line(axis[WEIGHTS], at + count, np.float64)
    position = line(axis[POSITIONS], at + 1, np.int64)[at]
    if count == 3:
        for k in range(3):
            weights[k] = found[at + k]
    elif count == 1:
        weights[0], weights[1], weights[2] = found[at] / 4, found[at] / 2, found[at] / 4
    elif position == output:
        weights[0], weights[1], weights[2] = found[at] / 2, found[at] / 2, found[at + 1]
    else:
        weights[0], weights[1], weights[2] = found[at], found[at + 1] / 2, found[at + 1] / 2


@njit
def pair(weighted, careful, kind, p, source, target, y, weights):
    """Output rows `y` and `y + 1` of one image; whether a NaN was seen."""
    rows, columns = p[ROWS], p[COLUMNS]
    step = p[STEP] * line(source, 1, kind).itemsize
    pitch = columns * step
    then = min(y + 1, rows - 1)
    upper, lower = source + y * pitch, source + then * pitch
    top, bottom = source + max(0, y - 1) * pitch, source + min(then + 1, rows - 1) * pitch
    if weighted is not None:
        split(p[DOWN], y, weights[3:6])
        split(p[DOWN], then, weights[6:9])
    first, second = target + y * pitch, target + then * pitch
    at_weights = np.int64(weights.ctypes.data)
    found = np.int64(0)
    last = max(1, columns - 1)
    for begin, end in ((0, 1), (1, last), (last, columns)):
        if begin >= end:
            continue
        if weighted is not None:
            split(p[ACROSS], begin, weights[:3])
        at, length = begin * step, (end - begin) * p[STEP]
        left = np.int64(0) if begin == 0 else -step
        right = np.int64(0) if end == columns else step
        # fmt: off
        if weighted is None and careful is None:
            found |= _two_maxima(
                kind, top + at, upper + at, lower + at, bottom + at, first + at, second + at,
                left, right, length, at_weights,
            )
        elif weighted is None:
            _two_careful(
                kind, top + at, upper + at, lower + at, bottom + at, first + at, second + at,
                left, right, length, at_weights,
            )
        else:
            _two_sums(
                kind, top + at, upper + at, lower + at, bottom + at, first + at, second + at,
                left, right, length, at_weights,
            )
        # fmt: on
    return found != 0


@njit
def near(weighted, kind, data):
    """Images in blocks of GROUP rows, an even number."""
    p = line(data, ARGUMENTS, np.int64)
    weights = np.zeros(9, np.float32)
    parts = (p[ROWS] + p[GROUP] - 1) // p[GROUP]
    size = p[ROWS] * p[COLUMNS] * p[STEP] * line(data, 1, kind).itemsize
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        image, part = unit // parts, unit % parts
        source, target = p[SOURCE] + image * size, p[TARGET] + image * size
        begin, end = part * p[GROUP], min((part + 1) * p[GROUP], p[ROWS])
        found = False
        for y in range(begin, end, 2):
            found |= pair(weighted, None, kind, p, source, target, y, weights)
        if found and weighted is None:
            for y in range(begin, end, 2):
                pair(weighted, True, kind, p, source, target, y, weights)


def max_near_float32(data):
    near(None, FLOAT32, address(data))


def sum_near_float32(data):
    near(True, FLOAT32, address(data))


def max_near_bfloat16(data):
    near(None, BFLOAT16, address(data))


def sum_near_bfloat16(data):
    near(True, BFLOAT16, address(data))


def max_near_float16(data):
    near(None, FLOAT16, address(data))


def sum_near_float16(data):
    near(True, FLOAT16, address(data))
