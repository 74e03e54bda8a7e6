"""What the compiled loops stand on: memory by address, and how their arguments are laid out.

Arrays are addresses here, so that a tap of a window is the same row at another address. An image
is `ROWS` x `COLUMNS` pixels of `STEP` numbers side by side: the channels of a channels_last
tensor, or one number where each plane of an NCHW tensor counts as an image of its own.

Numba's cache on disk does not notice a change here, see CONTRIBUTING.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Places in the block of 64-bit integers that an entry point reads its arguments from.
COUNTER, UNITS, SOURCE, TARGET, NAME, IMAGES, STEP, ROWS, COLUMNS = range(9)
TARGET_ROWS, TARGET_COLUMNS, GROUP, DOWN, ACROSS = range(9, 14)
ARGUMENTS = 14
# Places in the block that describes an axis (see `axes.Axis`).
MOST, STRIDE, FIRST, LAST, SPAN, POSITIONS, SLOTS, COUNTS, WEIGHTS, NAMES = range(10)
KERNEL, DILATION, PADDING = range(10, 13)
AXIS = 13
MOST_TAPS = 256


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as the pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def address(typing_context: Any, pointer: Any) -> Any:
    """A pointer as an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(types.voidptr), generate


@intrinsic
def take(typing_context: Any, address: Any) -> Any:
    """The counter at an address, which grows by one: no two threads get the same value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


@njit(inline="always")
def line(address, length, dtype):
    return carray(pointer(address), (length,), dtype)


@njit(forceinline=True)
def integer(address, place):
    return line(address, place + 1, np.int64)[place]
