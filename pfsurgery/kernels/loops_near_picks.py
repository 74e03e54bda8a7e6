"""Max-pools of 3x3 at stride 1 for training, in channels_last: two rows in one go, and gradients.

As in `loops_near` a tap in the padding is read from the pixel beside it; of equal numbers it has
that pixel's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pfsurgery.kernels.loops_base import (
    ARGUMENTS,
    COLUMNS,
    GROUP,
    IMAGES,
    NAME,
    ROWS,
    SOURCE,
    STEP,
    TARGET,
    UNITS,
    address,
    line,
    take,
)
from pfsurgery.kernels.loops_passes import Unordered, asked, for_vectors
from pfsurgery.kernels.vectors import (
    BFLOAT16,
    BYTE,
    BYTES,
    FLOAT16,
    FLOAT32,
    INTEGER,
    LANES,
    VECTOR,
    Rule,
    at,
    better,
    bytes_of,
    load,
    load_numbers,
    splat,
    store,
    store_numbers,
)


def _two_rows(rule: Rule) -> Any:
    """Two rows of maxima of four rows of inputs, `length` numbers of each, and their names.

    The function takes the kind of the numbers, addresses of the four rows, of two rows of maxima
    and of two of names, how far the left and the right tap are in bytes, the length, and the
    address of nine bytes: what a column adds to a name, then what a row adds of each target. It
    says whether it saw a NaN in the middle; then it is not to be relied upon unless it was careful.
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
        first_names: Any,
        second_names: Any,
        left: Any,
        right: Any,
        length: Any,
        parts: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, targets, names = args[1:5], args[5:7], args[7:9]
            left, right, length, parts = args[9:]
            size = bytes_of(kind)
            unordered = Unordered(builder)
            part = [
                splat(builder, builder.load(at(builder, parts, i, BYTE)), BYTES) for i in range(9)
            ]

            def best(numbers: list[Any], named: list[Any]) -> tuple[Any, Any]:
                number, name = numbers[0], named[0]
                for new, its_name in zip(numbers[1:], named[1:], strict=True):
                    wins = better(builder, rule, number, new)
                    number = builder.select(wins, new, number)
                    name = builder.select(wins, its_name, name)
                return number, name

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
                    across.append(best(taps, part[:3]))
                # The second first: the last row of an odd number is made twice, at one place.
                for target in (1, 0):
                    seen, of_rows = across[target : target + 3], part[3 + 3 * target :]
                    numbers = [number for number, _ in seen]
                    named = [builder.add(seen[i][1], of_rows[i]) for i in range(3)]
                    number, name = best(numbers, named)
                    store_numbers(builder, kind, number, builder.add(targets[target], place), mask)
                    store(builder, name, builder.add(names[target], done), 0, mask)

            for_vectors(builder, length, step)
            return unordered.any()

        return types.int64(kind, *[types.int64] * 12), generate

    return two_rows


_two_maxima, _two_careful = _two_rows("maximum"), _two_rows("careful")


