"""Windows of any size over a vector of channels: rows first, then columns.

A pooled column is computed with all channels of the vectors that hold any of its run's, wanted or
not: that takes a fraction of the time in which scattered channels are put side by side.

Numba's cache on disk does not notice a change here, see CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable
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
    Rule,
    at,
    first_lanes,
    larger,
    load,
    load_numbers,
    splat,
    store,
    store_numbers,
)

LINE = LANES * SIZE  # bytes of a vector of float32
_USUAL = 3  # numbers of a window's row or column, for which a loop is written out


def _with_usual(builder: Any, count: Any, write: Callable[[int | None], None]) -> None:
    """Writes code for windows of `_USUAL` numbers, and for any other `count` (None)."""
    usual = builder.icmp_signed("==", count, ir.Constant(INTEGER, _USUAL))
    with builder.if_else(usual) as (written_out, other):
        with written_out:
            write(_USUAL)
        with other:
            write(None)


def _window(
    builder: Any, rule: Rule, fixed: int | None, count: Any, number: Callable[[Any], Any]
) -> Any:
    """The sum or maximum of `fixed` vectors, or else of `count`; `number` loads the i-th."""

    def joined(old: Any, new: Any) -> Any:
        return builder.fadd(old, new) if rule == "sum" else larger(builder, rule, old, new)

    first, *others = [ir.Constant(INTEGER, i) for i in range(fixed or 1)]
    made = number(first)
    for other in others:
        made = joined(made, number(other))
    if fixed:
        return made
    total = cgutils.alloca_once_value(builder, made)
    one = ir.Constant(INTEGER, 1)
    with cgutils.for_range(builder, builder.sub(count, one), intp=INTEGER) as loop:
        value = number(builder.add(loop.index, one))
        builder.store(joined(builder.load(total), value), total)
    return builder.load(total)


def _down(rule: Rule) -> Any:
    """One row of windows, `rows` high and a pixel wide, of the first `channels` of a vector.

    The function takes the kind of the numbers, the address of the uppermost row's first pixel,
    bytes from one row to the next, `rows`, bytes from one pixel to the next, how many pixels there
    are, `channels`, and the address of the results, float32 and a vector for each pixel.
    """

    @intrinsic
    def down(
        typing_context: Any,
        kind: Any,
        source: Any,
        pitch: Any,
        rows: Any,
        step: Any,
        pixels: Any,
        channels: Any,
        target: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, source, pitch, rows, step, pixels, channels, target = args
            mask = first_lanes(builder, channels)

            def write(fixed: int | None) -> None:
                with cgutils.for_range(builder, pixels, intp=INTEGER) as pixel:
                    top = builder.add(source, builder.mul(pixel.index, step))

                    def number(row: Any) -> Any:
                        place = builder.add(top, builder.mul(row, pitch))
                        return load_numbers(builder, kind, place, mask)

                    made = _window(builder, rule, fixed, rows, number)
                    there = builder.mul(pixel.index, ir.Constant(INTEGER, LINE))
                    store(builder, made, builder.add(target, there))

            _with_usual(builder, rows, write)
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 7), generate

    return down


def _across(rule: Rule) -> Any:
    """Windows `columns` wide over what `_down` made of a row, times each one's share.

    The function takes the kind of the results, the address of the first window's first vector,
    bytes from one window to the next, the address of the shares, how many windows there are, and
    the address of the first result and bytes from one to the next. Maxima have no shares.
    """

    @intrinsic
    def across(
        typing_context: Any,
        kind: Any,
        source: Any,
        step: Any,
        columns: Any,
        shares: Any,
        windows: Any,
        target: Any,
        pitch: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, source, step, columns, shares, windows, target, pitch = args

            def write(fixed: int | None) -> None:
                with cgutils.for_range(builder, windows, intp=INTEGER) as window:
                    first = builder.add(source, builder.mul(window.index, step))

                    def number(column: Any) -> Any:
                        there = builder.mul(column, ir.Constant(INTEGER, LINE))
                        return load(builder, builder.add(first, there))

                    made = _window(builder, rule, fixed, columns, number)
                    if rule == "sum":
                        place = builder.mul(window.index, ir.Constant(INTEGER, SIZE))
                        share = builder.load(at(builder, builder.add(shares, place), 0, FLOAT))
                        made = builder.fmul(made, splat(builder, share))
                    place = builder.add(target, builder.mul(window.index, pitch))
                    store_numbers(builder, kind, made, place)

            _with_usual(builder, columns, write)
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 7), generate

    return across


sums_down, maxima_down = _down("sum"), _down("careful")
sums_across, maxima_across = _across("sum"), _across("careful")
