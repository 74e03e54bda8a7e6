"""Columns chosen one by one: orthogonal least squares, with one product or a narrow waist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pfsurgery.recover.fit import Fit, cost, refit_expansion
from pfsurgery.recover.gram import DOUBLE, Moments
from pfsurgery.recover.linalg import RIDGE, cholesky, principal

_AHEAD = 32  # columns whose products are known when one of them is chosen
_DEPENDENT = 1e-6  # a column with less of its variance left than this adds rounding errors
_VISITS = 3  # to every channel, at most, where each keeps one operation
_RIDGE_SINGLE = 1e-4  # of the mean variance: more than float32 errs, so that no rank runs out


@dataclass(frozen=True, slots=True)
class Selection:
    """Columns in the order in which they were chosen.

    Attributes:
        order: Indices of the columns, (B,).
        factor: Cholesky factor of the chosen columns' Gram matrix, (B, B).
        removed: Variance of the goal that the first 1, 2, ... columns explain, (B,).
    """

    order: Tensor
    factor: Tensor
    removed: Tensor


def select_columns(
    gram: Tensor, goal: Tensor, most: int, *, exclusive: Tensor | None = None
) -> Selection:
    """Forward selection by orthogonal least squares.

    Each step takes the column with the largest (r . r) / g, r being its product with what is left
    of the goal and g what is left of its variance, and takes it out of all others. The error
    curve is exact. Chen, Billings & Luo, Int. J. Control 1989.

    Args:
        gram: (K, K).
        goal: Products of the columns with the goal, (K, M).
        most: Columns to choose; fewer if the rest are linearly dependent.
        exclusive: Group of each column (K,): at most one column a group is chosen.
    """
    left = gram.diagonal().clone()
    if len(gram) > DOUBLE:  # no more exact than float32 itself, and memory decides the time
        gram, goal = gram.float(), goal.float()
        left = (left + _RIDGE_SINGLE * left.mean()).float()
    least = torch.maximum(left * _DEPENDENT, left.max() * 1e-14)
    rest = goal.clone()
    most = min(most, len(gram))
    basis = gram.new_zeros(most, len(gram))
    free = torch.ones_like(left, dtype=torch.bool)
    taken = torch.zeros_like(free)
    order: list[int] = []
    removed: list[Tensor] = []
    ahead, rows, known = torch.empty(0, dtype=torch.long), gram[:0], dict[int, int]()
    for b in range(most):
        power = torch.linalg.vector_norm(rest, dim=1).square()
        score = torch.where(free & (left > least), power / left.clamp(min=1e-300), -1.0)
        j = int(score.argmax())
        if float(score[j]) < 0:
            break
        if j not in known:  # one pass over the basis serves all that are likely to follow
            score[j] = torch.inf  # it is one of them, though many be equal
            ahead = score.topk(min(_AHEAD, len(score))).indices
            rows = gram[ahead] - basis[:b, ahead].T @ basis[:b]
            known = {column: place for place, column in enumerate(ahead.tolist())}
        deviation = left[j].sqrt()
        row = rows[known[j]].masked_fill(taken, 0.0)
        row[j] = left[j]
        row /= deviation
        rows.addcmul_(row[ahead, None], row, value=-1)
        share = rest[j] / deviation
        rest.addcmul_(row[:, None], share, value=-1)
        left -= row.square()
        basis[b] = row
        free[j], taken[j] = False, True
        if exclusive is not None:
            free &= exclusive != exclusive[j]
        order.append(j)
        removed.append(share.square().sum())
    if not order:  # all columns are zero, and any of them stands for all
        one = torch.ones(1, 1, dtype=torch.float64)
        return Selection(torch.zeros(1, dtype=torch.long), one, one.new_zeros(1))
    index = torch.tensor(order, dtype=torch.long)
    factor = basis[: len(order)][:, index].T.contiguous().double()
    return Selection(index, factor, torch.stack(removed).double().cumsum(0))


def column_curve(moments: Moments, weights: Tensor, most: int) -> tuple[Selection, Tensor]:
    """Selection for one product, and the relative error after 0, 1, 2, ... columns (B + 1,)."""
    chosen = select_columns(moments.gram, moments.cross * weights, most)
    total = moments.variance(weights)
    error = torch.cat([chosen.removed.new_zeros(1), chosen.removed])
    return chosen, 1 - error / total if total > 0 else torch.zeros_like(error)


def output_directions(moments: Moments, weights: Tensor) -> Tensor:
    """Principal directions of what all columns together explain, largest first, (C_out, C_out)."""
    return principal(moments.cross * weights, cholesky(moments.gram))[1]


def waist_curve(
    moments: Moments,
    weights: Tensor,
    waist: int,
    columns: Sequence[int],
    directions: Tensor | None = None,
) -> tuple[Selection, list[float]]:
    """Selection for a waist, and the relative error at each number of columns.

    The goal of the selection is the output projected on its first principal directions; the error
    is that of reduced-rank regression on the columns chosen.

    Args:
        moments: Of all columns.
        weights: (C_out,).
        waist: Width r of the waist.
        columns: Numbers of columns wanted, increasing.
        directions: Principal directions of the outputs, largest first, (C_out, C_out), where they
            are known already: all columns' or, nearly the same, the linear ones'.
    """
    cross = moments.cross * weights
    if directions is None:
        directions = output_directions(moments, weights)
    chosen = select_columns(moments.gram, cross @ directions[:, :waist], columns[-1])
    half = torch.linalg.solve_triangular(chosen.factor, cross[chosen.order], upper=False)
    total = moments.variance(weights)
    errors = []
    for count in columns:
        part = half[:count]
        small = part @ part.T if len(part) < part.shape[1] else part.T @ part
        kept = torch.linalg.eigvalsh(small).clamp(min=0)[-waist:].sum()
        errors.append(1 - float(kept) / total if total > 0 else 0.0)
    return chosen, errors


def fit_columns(
    moments: Moments, weights: Tensor, ops: int, chosen: Selection, columns: int, waist: int | None
) -> Fit:
    """The fit on the first `columns` of a selection, by one product or through a waist.

    Columns are sorted by operation, then channel, so that each operation works on one run.
    """
    channels = len(moments.gram) // ops
    index = chosen.order[:columns].sort().values
    kept = moments.columns(index)
    cross = kept.cross * weights
    factor = cholesky(kept.gram)
    out = moments.cross.shape[1]
    squeeze = None
    if waist is not None and waist < min(len(index), out):
        _, directions = principal(cross, factor)
        squeeze = torch.cholesky_solve(cross @ directions[:, :waist], factor).T
    width = len(index) if squeeze is None else len(squeeze)
    fit = Fit(
        form="columns" if squeeze is None else "waist",
        ops=index // channels,
        channels=index % channels,
        reduce=None,
        waist=squeeze,
        expand=cross.new_zeros(out, width),
        bias=cross.new_zeros(out),
        error=1.0,
        macs=cost(channels, out, len(index), None, None if squeeze is None else width),
    )
    return refit_expansion(fit, moments, ops, weights)


def fit_bare(moments: Moments, weights: Tensor, ops: int, centre: int) -> Fit:
    """One operation for every channel, the product being the pointwise convolution that follows.

    Starts from forward selection with at most one column a channel, then revisits every channel
    and takes the operation that is best with all others fixed, until nothing changes.

    Args:
        moments: Of all columns, with the pointwise convolution's output as target.
        weights: (C_out,) of the pointwise convolution.
        ops: Number of operations.
        centre: Which of them is the channel itself, as channels that say nothing are left.
    """
    channels = len(moments.gram) // ops
    owner = torch.arange(len(moments.gram)) % channels
    cross = moments.cross * weights
    gram = moments.gram + RIDGE * moments.gram.diagonal().mean() * torch.eye(len(owner)).to(cross)
    first = select_columns(moments.gram, cross, channels, exclusive=owner)
    op = torch.full((channels,), centre, dtype=torch.long)
    op[first.order % channels] = first.order // channels
    for _ in range(_VISITS):
        before = op.clone()
        index = op * channels + torch.arange(channels)
        inverse = torch.cholesky_inverse(cholesky(gram[index][:, index]))
        for c in range(channels):
            # The inverse without channel c, whose row and column become zero.
            without = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
            mine = torch.arange(ops) * channels + c
            side = without @ gram[index][:, mine]
            rest = cross[mine] - side.T @ cross[index]
            left = gram[mine, mine] - (gram[index][:, mine] * side).sum(0)
            scale = gram[mine, mine] * _DEPENDENT + 1e-300
            score = torch.where(left > scale, rest.square().sum(1) / left.clamp(min=1e-300), 0.0)
            if float(score.max()) > float(score[op[c]]) * (1 + 1e-9):
                best = int(score.argmax())
                op[c], index[c] = best, mine[best]
                border = side[:, best].clone()
                border[c] = -1.0
                inverse = without + torch.outer(border, border) / left[best]
        if bool((op == before).all()):
            break
    out = cross.shape[1]
    fit = Fit(
        form="bare",
        ops=op,
        channels=torch.arange(channels),
        reduce=None,
        waist=None,
        expand=cross.new_zeros(out, channels),
        bias=cross.new_zeros(out),
        error=1.0,
        macs=float(channels * out),
    )
    return refit_expansion(fit, moments, ops, weights)
