"""Passes over a dense array as one long vector: each number with its neighbours along a direction.

A tap is the same vector at another address, and what would come from beyond a border is masked
out: a number's place within a period (a row, or an image) says whether it has a tap before it and
one behind it. So rows shorter than a vector cost no more than long ones, in either layout.
"""

from __future__ import annotations

import math
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
    any_lane,
    at,
    first_lanes,
    load,
    load_bytes,
    multiply_add,
    splat,
    store,
    store_bytes,
)

_PLACE = ir.IntType(32)
_PLACES = ir.VectorType(_PLACE, LANES)


def _constant(value: int) -> Any:
    return ir.Constant(_PLACES, [value] * LANES)


def _places(builder: Any, start: Any, period: Any) -> tuple[Any, Any, Any]:
    """A vector of places within the period, in memory; the period; how far a vector moves them."""
    period = builder.trunc(period, _PLACE)
    begin = splat(builder, builder.trunc(start, _PLACE), _PLACES)
    lanes = ir.Constant(_PLACES, list(range(LANES)))
    periods = splat(builder, period, _PLACES)
    place = cgutils.alloca_once_value(builder, builder.urem(builder.add(begin, lanes), periods))
    move = splat(builder, builder.urem(ir.Constant(_PLACE, LANES), period), _PLACES)
    return place, periods, move


def _move(builder: Any, place: Any, periods: Any, move: Any) -> None:
    """The next places: beyond the period, the smaller one of unsigned numbers is a period less."""
    moved = builder.add(builder.load(place), move)
    back = builder.sub(moved, periods)
    builder.store(builder.select(builder.icmp_unsigned("<", moved, back), moved, back), place)


def _for_vectors(builder: Any, length: Any, step: Any) -> None:
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


def _bytes(builder: Any, numbers: Any) -> Any:
    return builder.mul(numbers, ir.Constant(INTEGER, SIZE))


