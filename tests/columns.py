"""Columns as planes, and what a fit makes of them: the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pfsurgery.recover.columns import Operation, Window, column_rows
from pfsurgery.recover.fit import Fit


def column_planes(x: Tensor, window: Window, ops: Sequence[Operation]) -> Tensor:
    """All columns of an input as planes, (N, C, H, W) -> (N, len(ops) * C, H', W')."""
    rows, columns = window.output_size(*x.shape[2:])
    flat = column_rows(x, window, ops)
    return flat.view(x.shape[0], rows, columns, -1).permute(0, 3, 1, 2)


def apply_fit(fit: Fit, x: Tensor, window: Window, ops: Sequence[Operation]) -> Tensor:
    """The fitted bottleneck's outputs, (N, C, H, W) -> (N, C_out, H', W'): the reference."""
    hidden = x if fit.reduce is None else torch.einsum("rc,nchw->nrhw", fit.reduce.to(x), x)
    rows, columns = window.output_size(*x.shape[2:])
    flat = column_rows(hidden, window, ops)
    values = flat[:, fit.ops * hidden.shape[1] + fit.channels]
    if fit.waist is not None:
        values = values @ fit.waist.to(x).T
    out = values @ fit.expand.to(x).T + fit.bias.to(x)
    return out.view(x.shape[0], rows, columns, -1).permute(0, 3, 1, 2)