@intrinsic
def _asked_twice(
    typing_context: Any,
    kind: Any,
    gradient: Any,
    names: Any,
    target: Any,
    begin: Any,
    length: Any,
    step: Any,
    pitch: Any,
) -> Any:
    """Two rows of `asked`, `length` numbers of each, where all windows lie in memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gradient, names, target, begin, length, step, pitch = args[1:]
        size = ir.Constant(INTEGER, bytes_of(kind))
        taps = [ir.Constant(BYTES, [tap] * LANES) for tap in range(9)]
        rows = [
            builder.add(begin, builder.mul(pitch, ir.Constant(INTEGER, i - 1))) for i in range(4)
        ]

        def add(done: Any, mask: Any) -> None:
            out = [ir.Constant(VECTOR, [0.0] * LANES)] * 2
            for number, row in enumerate(rows):  # in their order, so that sums have that of ATen's
                for column in range(3):
                    away = builder.mul(step, ir.Constant(INTEGER, column - 1))
                    window = builder.add(builder.add(row, done), away)
                    name = load(builder, builder.add(names, window), 0, mask, kind=BYTES)
                    place = builder.add(gradient, builder.mul(window, size))
                    value = load_numbers(builder, kind, place, mask)
                    for made, tap_row in ((0, 2 - number), (1, 3 - number)):
                        if 0 <= tap_row < 3:
                            tap = taps[3 * tap_row + 2 - column]
                            chosen = builder.icmp_signed("==", name, tap)
                            total = builder.fadd(out[made], value)
                            out[made] = builder.select(chosen, total, out[made])
            for made, row in zip(out, rows[1:3], strict=True):
                there = builder.mul(builder.add(row, done), size)
                store_numbers(builder, kind, made, builder.add(target, there), mask)

        for_vectors(builder, length, add)
        return ir.Constant(INTEGER, 0)

    return types.int64(kind, *[types.int64] * 7), generate


@njit
def parts(place, size, scale, made):
    """What the three taps of an output at a place add to a name, those in the padding as the next.

    Returns how far the first and the last one are from the middle, in places.
    """
    before, behind = min(place, 1), min(size - 1 - place, 1)
    made[0], made[1], made[2] = scale * (1 - before), scale, scale * (1 + behind)
    return -before, behind


@njit
def pair(careful, kind, p, source, target, names, y, named):
    """Output rows `y` and `y + 1` of one image; whether a NaN was seen without care."""
    size, width = line(source, 1, kind).itemsize, p[COLUMNS] * p[STEP]
    then = min(y + 1, p[ROWS] - 1)
    before, _ = parts(y, p[ROWS], 3, named[3:6])
    _, behind = parts(then, p[ROWS], 3, named[6:9])
    at_parts, found = np.int64(named.ctypes.data), np.int64(0)
    last = max(1, p[COLUMNS] - 1)
    for begin, end in ((0, 1), (1, last), (last, p[COLUMNS])):
        if begin >= end:
            continue
        left, right = parts(begin, p[COLUMNS], 1, named[:3])
        left, right = left * p[STEP] * size, right * p[STEP] * size
        here, length = begin * p[STEP], (end - begin) * p[STEP]
        first, second = y * width + here, then * width + here
        upper, lower = source + first * size, source + second * size
        top, bottom = upper + before * width * size, lower + behind * width * size
        one, two = target + first * size, target + second * size
        # fmt: off
        if careful:
            _two_careful(
                kind, top, upper, lower, bottom, one, two, names + first, names + second,
                left, right, length, at_parts,
            )
        else:
            found |= _two_maxima(
                kind, top, upper, lower, bottom, one, two, names + first, names + second,
                left, right, length, at_parts,
            )
        # fmt: on
    return found != 0


@njit
def near_picks(kind, data):
    """Images in blocks of GROUP rows, an even number."""
    p = line(data, ARGUMENTS, np.int64)
    named = np.zeros(9, np.uint8)
    blocks = (p[ROWS] + p[GROUP] - 1) // p[GROUP]
    numbers = p[ROWS] * p[COLUMNS] * p[STEP]
    size = numbers * line(data, 1, kind).itemsize
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        image, block = unit // blocks, unit % blocks
        source, target = p[SOURCE] + image * size, p[TARGET] + image * size
        names = p[NAME] + image * numbers
        begin, end = block * p[GROUP], min((block + 1) * p[GROUP], p[ROWS])
        found = False
        for y in range(begin, end, 2):
            found |= pair(False, kind, p, source, target, names, y, named)
        if found:
            for y in range(begin, end, 2):
                pair(True, kind, p, source, target, names, y, named)


@njit
def near_gathers(kind, data):
    """Gradient of `near_picks`: GROUP rows of all images at a time, which follow each other."""
    p = line(data, ARGUMENTS, np.int64)
    width, rows = p[COLUMNS] * p[STEP], p[IMAGES] * p[ROWS]
    while True:
        unit = take(data)
        if unit >= p[UNITS]:
            return
        row, end = unit * p[GROUP], min((unit + 1) * p[GROUP], rows)
        while row < end:
            begin = row * width
            # fmt: off
            if 2 <= row < rows - 3 and row + 1 < end:
                _asked_twice(
                    kind, p[SOURCE], p[NAME], p[TARGET], begin, width, p[STEP], width
                )
                row += 2
            else:
                asked(
                    kind, p[SOURCE], p[NAME], p[TARGET], begin, begin + width, rows * width,
                    p[STEP], width,
                )
                row += 1
            # fmt: on


def picks_near_float32(data):
    near_picks(FLOAT32, address(data))


def gathers_near_float32(data):
    near_gathers(FLOAT32, address(data))


def picks_near_bfloat16(data):
    near_picks(BFLOAT16, address(data))


def gathers_near_bfloat16(data):
    near_gathers(BFLOAT16, address(data))


def picks_near_float16(data):
    near_picks(FLOAT16, address(data))


def gathers_near_float16(data):
    near_gathers(FLOAT16, address(data))
