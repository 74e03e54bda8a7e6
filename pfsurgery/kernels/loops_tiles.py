"""The product of `loops_product` in bfloat16, on a processor's tiles of numbers (Intel AMX).

A tile holds 16 rows of 64 bytes: 16 positions with 32 numbers of each, or as many rows of packed
weights, or 16 x 16 sums in float32. So the left side is read in chunks of 32 numbers that lie side
by side near a position, and 16 positions at a time whose distances are equal; what lies in between
without being wanted is multiplied by zeros or not written.

Numba's cache on disk does not notice a change here, see CONTRIBUTING.md.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pfsurgery.kernels.bottleneck_arguments import PANEL, TILE_ROWS
from pfsurgery.kernels.loops_base import integer
from pfsurgery.kernels.vectors import (
    BYTE,
    INDEX,
    INTEGER,
    LANES,
    VECTOR,
    at,
    first_lanes,
    load,
    load_bfloat16,
    splat,
    store,
)

_LINE = 64  # bytes of a tile's row
_TILE = TILE_ROWS * _LINE
_SUMS = PANEL * 4  # bytes of the sums of one position
binding.initialize_native_asmparser()  # for the one instruction that is written out


@intrinsic
def configure(typing_context: Any, shape: Any, before: Any) -> Any:
    """Give this thread's tiles the shape at one address, and keep their old one at another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shape, before = args
        _tiles(builder, "sttilecfg", at(builder, before, 0, BYTE))
        _tiles(builder, "ldtilecfg", at(builder, shape, 0, BYTE))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def restore(typing_context: Any, before: Any) -> Any:
    """Give this thread's tiles back the shape that `configure` kept."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _tiles(builder, "ldtilecfg", at(builder, args[0], 0, BYTE))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _multiply(
    typing_context: Any,
    first: Any,
    second: Any,
    step: Any,
    chunks: Any,
    count: Any,
    weights: Any,
    bias: Any,
    sums: Any,
) -> Any:
    """Two tiles of positions times two of outputs, and the bias: 32 lines of 32 sums."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, second, step, chunks, count, weights, bias, sums = args
        line, half = ir.Constant(INTEGER, _LINE), TILE_ROWS * _SUMS
        for tile in range(4):
            here = at(builder, bias, tile % 2 * _LINE, BYTE)
            _tiles(builder, "tileloadd64", _tile(tile), here, ir.Constant(INTEGER, 0))
        with cgutils.for_range(builder, count, intp=INTEGER) as loop:
            entry = builder.add(chunks, builder.shl(loop.index, ir.Constant(INTEGER, 3)))
            offset = builder.load(at(builder, entry, 0, INTEGER))
            panel = builder.add(weights, builder.mul(loop.index, ir.Constant(INTEGER, 2 * _TILE)))
            for tile, place in ((4, first), (5, second)):
                here = at(builder, builder.add(place, offset), 0, BYTE)
                _tiles(builder, "tileloadd64", _tile(tile), here, step)
            for tile in (6, 7):
                here = at(builder, panel, (tile - 6) * _TILE, BYTE)
                _tiles(builder, "tileloadd64", _tile(tile), here, line)
            for tile in range(4):
                left, right = _tile(4 + tile // 2), _tile(6 + tile % 2)
                _tiles(builder, "tdpbf16ps", _tile(tile), left, right)
        for tile in range(4):
            here = at(builder, sums, tile // 2 * half + tile % 2 * _LINE, BYTE)
            _tiles(builder, "tilestored64", _tile(tile), here, ir.Constant(INTEGER, _SUMS))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def _finish(whole: bool) -> Any:
    """Write the sums of one position as bfloat16: all of them, or some.

    Before it is rounded, a sum is added to the number that lies `added` bytes from its place, but
    for 0, and raised to `low`.
    """

    @intrinsic
    def finish(
        typing_context: Any, sums: Any, outputs: Any, low: Any, target: Any, added: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sums, outputs, low, target, added = args
            limits: dict[int, Any] = {0: None, LANES: None}
            if not whole:
                for place in limits:
                    left = builder.sub(outputs, ir.Constant(INTEGER, place))
                    limits[place] = first_lanes(builder, left)
            made = {}
            for place in limits:
                made[place] = cgutils.alloca_once_value(builder, load(builder, sums, place * 4))
            with builder.if_then(builder.icmp_signed("!=", added, ir.Constant(INTEGER, 0))):
                there = builder.add(target, added)
                for place, limit in limits.items():
                    more = load_bfloat16(builder, there, 2 * place, limit)
                    total = builder.fadd(builder.load(made[place]), more)
                    builder.store(total, made[place])
            least, raised = splat(builder, low), []
            for place in limits:
                value = builder.load(made[place])
                below = builder.fcmp_ordered("<", value, least)
                raised.append(builder.select(below, least, value))
            rounded = _as_bfloat16(builder, *raised)
            if whole:
                store(builder, rounded, target)
            for place, limit in () if whole else limits.items():
                lanes = ir.Constant(ir.VectorType(INDEX, LANES), [*range(place, place + LANES)])
                half = builder.shuffle_vector(rounded, rounded, lanes)
                store(builder, half, target, 2 * place, limit)
            return context.get_dummy_value()

        kinds = (types.int64, types.int64, types.float32, types.int64, types.int64)
        return types.void(*kinds), generate

    return finish


_finish_all, _finish_some = _finish(True), _finish(False)


@njit
def product(
    source, starts, first, end, step, target, places, least, most,
    chunks, count, weights, bias, outputs, low, sums, added,
):  # fmt: skip
    """The product at the positions of some tiles; everything but the counts is an address.

    Args:
        source: What `starts` and `chunks` are relative to.
        starts: Offset in bytes of each tile's first position.
        first: The first tile.
        end: The tile behind the last one.
        step: Bytes from one position of a tile to the next.
        target: What `places` are relative to.
        places: Offset in bytes of each position's results.
        least: Results with smaller offsets are not written.
        most: Nor are those with offsets from this one on.
        chunks: (count,) offsets in bytes of 32 numbers near a position.
        count: Number of chunks.
        weights: As `fused_tiles.pack_tiles` packs them.
        bias: float32, of whole panels.
        outputs: Numbers to write at each position.
        low: Smaller results are raised to this, as a ReLU does with 0.
        sums: Memory for 32 x 32 sums.
        added: Bytes from each result to a number that is added to it first, 0 for none.
    """
    for done in range(0, outputs, PANEL):
        for tile in range(first, end, 2):
            other = min(tile + 1, end - 1)
            here, there = source + integer(starts, tile), source + integer(starts, other)
            _multiply(here, there, step, chunks, count, weights, bias + done * 4, sums)
            left = outputs - done
            for row in range(TILE_ROWS * (other - tile + 1)):
                place = integer(places, tile * TILE_ROWS + row)
                if least <= place < most:
                    made = target + place + done * 2
                    if left >= PANEL:
                        _finish_all(sums + row * _SUMS, left, low, made, added)
                    else:
                        _finish_some(sums + row * _SUMS, left, low, made, added)
        weights += count * 2 * _TILE


def _as_bfloat16(builder: Any, low: Any, high: Any) -> Any:
    """Two vectors as one of bfloat16 bits; processors with tiles have an instruction for it."""
    kind = ir.FunctionType(ir.VectorType(ir.IntType(16), 2 * LANES), [VECTOR, VECTOR])
    return builder.asm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", [low, high], False)


def _tile(number: int) -> Any:
    return ir.Constant(BYTE, number)


def _tiles(builder: Any, name: str, *values: Any) -> None:
    """One of the instructions that work on tiles."""
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, values)
