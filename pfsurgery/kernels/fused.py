"""Whole bottlenecks on the CPU, each in one call of a compiled kernel."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pfsurgery.errors import ShapeError
from pfsurgery.kernels import bottleneck_arguments as at
from pfsurgery.kernels.cpu import compiled
from pfsurgery.kernels.fused_layout import Program, Weights
from pfsurgery.kernels.fused_tiles import pack_tiles, tile_program
from pfsurgery.kernels.fused_vectors import pack_vectors, vector_program
from pfsurgery.kernels.memory import output
from pfsurgery.kernels.threads import run, threads
from pfsurgery.sites import Geometry
from pfsurgery.structure import Structure

_PROGRAMS = 32  # shapes of inputs that a bottleneck remembers
KERNELS = {
    torch.float32: ("loops_bottleneck", "bottleneck_float32"),
    torch.bfloat16: ("loops_bottleneck_tiles", "bottleneck_bfloat16"),
}
_Arguments = ctypes.c_int64 * at.ARGUMENTS


class Fused:
    """A bottleneck's programs, one for each shape and kind of numbers seen lately.

    Copies start without programs: these hold addresses.
    """

    def __init__(self, geometry: Geometry, structure: Structure) -> None:
        self.geometry, self.structure = geometry, structure
        self.programs: dict[tuple[bool, int, tuple[int, int, int]], Program] = {}
        pooled = any(run.kind != "tap" for run in structure.runs)
        self._has_kernel = not (structure.reduce and pooled)  # which pools what it is given
        self._has_chunks = geometry.in_channels % at.DEPTH == 0

    def __reduce__(self) -> Any:
        """The bottleneck alone."""
        return Fused, (self.geometry, self.structure)

    def computes(self, x: Tensor) -> bool:
        """Whether a kernel computes the whole bottleneck for (N, C, H, W), if any does here."""
        return self._has_kernel and (x.dtype != torch.bfloat16 or self._has_chunks)

    def pack(
        self, reduce: Tensor | None, middle: Tensor, expand: Tensor | None, bias: Tensor
    ) -> Weights:
        """Packs matrices (inputs, outputs) of the products, and the bias (C_out,) of the last."""
        if middle.dtype == torch.bfloat16 and self._has_chunks:
            return pack_tiles(self.geometry, self.structure, reduce, middle, expand, bias)
        return pack_vectors(reduce, middle, expand, bias)

    def __call__(
        self, x: Tensor, weights: Weights, added: Tensor | None = None, *, relu: bool = False
    ) -> Tensor:
        """The bottleneck's output (N, C', H', W') of (N, C, H, W), in the layout of `x`.

        Args:
            x: The input, float32 or bfloat16 on the CPU, that `computes` says yes to.
            weights: Packed by `pack` from weights of the same kind of numbers.
            added: What is added to the output, of the same kind.
            relu: Raise negative numbers to 0, after that.

        Raises:
            ShapeError: `x` has other channels, or is smaller than the window.
        """
        laid_out = x.contiguous(memory_format=torch.channels_last)
        images, channels = x.shape[:2]
        if channels != self.geometry.in_channels:
            raise ShapeError(
                f"A bottleneck of {self.geometry.in_channels} channels was given {channels}."
            )
        program = self._program(x, threads())
        if added is not None:
            if added.shape != (images, *program.shape):
                spread = self(x, weights) + added
                return spread.relu_() if relu else spread
            added = added.contiguous(memory_format=torch.channels_last)
        if program.images == images:
            made = _run(program, weights, laid_out, added, relu)
        else:
            added = None if added is None else _more(added, program.images)
            laid_out = _more(laid_out, program.images)
            made = _run(program, weights, laid_out, added, relu)[:images]
        return made.contiguous() if x.is_contiguous() else made

    def _program(self, x: Tensor, workers: int) -> Program:
        tiled, shape = x.dtype == torch.bfloat16, (x.shape[0], x.shape[2], x.shape[3])
        key = (tiled, workers, shape)
        program = self.programs.get(key)
        if program is None:
            if len(self.programs) >= _PROGRAMS:
                oldest, *_ = self.programs
                self.programs.pop(oldest, None)  # another thread may have been first
            make = tile_program if tiled else vector_program
            program = make(self.geometry, self.structure, shape, workers)
            self.programs[key] = program
        return program


def _more(x: Tensor, images: int) -> Tensor:
    """So many images: these, and zeros behind them."""
    made = F.pad(x, (0, 0, 0, 0, 0, 0, 0, images - len(x)))
    return made.contiguous(memory_format=torch.channels_last)


def _run(program: Program, weights: Weights, x: Tensor, added: Tensor | None, relu: bool) -> Tensor:
    out = output((program.images, *program.shape), x.dtype)
    wanted = min(threads(), program.units)
    scratch = torch.empty(wanted * program.scratch, dtype=x.dtype)
    arguments = _Arguments.from_buffer_copy(program.arguments)
    arguments[at.SOURCE], arguments[at.TARGET] = x.data_ptr(), out.data_ptr()
    arguments[at.SCRATCH] = scratch.data_ptr()
    last = weights.middle if weights.expand is None else weights.expand
    if weights.reduce is not None:
        arguments[at.REDUCE] = weights.reduce.data_ptr()
    arguments[at.WEIGHTS], arguments[at.EXPAND] = weights.middle.data_ptr(), last.data_ptr()
    arguments[at.BIAS], arguments[at.ZEROS] = weights.bias.data_ptr(), weights.zeros.data_ptr()
    if added is not None:
        arguments[at.ADDED] = added.data_ptr() - out.data_ptr()
    arguments[at.RELU] = relu
    run(compiled(*KERNELS[x.dtype]), ctypes.addressof(arguments), wanted)
    return out
