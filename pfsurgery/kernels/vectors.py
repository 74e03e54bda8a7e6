"""The processor's vectors, and how the compiled loops write instructions for them.

Used where a loop optimiser would not find them: tiles that stay in registers, and loops over many
rows at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

_FEATURES = binding.get_host_cpu_features()
# Numbers of a vector, and vectors of a tile's row: as many registers as the processor has.
if _FEATURES.get("avx512f"):
    LANES, VECTORS = 16, 4
elif _FEATURES.get("avx2"):
    LANES, VECTORS = 8, 2
else:
    LANES, VECTORS = 4, 4

INTEGER, INDEX, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
SIZE = 4  # bytes of a number
_MASK = ir.VectorType(ir.IntType(1), LANES)


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


def load(builder: Any, address: Any, offset: int = 0, mask: Any = None) -> Any:
    """The vector `offset` bytes behind an address; lanes that are not in the mask are 0."""
    place = at(builder, address, offset, VECTOR)
    if mask is None:
        return builder.load(place, align=SIZE)
    name, arguments = f"llvm.masked.load.v{LANES}f32", [VECTOR.as_pointer(), INDEX, _MASK, VECTOR]
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    return _call(builder, name, VECTOR, arguments, [place, ir.Constant(INDEX, SIZE), mask, zero])


def store(builder: Any, value: Any, address: Any, offset: int = 0, mask: Any = None) -> None:
    """Write a vector, or its lanes in the mask."""
    place = at(builder, address, offset, VECTOR)
    if mask is None:
        builder.store(value, place, align=SIZE)
        return
    name, arguments = f"llvm.masked.store.v{LANES}f32", [VECTOR, VECTOR.as_pointer(), INDEX, _MASK]
    values = [value, place, ir.Constant(INDEX, SIZE), mask]
    _call(builder, name, ir.VoidType(), arguments, values)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    return _call(builder, f"llvm.fma.v{LANES}f32", VECTOR, [VECTOR] * 3, [a, b, c])


def _call(builder: Any, name: str, result: Any, kinds: list[Any], values: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name)
    return builder.call(function, values)
