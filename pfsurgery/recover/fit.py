"""What a fit is: the weights of a bottleneck of columns, its error and its cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pfsurgery.recover.gram import Moments, by_operation, products_with
from pfsurgery.recover.linalg import weighted_ridge

Form = Literal["columns", "waist", "bottleneck", "mixed", "thin", "low_rank", "bare"]


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted bottleneck: optional reduction, B columns, optional waist, expansion, bias.

    `y = expand @ (waist @ columns(reduce @ x)) + bias` at every position; column b is operation
    `ops[b]` on channel `channels[b]` of the reduced input (or of the input, without reduction).

    Attributes:
        form: "columns" (one product), "waist", "bottleneck" (reduce, one operation a channel,
            expand), "mixed" (reduce, columns, waist, expand), "thin" (reduce, every tap of every
            channel into the waist, expand: a dense convolution between reduced widths),
            "low_rank" (thin without a reduction) or "bare" (one operation a channel; the
            expansion is the pointwise convolution that follows).
        ops: Operation of each column, (B,), indices into the site's operations.
        channels: Channel of each column, (B,).
        reduce: (r1, C) or None.
        waist: (r2, B) or None.
        expand: (C_out, r2) or (C_out, B).
        bias: (C_out,).
        error: Squared error as a share of the targets' variance, in the weights' measure.
        macs: Multiply-adds an output position (those of the reduction counted `reuse` times).
    """

    form: Form
    ops: Tensor
    channels: Tensor
    reduce: Tensor | None
    waist: Tensor | None
    expand: Tensor
    bias: Tensor
    error: float
    macs: float


def cost(
    channels: int, targets: int, columns: int, r1: int | None, r2: int | None, reuse: float = 1.0
) -> float:
    """Multiply-adds an output position of a bottleneck.

    Args:
        channels: Input channels C.
        targets: Output channels.
        columns: Number of columns B.
        r1: Width of the reduction, None without one.
        r2: Width of the waist, None without one.
        reuse: Input positions for each output position (the stride's area), for the reduction
            runs before the operation.
    """
    reduction = channels * r1 * reuse if r1 is not None else 0.0
    product = columns * targets if r2 is None else r2 * (columns + targets)
    return reduction + product


def effective_kernel(fit: Fit, ops: int, channels: int) -> Tensor:
    """The one product (ops * C, C_out) of all columns that a fit amounts to."""
    out = fit.expand if fit.waist is None else fit.expand @ fit.waist
    kernel = out.new_zeros(ops, channels, out.shape[0])
    for o in range(ops):
        mine = fit.ops == o
        if fit.reduce is None:
            kernel[o].index_add_(0, fit.channels[mine], out.T[mine])
        else:
            kernel[o] = fit.reduce[fit.channels[mine]].T @ out.T[mine]
    return kernel.flatten(0, 1)


def refit_expansion(fit: Fit, moments: Moments, ops: int, weights: Tensor) -> Fit:
    """Solves the expansion and the bias again, ridge by generalised cross-validation.

    Args:
        fit: A fit.
        moments: Of all columns, (ops * C), with the targets wanted now.
        ops: Number of operations.
        weights: (C_out,), importance of the outputs.
    """
    channels = moments.gram.shape[0] // ops
    width = fit.expand.shape[1]
    inner = replace(fit, expand=torch.eye(width, dtype=fit.expand.dtype))
    basis = effective_kernel(inner, ops, channels)
    gram = basis.T @ _products(fit, moments.gram, basis, channels)
    cross = basis.T @ moments.cross
    total = moments.variance(weights)
    expand = weighted_ridge(gram, cross, weights, total, moments.count).T
    bias = moments.target_mean - expand @ (moments.column_mean @ basis)
    weighted = expand.T * weights
    explained = float((weighted * (2 * cross * weights - gram @ weighted)).sum())
    error = (total - explained) / total if total > 0 else 0.0
    return replace(fit, expand=expand, bias=bias, error=error)


def _products(fit: Fit, gram: Tensor, basis: Tensor, channels: int) -> Tensor:
    """`gram @ basis`; without a waist a column has one operation, and zeros for all others."""
    if fit.waist is not None:
        return gram @ basis
    own = basis.view(-1, channels, basis.shape[1])[fit.ops, :, torch.arange(len(fit.ops))]
    return products_with(gram, own, by_operation(fit.ops))
