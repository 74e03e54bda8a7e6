"""The processor's vectors, and how the compiled loops write instructions for them.

Used where a loop optimiser would not find them: tiles that stay in registers, and loops over many
rows at once.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

_FEATURES = binding.get_host_cpu_features()
# Numbers of a vector, and vectors of a tile's row: as many registers as the processor has.
if _FEATURES.get("avx512f"):
    LANES, VECTORS = 16, 4
elif _FEATURES.get("avx2"):
    LANES, VECTORS = 8, 2
else:
    LANES, VECTORS = 4, 4

INTEGER, INDEX, FLOAT, BYTE = ir.IntType(64), ir.IntType(32), ir.FloatType(), ir.IntType(8)
VECTOR = ir.VectorType(FLOAT, LANES)
SIZE = 4  # bytes of a number
_MASK = ir.VectorType(ir.IntType(1), LANES)
BYTES = ir.VectorType(BYTE, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_INTEGERS = ir.VectorType(INDEX, LANES)

Rule = Literal["maximum", "careful", "sum"]

# Kinds of numbers in memory; all are computed with in float32. Numba cannot compute with those of
# two bytes, so integers of their size stand for them.
FLOAT32, BFLOAT16, FLOAT16 = np.float32, np.uint16, np.int16


def at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """The place `offset` bytes behind an address, as a pointer."""
    place = builder.add(address, ir.Constant(INTEGER, offset))
    return builder.inttoptr(place, kind.as_pointer())


def splat(builder: Any, value: Any, kind: Any = VECTOR) -> Any:
    """A vector whose lanes are all `value`."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(INDEX, 0))
    zeros = ir.Constant(ir.VectorType(INDEX, LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, zeros)


def first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes: all where it is larger, none where it is below 1."""
    kind = ir.VectorType(INTEGER, LANES)
    lanes = ir.Constant(kind, list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat(builder, count, kind))


def any_lane(builder: Any, mask: Any) -> Any:
    """1 if a lane is in the mask, else 0."""
    bits = ir.IntType(LANES)
    some = builder.icmp_unsigned("!=", builder.bitcast(mask, bits), ir.Constant(bits, 0))
    return builder.zext(some, INTEGER)


def load(
    builder: Any,
    address: Any,
    offset: int = 0,
    mask: Any = None,
    *,
    kind: Any = VECTOR,
    rest: Any = None,
) -> Any:
    """The vector `offset` bytes behind an address.

    Lanes out of the mask are those of `rest`, a vector or a number for all, or 0.
    """
    place, size = at(builder, address, offset, kind), _size(kind)
    if mask is None:
        return builder.load(place, align=size)
    other = rest
    if not isinstance(rest, ir.Value):
        other = ir.Constant(kind, None if rest is None else [rest] * LANES)
    arguments = [kind.as_pointer(), INDEX, _MASK, kind]
    values = [place, ir.Constant(INDEX, size), mask, other]
    return _call(builder, f"llvm.masked.load.{_suffix(kind)}", kind, arguments, values)


def store(builder: Any, value: Any, address: Any, offset: int = 0, mask: Any = None) -> None:
    """Write a vector, or its lanes in the mask."""
    kind = value.type
    place, size = at(builder, address, offset, kind), _size(kind)
    if mask is None:
        builder.store(value, place, align=size)
        return
    arguments = [kind, kind.as_pointer(), INDEX, _MASK]
    values = [value, place, ir.Constant(INDEX, size), mask]
    _call(builder, f"llvm.masked.store.{_suffix(kind)}", ir.VoidType(), arguments, values)


def bytes_of(kind: Any) -> int:
    """Bytes of a number; `kind` is Numba's type of one of the kinds above."""
    return int(kind.dtype.bitwidth) // 8


def raw(kind: Any) -> Any:
    """Vectors of numbers as they are in memory, for copying."""
    return VECTOR if bytes_of(kind) == SIZE else _SHORTS


def load_numbers(
    builder: Any, kind: Any, address: Any, mask: Any = None, *, rest: float = 0.0
) -> Any:
    """Numbers at an address as float32; those of lanes out of the mask are `rest`."""
    if kind.dtype == types.float32:
        return load(builder, address, 0, mask, rest=rest)
    bits = load(builder, address, 0, mask, kind=_SHORTS)
    if kind.dtype == types.int16:
        made = builder.fpext(builder.bitcast(bits, _HALVES), VECTOR)
    else:
        made = _from_upper_half(builder, bits)
    if mask is None or rest == 0:
        return made
    return builder.select(mask, made, ir.Constant(VECTOR, [rest] * LANES))


def load_bfloat16(builder: Any, address: Any, offset: int = 0, mask: Any = None) -> Any:
    """bfloat16 numbers as float32; those of lanes out of the mask are 0."""
    return _from_upper_half(builder, load(builder, address, offset, mask, kind=_SHORTS))


def _from_upper_half(builder: Any, bits: Any) -> Any:
    upper = builder.shl(builder.zext(bits, _INTEGERS), ir.Constant(_INTEGERS, [16] * LANES))
    return builder.bitcast(upper, VECTOR)


def store_numbers(builder: Any, kind: Any, value: Any, address: Any, mask: Any = None) -> None:
    """Write float32 numbers, rounded to the nearest of `kind`, those halfway to the even one."""
    if kind.dtype == types.int16:
        value = builder.bitcast(builder.fptrunc(value, _HALVES), _SHORTS)
    elif kind.dtype == types.uint16:
        value = _upper_half(builder, value)
    store(builder, value, address, 0, mask)


def _upper_half(builder: Any, value: Any) -> Any:
    def constant(number: int) -> Any:
        return ir.Constant(_INTEGERS, [number] * LANES)

    bits = builder.bitcast(value, _INTEGERS)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(nan, constant(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(16)), _SHORTS)


def load_bytes(builder: Any, address: Any, kind: Any, mask: Any = None) -> Any:
    """Bytes at an address as a vector of larger integers."""
    return builder.zext(load(builder, address, 0, mask, kind=BYTES), kind)


def store_bytes(builder: Any, value: Any, address: Any, mask: Any = None) -> None:
    """Write the low byte of each lane."""
    store(builder, builder.trunc(value, BYTES), address, 0, mask)


def larger(builder: Any, rule: Rule, old: Any, new: Any) -> Any:
    """The larger of two: of equal ones the first; "careful" lets the last NaN win, as ATen does."""
    return builder.select(better(builder, rule, old, new), new, old)


def better(builder: Any, rule: Rule, old: Any, new: Any) -> Any:
    """Lanes in which `larger` takes the new one."""
    more = builder.fcmp_ordered(">", new, old)
    if rule == "careful":
        more = builder.or_(more, builder.fcmp_unordered("uno", new, new))
    return more


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    return _call(builder, f"llvm.fma.v{LANES}f32", VECTOR, [VECTOR] * 3, [a, b, c])


def _size(kind: Any) -> int:
    return SIZE if kind.element == FLOAT else int(kind.element.width) // 8


def _suffix(kind: Any) -> str:
    return f"v{LANES}" + ("f32" if kind.element == FLOAT else f"i{kind.element.width}")


def _call(builder: Any, name: str, result: Any, kinds: list[Any], values: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name)
    return builder.call(function, values)
