"""A matrix product that reads its left side through a table of offsets, so nothing is gathered.

`target[p, n] = bias[n] + sum over k of source[position p + offset k] * weights[k, n]`: a column of
the left side is any number near the position, so a shifted channel is the same memory at another
offset, and a convolution is a product over all taps. A tile of `ROWS` positions and up to
`VECTORS` vectors of outputs stays in registers while `k` runs.
"""

from __future__ import annotations

from itertools import product as pairs
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pfsurgery.kernels.vectors import (
    FLOAT,
    INTEGER,
    LANES,
    SIZE,
    VECTORS,
    at,
    first_lanes,
    load,
    multiply_add,
    splat,
    store,
)

ROWS = 6


def _tile(vectors: int) -> Any:
    """The product of one tile of `ROWS` positions and `vectors` vectors of outputs."""

    @intrinsic
    def tile(
        typing_context: Any,
        source: Any,
        positions: Any,
        target: Any,
        places: Any,
        used: Any,
        table: Any,
        count: Any,
        weights: Any,
        bias: Any,
        outputs: Any,
        low: Any,
        added: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, positions, target, places, used = args[:5]
            table, count, weights, bias, outputs, low, added = args[5:]
            last = builder.sub(used, ir.Constant(INTEGER, 1))

            def row(number: int, base: Any, offsets: Any) -> Any:
                """Address of a row; rows behind the last one that is used are copies of it."""
                wanted = ir.Constant(INTEGER, number)
                place = builder.select(builder.icmp_signed("<", wanted, used), wanted, last)
                entry = builder.add(offsets, builder.shl(place, ir.Constant(INTEGER, 3)))
                return builder.add(base, builder.load(at(builder, entry, 0, INTEGER)))

            rows = [row(i, source, positions) for i in range(ROWS)]
            start = [load(builder, bias, j * LANES * SIZE) for j in range(vectors)]
            sums = [
                [cgutils.alloca_once_value(builder, start[j]) for j in range(vectors)]
                for _ in range(ROWS)
            ]
            with cgutils.for_range(builder, count, intp=INTEGER) as loop:
                entry = builder.add(table, builder.shl(loop.index, ir.Constant(INTEGER, 3)))
                offset = builder.load(at(builder, entry, 0, INTEGER))
                step = ir.Constant(INTEGER, vectors * LANES * SIZE)
                line = builder.add(weights, builder.mul(loop.index, step))
                right = [load(builder, line, j * LANES * SIZE) for j in range(vectors)]
                for i in range(ROWS):
                    place = builder.add(rows[i], offset)
                    left = splat(builder, builder.load(at(builder, place, 0, FLOAT)))
                    for j in range(vectors):
                        before = builder.load(sums[i][j])
                        after = multiply_add(builder, left, right[j], before)
                        builder.store(after, sums[i][j])
            full = ir.Constant(INTEGER, (vectors - 1) * LANES)
            mask = first_lanes(builder, builder.sub(outputs, full))
            limits = [None] * (vectors - 1) + [mask]
            made = [row(i, target, places) for i in range(ROWS)]
            with builder.if_then(builder.icmp_signed("!=", added, ir.Constant(INTEGER, 0))):
                for i, j in pairs(range(ROWS), range(vectors)):
                    there = builder.add(made[i], added)
                    value = load(builder, there, j * LANES * SIZE, limits[j])
                    builder.store(builder.fadd(builder.load(sums[i][j]), value), sums[i][j])
            least = splat(builder, low)
            for i, j in pairs(range(ROWS), range(vectors)):
                value = builder.load(sums[i][j])
                below = builder.fcmp_ordered("<", value, least)
                value = builder.select(below, least, value)
                store(builder, value, made[i], j * LANES * SIZE, limits[j])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10, types.float32, types.int64), generate

    return tile


_tile1, _tile2, _tile3, _tile4 = (_tile(vectors) for vectors in (1, 2, 3, 4))


@njit
def product(
    source, positions, target, places, rows, table, count, weights, bias, outputs, low, added
):  # fmt: skip
    """The product at `rows` positions; everything but the counts is an address.

    Args:
        source: What `positions` and `table` are relative to.
        positions: (rows,) offsets in bytes.
        target: What `places` are relative to.
        places: (rows,) offsets of the results in bytes.
        rows: Number of positions.
        table: (count,) offsets of the columns in bytes.
        count: Number of columns.
        weights: As `fused_vectors.pack_vectors` packs them.
        bias: Of whole vectors.
        outputs: Numbers to write at each position.
        low: Smaller results are raised to this, as a ReLU does with 0.
        added: Bytes from each result to a number that is added to it first, 0 for none.
    """
    done = 0
    while done < outputs:
        vectors = min(VECTORS, (outputs - done + LANES - 1) // LANES)
        left = outputs - done
        row = 0
        while row < rows:
            s, t, used = positions + 8 * row, places + 8 * row, rows - row
            if vectors == 4:
                _tile4(source, s, target, t, used, table, count, weights, bias, left, low, added)
            elif vectors == 3:
                _tile3(source, s, target, t, used, table, count, weights, bias, left, low, added)
            elif vectors == 2:
                _tile2(source, s, target, t, used, table, count, weights, bias, left, low, added)
            else:
                _tile1(source, s, target, t, used, table, count, weights, bias, left, low, added)
            row += ROWS
        size = vectors * LANES
        weights += SIZE * size * count
        bias += SIZE * size
        target += SIZE * size
        done += size
