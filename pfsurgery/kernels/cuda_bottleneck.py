"""A bottleneck's columns and its products behind them in one GPU kernel, in Triton.

The first product reads its columns in place: column k of a position is one channel of one pixel
beside it, both taken from a table, so shifts cost no pass of their own. A narrow waist stays in
registers until the expansion has read it. Averages and maxima are read from planes pooled before.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pfsurgery.sites import Geometry, Size
from pfsurgery.structure import Run

_POSITIONS, _COLUMNS, _OUTPUTS, _LEAST = 64, 32, 64, 16


def _takes_tf32() -> bool:
    """Whether convolutions in float32 may round to TF32, by torch's newer switch or the older."""
    switch = getattr(torch.backends.cudnn, "conv", None)
    if switch is None:
        return bool(torch.backends.cudnn.allow_tf32)
    return bool(switch.fp32_precision == "tf32")


@dataclass(frozen=True, slots=True)
class Taps:
    """Where the columns that are taps are read.

    Attributes:
        channels: Channel of each, int32 (B,).
        down: Rows from the top left pixel of an output's window to it, padding taken off, (B,).
        across: Columns, (B,).
        order: Indices of all columns, those that are taps before those that are pooled.
    """

    channels: Tensor
    down: Tensor
    across: Tensor
    order: Tensor


def taps_of(runs: tuple[Run, ...], geometry: Geometry, size: Size, device: torch.device) -> Taps:
    """The table of the runs that are taps, for images of `size` rows and columns."""
    (top, _), (left, _) = geometry.pads(size)
    rows = [
        (channel, run.top * geometry.dilation[0] - top, run.left * geometry.dilation[1] - left)
        for run in runs
        if run.kind == "tap"
        for channel in run.channels
    ]
    table = torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 3)
    pooled = torch.tensor([run.kind != "tap" for run in runs for _ in run.channels], device=device)
    channels, down, across = table.T.contiguous()
    return Taps(channels, down, across, pooled.int().argsort(stable=True))


@triton.jit
def _bottleneck_kernel(
    source, pooled, target, middle, expand, bias, channels, down, across,
    positions, ROWS, COLUMNS, OUT_ROWS, OUT_COLUMNS, STRIDE_Y, STRIDE_X,
    IMAGE_STEP, CHANNEL_STEP, ROW_STEP, COLUMN_STEP, taps, pools, width, outputs,
    HAS_WAIST: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = place < positions
    y = place // OUT_COLUMNS % OUT_ROWS * STRIDE_Y
    x = place % OUT_COLUMNS * STRIDE_X
    image = source + place // (OUT_COLUMNS * OUT_ROWS) * IMAGE_STEP
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    kept = r < width
    made = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for first in range(0, taps, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        used = k < taps
        row = y[:, None] + tl.load(down + k, mask=used, other=0)[None, :]
        column = x[:, None] + tl.load(across + k, mask=used, other=0)[None, :]
        step = tl.load(channels + k, mask=used, other=0).to(tl.int64) * CHANNEL_STEP
        inside = (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS)
        read = image[:, None] + step[None, :] + row * ROW_STEP + column * COLUMN_STEP
        values = tl.load(read, mask=inside & valid[:, None] & used[None, :], other=0.0)
        weights = tl.load(
            middle + k[:, None] * width + r[None, :], mask=used[:, None] & kept[None, :], other=0.0
        )
        made += tl.dot(values, weights, input_precision=PRECISION)
    for first in range(0, pools, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        used = k < pools
        values = tl.load(
            pooled + place[:, None] * pools + k[None, :],
            mask=valid[:, None] & used[None, :],
            other=0.0,
        )
        weights = tl.load(
            middle + (taps + k)[:, None] * width + r[None, :],
            mask=used[:, None] & kept[None, :],
            other=0.0,
        )
        made += tl.dot(values, weights, input_precision=PRECISION)
    if HAS_WAIST:
        narrow = made.to(target.dtype.element_ty)
        for first in range(0, outputs, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            wanted = m < outputs
            weights = tl.load(
                expand + r[:, None] * outputs + m[None, :],
                mask=kept[:, None] & wanted[None, :],
                other=0.0,
            )
            out = tl.dot(narrow, weights, input_precision=PRECISION)
            out += tl.load(bias + m, mask=wanted, other=0.0).to(tl.float32)[None, :]
            if RELU:
                out = tl.where(out < 0, 0.0, out)
            tl.store(
                target + place[:, None] * outputs + m[None, :],
                out.to(target.dtype.element_ty),
                mask=valid[:, None] & wanted[None, :],
            )
    else:
        made += tl.load(bias + r, mask=kept, other=0.0).to(tl.float32)[None, :]
        if RELU:
            made = tl.where(made < 0, 0.0, made)
        tl.store(
            target + place[:, None] * outputs + r[None, :],
            made.to(target.dtype.element_ty),
            mask=valid[:, None] & kept[None, :],
        )


def bottleneck(
    x: Tensor,
    pooled: Tensor | None,
    taps: Taps,
    size: Size,
    stride: Size,
    middle: Tensor,
    expand: Tensor | None,
    bias: Tensor,
    *,
    relu: bool = False,
) -> Tensor:
    """Columns of (N, C, H, W) times one product or two, plus a bias: (N, C_out, H', W').

    Args:
        x: The (reduced) input, in any layout.
        pooled: Averages and maxima (N, P, H', W'), the columns behind the taps.
        taps: The columns that are taps.
        size: Rows and columns of the output.
        stride: Of the windows.
        middle: First product (B + P, R), of the taps and then of the pools.
        expand: Second product (R, C_out) with a narrow R (256 or less), None without a waist.
        bias: (C_out,).
        relu: Raise negative outputs to 0.

    Returns:
        The output with channels innermost, summed in float32 and rounded to the dtype of `x`.
    """
    images, width = len(x), middle.shape[1]
    outputs = width if expand is None else expand.shape[1]
    shape = (images, outputs, *size)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    positions = images * size[0] * size[1]
    if positions == 0:
        return out
    planes = x if pooled is None else pooled.contiguous(memory_format=torch.channels_last)
    block = triton.next_power_of_2(width) if expand is not None else _OUTPUTS
    block = max(_LEAST, block)
    grid = (triton.cdiv(positions, _POSITIONS), triton.cdiv(width, block))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _bottleneck_kernel[grid](
            *(x, planes, out, middle, middle if expand is None else expand, bias),
            *(taps.channels, taps.down, taps.across, positions, x.shape[2], x.shape[3]),
            *(*size, *stride, x.stride(0), x.stride(1), x.stride(2), x.stride(3)),
            *(len(taps.channels), 0 if pooled is None else pooled.shape[1], width, outputs),
            HAS_WAIST=expand is not None,
            RELU=relu,
            PRECISION="tf32" if _takes_tf32() else "ieee",
            BLOCK=_POSITIONS,
            BLOCK_K=_COLUMNS,
            BLOCK_R=block,
            BLOCK_M=_OUTPUTS,
        )
    return out
