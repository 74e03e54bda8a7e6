"""From a fit to what stands in the network: its structure, and its weights in the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.recover.columns import Operation
from pfsurgery.recover.fit import Fit
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure

_DENORMAL = 1e-30  # smaller weights slow a product fourfold and say nothing


def op_of(structure: Structure) -> str:
    """Name of the op that a structure belongs to."""
    if structure.form == "bare":
        return "bare"
    return "thin" if structure.dense else "mixed"


def structure_of(fit: Fit, ops: Sequence[Operation]) -> Structure:
    """The widths and columns of a fit."""
    dense = fit.form in ("thin", "low_rank")
    return Structure(
        form=fit.form,
        reduce=None if fit.reduce is None else len(fit.reduce),
        runs=() if dense else _runs(fit.ops, fit.channels, ops),
        waist=None if fit.waist is None else len(fit.waist),
        error=round(fit.error, 6),
    )


def bare_structure(chosen: Tensor, ops: Sequence[Operation], error: float = 0.0) -> Structure:
    """One operation a channel.

    Args:
        chosen: Index of each channel's operation, (C,).
        ops: The operations.
        error: Relative error behind the pointwise layer that follows.
    """
    runs = _runs(chosen, torch.arange(len(chosen)), ops)
    return Structure("bare", None, runs, None, round(error, 6))


def _runs(chosen: Tensor, channels: Tensor, ops: Sequence[Operation]) -> tuple[Run, ...]:
    """The columns by operation; `chosen` is each one's operation, (B,)."""
    found = []
    for place, op in enumerate(ops):
        mine = tuple(channels[chosen == place].tolist())
        if mine:
            found.append(Run(op.kind, op.top, op.left, op.height, op.width, mine))
    return tuple(found)


@torch.no_grad()
def set_weights(module: Bottleneck, fit: Fit, ops: Sequence[Operation], geometry: Geometry) -> None:
    """Put the fit's weights into a module that was built with its structure."""
    if fit.reduce is not None and module.reduce is not None:
        _put(module.reduce, fit.reduce[:, :, None, None])
    if fit.waist is not None and module.waist is not None:
        dense = module.columns is None
        weight = _kernel(fit, ops, geometry) if dense else fit.waist[:, :, None, None]
        _put(module.waist, weight)
    _put(module.expand, fit.expand[:, :, None, None], fit.bias)


def _kernel(fit: Fit, ops: Sequence[Operation], geometry: Geometry) -> Tensor:
    """The dense middle as a convolution's weight (r2, r1, height, width)."""
    if fit.waist is None:
        raise ValueError("a dense form has a waist")
    width = geometry.in_channels if fit.reduce is None else len(fit.reduce)
    kernel = fit.waist.new_zeros(len(fit.waist), width, *geometry.kernel_size)
    for place, op in enumerate(ops):
        mine = fit.ops == place
        if op.kind == "tap":
            kernel[:, fit.channels[mine], op.top, op.left] = fit.waist[:, mine]
    return kernel


def _put(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    conv.weight.copy_(torch.where(weight.abs() < _DENORMAL, 0.0, weight))
    if bias is not None and conv.bias is not None:
        conv.bias.copy_(bias)
