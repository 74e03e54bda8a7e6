"""A matrix product that reads its left side through a table of offsets, so nothing is gathered.

`target[p, n] = bias[n] + sum over k of source[position p + offset k] * weights[k, n]`: a column of
the left side is any number near the position, so a shifted channel is the same memory at another
offset, and a convolution is a product over all taps. A tile of `ROWS` positions and up to
`VECTORS` vectors of outputs stays in registers while `k` runs. It is written in LLVM's vector
instructions, which no loop optimiser would find: the rate is that of a tuned library.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
# Numbers of a vector, and vectors of a tile's row: as many registers as the processor has.
if _FEATURES.get("avx512f"):
    LANES, VECTORS = 16, 4
elif _FEATURES.get("avx2"):
    LANES, VECTORS = 8, 2
else:
    LANES, VECTORS = 4, 4
ROWS = 6

_INTEGER, _INDEX, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_SIZE = 4  # bytes of a number


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """The place `offset` bytes behind an address, as a pointer."""
    place = builder.add(address, ir.Constant(_INTEGER, offset))
    return builder.inttoptr(place, kind.as_pointer())


def _vector(builder: Any, address: Any, number: int) -> Any:
    loaded = builder.load(_at(builder, address, number * LANES * _SIZE, _VECTOR))
    loaded.align = _SIZE
    return loaded


def _splat(builder: Any, value: Any, kind: Any = _VECTOR) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INDEX, 0))
    zeros = ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, zeros)


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, arguments)
    return cgutils.get_or_insert_function(builder.module, kind, name)


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
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, positions, target, places, used = args[:5]
            table, count, weights, bias, outputs, low = args[5:]
            multiply_add = _function(
                builder, f"llvm.fma.v{LANES}f32", _VECTOR, [_VECTOR, _VECTOR, _VECTOR]
            )

            def row(number: int, base: Any, offsets: Any) -> Any:
                """Address of a row; rows behind the last one that is used are copies of it."""
                wanted, last = ir.Constant(_INTEGER, number), builder.sub(used, one)
                place = builder.select(builder.icmp_signed("<", wanted, used), wanted, last)
                place = builder.add(offsets, builder.shl(place, ir.Constant(_INTEGER, 3)))
                return builder.add(base, builder.load(_at(builder, place, 0, _INTEGER)))

            one = ir.Constant(_INTEGER, 1)
            rows = [row(i, source, positions) for i in range(ROWS)]
            start = [_vector(builder, bias, j) for j in range(vectors)]
            sums = [
                [cgutils.alloca_once_value(builder, start[j]) for j in range(vectors)]
                for _ in range(ROWS)
            ]
            with cgutils.for_range(builder, count, intp=_INTEGER) as loop:
                entry = builder.add(table, builder.shl(loop.index, ir.Constant(_INTEGER, 3)))
                offset = builder.load(_at(builder, entry, 0, _INTEGER))
                step = ir.Constant(_INTEGER, vectors * LANES * _SIZE)
                line = builder.add(weights, builder.mul(loop.index, step))
                right = [_vector(builder, line, j) for j in range(vectors)]
                for i in range(ROWS):
                    place = builder.add(rows[i], offset)
                    left = _splat(builder, builder.load(_at(builder, place, 0, _FLOAT)))
                    for j in range(vectors):
                        sum_ = builder.load(sums[i][j])
                        sum_ = builder.call(multiply_add, [left, right[j], sum_])
                        builder.store(sum_, sums[i][j])
            least = _splat(builder, low)
            mask = _first_lanes(builder, outputs, vectors - 1)
            store = _function(
                builder,
                f"llvm.masked.store.v{LANES}f32.p0v{LANES}f32",
                ir.VoidType(),
                [_VECTOR, _VECTOR.as_pointer(), _INDEX, mask.type],
            )
            for i in range(ROWS):
                made = row(i, target, places)
                for j in range(vectors):
                    value = builder.load(sums[i][j])
                    small = builder.fcmp_ordered("<", value, least)
                    value = builder.select(small, least, value)
                    place = _at(builder, made, j * LANES * _SIZE, _VECTOR)
                    if j < vectors - 1:
                        builder.store(value, place).align = _SIZE
                    else:
                        builder.call(store, [value, place, ir.Constant(_INDEX, _SIZE), mask])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10, types.float32), generate

    return tile


def _first_lanes(builder: Any, outputs: Any, vectors: int) -> Any:
    """A mask of the lanes that are left of `outputs` numbers behind so many vectors."""
    kind = ir.VectorType(_INTEGER, LANES)
    lanes = ir.Constant(kind, list(range(LANES)))
    left = builder.sub(outputs, ir.Constant(_INTEGER, vectors * LANES))
    return builder.icmp_signed("<", lanes, _splat(builder, left, kind))


_tile1, _tile2, _tile3, _tile4 = (_tile(vectors) for vectors in (1, 2, 3, 4))


@njit
def product(source, positions, target, places, rows, table, count, weights, bias, outputs, low):
    """The product at `rows` positions.

    All but the last five are addresses or tables of byte offsets.

    Args:
        source: What `positions` and `table` are relative to.
        positions: (rows,) offsets.
        target: What `places` are relative to.
        places: (rows,) offsets of the results.
        rows: Number of positions.
        table: (count,) offsets of the columns.
        count: Number of columns.
        weights: Packed by `fused.pack`.
        bias: Of whole vectors.
        outputs: Numbers to write at each position.
        low: Smaller results are raised to this.
    """
    done = 0
    while done < outputs:
        vectors = min(VECTORS, (outputs - done + LANES - 1) // LANES)
        left = outputs - done
        at = 0
        while at < rows:
            s, t, used = positions + 8 * at, places + 8 * at, rows - at
            if vectors == 4:
                _tile4(source, s, target, t, used, table, count, weights, bias, left, low)
            elif vectors == 3:
                _tile3(source, s, target, t, used, table, count, weights, bias, left, low)
            elif vectors == 2:
                _tile2(source, s, target, t, used, table, count, weights, bias, left, low)
            else:
                _tile1(source, s, target, t, used, table, count, weights, bias, left, low)
            at += ROWS
        size = vectors * LANES
        weights += _SIZE * size * count
        bias += _SIZE * size
        target += _SIZE * size
        done += size