def _along(maximum: bool) -> Any:
    """Each number of a vector with its neighbours `pitch` before and behind, combined.

    The function takes the addresses of source and target, how many numbers there are, the place of
    the first within its period, pitch and period in numbers, and the address of nine weights: of
    places without a tap before, of those with all three, of those without one behind. It says
    whether it saw a NaN; then a maximum is not to be relied upon.
    """

    @intrinsic
    def along(
        typing_context: Any,
        source: Any,
        target: Any,
        length: Any,
        start: Any,
        pitch: Any,
        period: Any,
        weights: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, target, length, start, pitch, period, weights = args
            zero = ir.Constant(VECTOR, [0.0] * LANES)
            found = cgutils.alloca_once_value(builder, builder.fcmp_ordered("<", zero, zero))
            place, periods, move = _places(builder, start, period)
            narrow = splat(builder, builder.trunc(pitch, _PLACE), _PLACES)
            low, high = narrow, builder.sub(periods, narrow)
            reach = _bytes(builder, pitch)
            first, inner, last = (
                [
                    splat(builder, builder.load(at(builder, weights, i * SIZE, FLOAT)))
                    for i in range(begin, begin + 3)
                ]
                for begin in (0, 3, 6)
            )

            def larger(old: Any, new: Any) -> Any:
                """Of equal numbers the first, as in ATen."""
                return builder.select(builder.fcmp_ordered(">", new, old), new, old)

            def step(done: Any, mask: Any) -> None:
                here = builder.load(place)
                before = _both(builder, builder.icmp_signed(">=", here, low), mask)
                behind = _both(builder, builder.icmp_signed("<", here, high), mask)
                offset = _bytes(builder, done)
                at_middle = builder.add(source, offset)
                middle = load(builder, at_middle, 0, mask)
                rest = -math.inf if maximum else 0.0
                left = load(builder, builder.sub(at_middle, reach), 0, before, rest=rest)
                right = load(builder, builder.add(at_middle, reach), 0, behind, rest=rest)
                if maximum:
                    nan = builder.fcmp_unordered("uno", middle, middle)
                    builder.store(builder.or_(builder.load(found), nan), found)
                    made = larger(larger(left, middle), right)
                else:
                    both = builder.and_(before, behind)
                    own = builder.select(before, last[1], first[1])
                    made = builder.fmul(left, builder.select(behind, inner[0], last[0]))
                    made = multiply_add(builder, middle, builder.select(both, inner[1], own), made)
                    made = multiply_add(
                        builder, right, builder.select(before, inner[2], first[2]), made
                    )
                store(builder, made, builder.add(target, offset), 0, mask)
                _move(builder, place, periods, move)

            _for_vectors(builder, length, step)
            return any_lane(builder, builder.load(found))

        return types.int64(*[types.int64] * 7), generate

    return along


maxima, sums = _along(True), _along(False)


def _naming(inner: bool) -> Any:
    """`_along` of maxima, by ATen's rule, with the tap that each came from.

    The first of equal numbers wins, and the last NaN. A name is the tap's own number, 0 to 2; with
    `inner`, three times that and the name of what the tap is itself the maximum of.
    """

    @intrinsic
    def named(
        typing_context: Any,
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
            source, names, target, target_names, length, start, pitch, period = args
            place, periods, move = _places(builder, start, period)
            narrow = splat(builder, builder.trunc(pitch, _PLACE), _PLACES)
            low, high = narrow, builder.sub(periods, narrow)
            reach = _bytes(builder, pitch)
            scale = 3 if inner else 1

            def better(old: Any, new: Any) -> Any:
                larger = builder.fcmp_ordered(">", new, old)
                return builder.or_(larger, builder.fcmp_unordered("uno", new, new))

            def name(tap: int, address: Any) -> Any:
                own = _constant(scale * tap)
                return builder.add(own, load_bytes(builder, address, _PLACES)) if inner else own

            def step(done: Any, mask: Any) -> None:
                here = builder.load(place)
                before = _both(builder, builder.icmp_signed(">=", here, low), mask)
                behind = _both(builder, builder.icmp_signed("<", here, high), mask)
                offset = _bytes(builder, done)
                middle, middle_name = builder.add(source, offset), builder.add(names, done)
                a = load(builder, builder.sub(middle, reach), 0, before)
                b = load(builder, middle, 0, mask)
                c = load(builder, builder.add(middle, reach), 0, behind)
                second = builder.or_(better(a, b), builder.not_(before))
                best = builder.select(second, b, a)
                tap = builder.select(
                    second,
                    name(1, middle_name),
                    name(0, builder.sub(middle_name, pitch)),
                )
                third = builder.and_(better(best, c), behind)
                best = builder.select(third, c, best)
                tap = builder.select(third, name(2, builder.add(middle_name, pitch)), tap)
                store(builder, best, builder.add(target, offset), 0, mask)
                store_bytes(builder, tap, builder.add(target_names, done), mask)
                _move(builder, place, periods, move)

            _for_vectors(builder, length, step)
            return ir.Constant(INTEGER, 0)

        return types.int64(*[types.int64] * 8), generate

    return named


named, named_again = _naming(False), _naming(True)


@intrinsic
def asked(
    typing_context: Any,
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
        gradient, names, target, begin, end, total, step, pitch = args
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        first = ir.Constant(INTEGER, 0)
        margin = builder.add(step, pitch)
        lanes = ir.Constant(ir.VectorType(INTEGER, LANES), list(range(LANES)))

        def add(done: Any, mask: Any, checked: bool) -> None:
            here = builder.add(begin, done)
            out = zero
            for i in (2, 1, 0):  # windows in their order, so that sums have that of ATen's
                for j in (2, 1, 0):
                    away = builder.add(
                        builder.mul(pitch, ir.Constant(INTEGER, 1 - i)),
                        builder.mul(step, ir.Constant(INTEGER, 1 - j)),
                    )
                    window = builder.add(here, away)
                    exists = mask
                    if checked:
                        every = builder.add(
                            splat(builder, window, ir.VectorType(INTEGER, LANES)), lanes
                        )
                        most = splat(builder, total, ir.VectorType(INTEGER, LANES))
                        # as unsigned numbers, those before the first are beyond the last
                        exists = _both(builder, builder.icmp_unsigned("<", every, most), mask)
                    named = load_bytes(builder, builder.add(names, window), _PLACES, exists)
                    chosen = builder.icmp_signed("==", named, _constant(3 * i + j))
                    chosen = _both(builder, chosen, exists)
                    value = load(builder, builder.add(gradient, _bytes(builder, window)), 0, exists)
                    out = builder.select(chosen, builder.fadd(out, value), out)
            store(builder, out, builder.add(target, _bytes(builder, here)), 0, mask)

        inside = builder.and_(
            builder.icmp_signed(">=", begin, margin),
            builder.icmp_signed("<=", builder.add(end, margin), total),
        )
        with builder.if_else(inside) as (then, otherwise):
            with then:
                _for_vectors(
                    builder, builder.sub(end, begin), lambda done, mask: add(done, mask, False)
                )
            with otherwise:
                _for_vectors(
                    builder, builder.sub(end, begin), lambda done, mask: add(done, mask, True)
                )
        return first

    return types.int64(*[types.int64] * 8), generate


@intrinsic
def moved(
    typing_context: Any,
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
        source, target, length, down, across, width, plane = args
        zero = ir.Constant(INTEGER, 0)
        column, columns, next_column = _places(builder, zero, width)
        pixel, pixels, next_pixel = _places(builder, zero, plane)
        rows_away = builder.mul(down, width)
        first = builder.add(source, _bytes(builder, builder.add(rows_away, across)))
        aside = splat(builder, builder.trunc(across, _PLACE), _PLACES)
        below = splat(builder, builder.trunc(rows_away, _PLACE), _PLACES)

        def inside(place: Any, away: Any, most: Any) -> Any:
            """As unsigned numbers, places before the first are beyond the last."""
            return builder.icmp_unsigned("<", builder.add(builder.load(place), away), most)

        def step(done: Any, mask: Any) -> None:
            exists = builder.and_(inside(column, aside, columns), inside(pixel, below, pixels))
            offset = _bytes(builder, done)
            value = load(builder, builder.add(first, offset), 0, _both(builder, exists, mask))
            store(builder, value, builder.add(target, offset), 0, mask)
            _move(builder, column, columns, next_column)
            _move(builder, pixel, pixels, next_pixel)

        _for_vectors(builder, length, step)
        return zero

    return types.int64(*[types.int64] * 7), generate
