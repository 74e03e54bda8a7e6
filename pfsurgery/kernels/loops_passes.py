"""Passes over a dense array as one long vector: each number with its neighbours along a direction.

A tap is the same vector at another address, and what would come from beyond a border is masked
out: a number's place within a period (a row, or an image) says whether it has a tap before it and
one behind it. So rows shorter than a vector cost no more than long ones, in either layout.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pfsurgery.kernels.vectors import (
    FLOAT,
    INTEGER,
    LANES,
    SIZE,
    VECTOR,
    Rule,
    any_lane,
    at,
    better,
    bytes_of,
    first_lanes,
    larger,
    load,
    load_bytes,
    load_numbers,
    multiply_add,
    raw,
    splat,
    store,
    store_bytes,
    store_numbers,
)

_PLACE = ir.IntType(32)
_PLACES = ir.VectorType(_PLACE, LANES)


def _constant(value: int) -> Any:
    return ir.Constant(_PLACES, [value] * LANES)


class _Places:
    """Where the numbers of a vector are within their period; a loop moves them on."""

    def __init__(self, builder: Any, start: Any, period: Any) -> None:
        period = builder.trunc(period, _PLACE)
        lanes = ir.Constant(_PLACES, list(range(LANES)))
        begin = builder.add(splat(builder, builder.trunc(start, _PLACE), _PLACES), lanes)
        self._builder = builder
        self._period = splat(builder, period, _PLACES)
        self._step = splat(builder, builder.urem(ir.Constant(_PLACE, LANES), period), _PLACES)
        self._here = cgutils.alloca_once_value(builder, builder.urem(begin, self._period))

    def inside(self, away: Any, mask: Any) -> Any:
        """Lanes of the mask for which the place `away` numbers further is in the same period."""
        builder = self._builder
        there = splat(builder, builder.trunc(away, _PLACE), _PLACES)
        there = builder.add(builder.load(self._here), there)
        # as unsigned numbers, places before the first are beyond the last
        return _both(builder, builder.icmp_unsigned("<", there, self._period), mask)

    def move(self) -> None:
        """To the next vector: beyond the period, the smaller unsigned number is a period less."""
        builder = self._builder
        moved = builder.add(builder.load(self._here), self._step)
        back = builder.sub(moved, self._period)
        smaller = builder.icmp_unsigned("<", moved, back)
        builder.store(builder.select(smaller, moved, back), self._here)


class Unordered:
    """Lanes in which a NaN was seen; a loop notes what it reads."""

    def __init__(self, builder: Any) -> None:
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        none = builder.fcmp_ordered("<", zero, zero)
        self._builder, self._lanes = builder, cgutils.alloca_once_value(builder, none)

    def note(self, value: Any) -> None:
        """Add the lanes in which `value` is a NaN."""
        builder = self._builder
        nan = builder.fcmp_unordered("uno", value, value)
        builder.store(builder.or_(builder.load(self._lanes), nan), self._lanes)

    def any(self) -> Any:
        """1 if there is one, else 0."""
        return any_lane(self._builder, self._builder.load(self._lanes))


def for_vectors(builder: Any, length: Any, step: Any) -> None:
    """`step(offset, mask)` of each whole vector, without a mask, and of the rest."""
    lanes = ir.Constant(INTEGER, LANES)
    whole = builder.udiv(length, lanes)
    with cgutils.for_range(builder, whole, intp=INTEGER) as loop:
        step(builder.mul(loop.index, lanes), None)
    done = builder.mul(whole, lanes)
    rest = builder.sub(length, done)
    with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(INTEGER, 0))):
        step(done, first_lanes(builder, rest))


def _both(builder: Any, a: Any, b: Any) -> Any:
    return a if b is None else builder.and_(a, b)


def _bytes(builder: Any, kind: Any, numbers: Any) -> Any:
    return builder.mul(numbers, ir.Constant(INTEGER, bytes_of(kind)))


def _along(rule: Rule) -> Any:
    """Each number of a vector with its neighbours `pitch` before and behind, combined.

    The function takes the kinds of numbers and the addresses of source and target, how many numbers
    there are, the place of the first within its period, pitch and period in numbers, and the
    address of nine weights: of places without a tap before, of those with all three, of those
    without one behind. It says whether it saw a NaN; then a maximum is not to be relied upon unless
    it was made with care.
    """

    @intrinsic
    def along(
        typing_context: Any,
        kind: Any,
        made_kind: Any,
        source: Any,
        target: Any,
        length: Any,
        start: Any,
        pitch: Any,
        period: Any,
        weights: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, target, length, start, pitch, period, weights = args[2:]
            unordered = Unordered(builder)
            places, reach = _Places(builder, start, period), _bytes(builder, kind, pitch)
            first, inner, last = (
                [
                    splat(builder, builder.load(at(builder, weights, i * SIZE, FLOAT)))
                    for i in range(begin, begin + 3)
                ]
                for begin in (0, 3, 6)
            )

            def step(done: Any, mask: Any) -> None:
                before = places.inside(builder.neg(pitch), mask)
                behind = places.inside(pitch, mask)
                rest = 0.0 if rule == "sum" else -math.inf

                def number(place: Any, lanes: Any) -> Any:
                    return load_numbers(builder, kind, place, lanes, rest=rest)

                at_middle = builder.add(source, _bytes(builder, kind, done))
                middle = number(at_middle, mask)
                left = number(builder.sub(at_middle, reach), before)
                right = number(builder.add(at_middle, reach), behind)
                if rule == "maximum":
                    unordered.note(middle)
                if rule != "sum":
                    made = larger(builder, rule, left, middle)
                    made = larger(builder, rule, made, right)
                else:
                    both = builder.and_(before, behind)
                    own = builder.select(before, last[1], first[1])
                    made = builder.fmul(left, builder.select(behind, inner[0], last[0]))
                    made = multiply_add(builder, middle, builder.select(both, inner[1], own), made)
                    made = multiply_add(
                        builder, right, builder.select(before, inner[2], first[2]), made
                    )
                there = builder.add(target, _bytes(builder, made_kind, done))
                store_numbers(builder, made_kind, made, there, mask)
                places.move()

            for_vectors(builder, length, step)
            return unordered.any()

        return types.int64(kind, made_kind, *[types.int64] * 7), generate

    return along


maxima, careful_maxima, sums = map(_along, ("maximum", "careful", "sum"))


def _naming(inner: bool) -> Any:
    """`_along` of maxima, by ATen's rule, with the tap that each came from.

    The first of equal numbers wins, and the last NaN. A name is the tap's own number, 0 to 2; with
    `inner`, three times that and the name of what the tap is itself the maximum of.
    """

    @intrinsic
    def named(
        typing_context: Any,
        kind: Any,
        made_kind: Any,
        source: Any,
        names: Any,
        target: Any,
        target_names: Any,
        length: Any,
        start: Any,
        pitch: Any,
        period: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, names, target, target_names, length, start, pitch, period = args[2:]
            places, reach = _Places(builder, start, period), _bytes(builder, kind, pitch)
            scale = 3 if inner else 1

            def name(tap: int, address: Any) -> Any:
                own = _constant(scale * tap)
                return builder.add(own, load_bytes(builder, address, _PLACES)) if inner else own

            def step(done: Any, mask: Any) -> None:
                before = places.inside(builder.neg(pitch), mask)
                behind = places.inside(pitch, mask)
                middle = builder.add(source, _bytes(builder, kind, done))
                middle_name = builder.add(names, done)
                a = load_numbers(builder, kind, builder.sub(middle, reach), before)
                b = load_numbers(builder, kind, middle, mask)
                c = load_numbers(builder, kind, builder.add(middle, reach), behind)
                second = builder.or_(better(builder, "careful", a, b), builder.not_(before))
                best = builder.select(second, b, a)
                tap = builder.select(
                    second,
                    name(1, middle_name),
                    name(0, builder.sub(middle_name, pitch)),
                )
                third = builder.and_(better(builder, "careful", best, c), behind)
                best = builder.select(third, c, best)
                tap = builder.select(third, name(2, builder.add(middle_name, pitch)), tap)
                there = builder.add(target, _bytes(builder, made_kind, done))
                store_numbers(builder, made_kind, best, there, mask)
                store_bytes(builder, tap, builder.add(target_names, done), mask)
                places.move()

            for_vectors(builder, length, step)
            return ir.Constant(INTEGER, 0)

        return types.int64(kind, made_kind, *[types.int64] * 8), generate

    return named


named, named_again = _naming(False), _naming(True)


@intrinsic
def asked(
    typing_context: Any,
    kind: Any,
    gradient: Any,
    names: Any,
    target: Any,
    begin: Any,
    end: Any,
    total: Any,
    step: Any,
    pitch: Any,
) -> Any:
    """Of each pixel the gradients of those of its nine windows whose maximum it was.

    A window beyond a border needs no mask but where it is beyond the `total` numbers: what stands
    there in memory is a window whose tap in this direction would be padding, which is no maximum.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gradient, names, target, begin, end, total, step, pitch = args[1:]
        wide = ir.VectorType(INTEGER, LANES)
        lanes, most = ir.Constant(wide, list(range(LANES))), splat(builder, total, wide)

        def add(done: Any, mask: Any, checked: bool) -> None:
            here = builder.add(begin, done)
            out = ir.Constant(VECTOR, [0.0] * LANES)
            for i in (2, 1, 0):  # windows in their order, so that sums have that of ATen's
                for j in (2, 1, 0):
                    away = builder.add(
                        builder.mul(pitch, ir.Constant(INTEGER, 1 - i)),
                        builder.mul(step, ir.Constant(INTEGER, 1 - j)),
                    )
                    window, exists = builder.add(here, away), mask
                    if checked:
                        every = builder.add(splat(builder, window, wide), lanes)
                        # as unsigned numbers, those before the first are beyond the last
                        exists = _both(builder, builder.icmp_unsigned("<", every, most), mask)
                    tap = load_bytes(builder, builder.add(names, window), _PLACES, exists)
                    chosen = builder.icmp_signed("==", tap, _constant(3 * i + j))
                    chosen = _both(builder, chosen, exists)
                    place = builder.add(gradient, _bytes(builder, kind, window))
                    value = load_numbers(builder, kind, place, exists)
                    out = builder.select(chosen, builder.fadd(out, value), out)
            there = builder.add(target, _bytes(builder, kind, here))
            store_numbers(builder, kind, out, there, mask)

        length, margin = builder.sub(end, begin), builder.add(step, pitch)
        inside = builder.and_(
            builder.icmp_signed(">=", begin, margin),
            builder.icmp_signed("<=", builder.add(end, margin), total),
        )
        with builder.if_else(inside) as branches:
            for branch, checked in zip(branches, (False, True), strict=True):
                with branch:
                    for_vectors(builder, length, partial(add, checked=checked))
        return ir.Constant(INTEGER, 0)

    return types.int64(kind, *[types.int64] * 8), generate


@intrinsic
def moved(
    typing_context: Any,
    kind: Any,
    source: Any,
    target: Any,
    length: Any,
    down: Any,
    across: Any,
    width: Any,
    plane: Any,
) -> Any:
    """Planes whose pixels are copied from `down` rows and `across` columns away, or are 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, length, down, across, width, plane = args[1:]
        zero = ir.Constant(INTEGER, 0)
        columns, pixels = _Places(builder, zero, width), _Places(builder, zero, plane)
        rows_away = builder.mul(down, width)
        away = builder.add(rows_away, across)
        first = builder.add(source, _bytes(builder, kind, away))

        def step(done: Any, mask: Any) -> None:
            exists = columns.inside(across, pixels.inside(rows_away, mask))
            offset = _bytes(builder, kind, done)
            value = load(builder, builder.add(first, offset), 0, exists, kind=raw(kind))
            store(builder, value, builder.add(target, offset), 0, mask)
            columns.move()
            pixels.move()

        for_vectors(builder, length, step)
        return zero

    return types.int64(kind, *[types.int64] * 7), generate
