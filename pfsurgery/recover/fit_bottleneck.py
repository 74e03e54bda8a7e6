"""Bottlenecks: reduce, operate, expand, fitted by alternating least squares on second moments.

All forms share one model. With X_o the channels under operation o, R the reduction (r1 x C) and
D_o (r1 x C_out) the product of operation o's columns, the output is the sum over o of
X_o R' D_o. D has a row for each column chosen and may be limited to a waist's rank. Given R, D is a
(reduced-rank) regression; given D, R is a least-squares problem solved by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pfsurgery.recover.alternate import alternate, solve_product
from pfsurgery.recover.fit import Fit, Form, cost, refit_expansion
from pfsurgery.recover.fit_columns import select_columns
from pfsurgery.recover.linalg import cholesky, principal
from pfsurgery.recover.problem import Problem, State, prepare, reduced_moments

ROUNDS = 6


def _finish(problem: Problem, state: State, form: Form, waist: bool) -> Fit:
    order = (state.ops * len(state.reduce) + state.channels).argsort()
    out = problem.targets
    squeeze = state.squeeze[order].T if waist else None
    width = len(order) if squeeze is None else len(squeeze)
    r1, r2 = len(state.reduce), None if squeeze is None else width
    fit = Fit(
        form=form,
        ops=state.ops[order],
        channels=state.channels[order],
        reduce=state.reduce,
        waist=squeeze,
        expand=state.squeeze.new_zeros(out, width),
        bias=state.squeeze.new_zeros(out),
        error=1.0,
        macs=cost(problem.channels, out, len(order), r1, r2, problem.reuse),
    )
    return refit_expansion(fit, problem.moments, problem.ops, problem.weights)


def leading_reduction(problem: Problem, width: int) -> Tensor:
    """The channels' directions that matter most to the full solution, (width, C).

    The first step of a data-aware higher-order SVD: in the coordinates where the channels are
    white, the leading singular vectors of the full solution.
    """
    colour = torch.linalg.inv(problem.whitener).T
    white = colour @ problem.full
    vectors: Tensor
    _, vectors = torch.linalg.eigh((white @ white.transpose(1, 2)).sum(0))
    return vectors.flip(1)[:, :width].T @ problem.whitener


def narrowed(problem: Problem, width: int) -> Problem:
    """The same seen through the `width` leading directions of the channels, or itself.

    Its totals stay those of all channels, so what the other directions carry counts as error.
    """
    if problem.channels <= width:
        return problem
    lead, seen = leading_reduction(problem, width), problem.moments
    cross = seen.cross.view(problem.ops, problem.channels, -1)
    means = seen.column_mean.view(problem.ops, -1)
    moments = replace(
        seen,
        gram=reduced_moments(problem, lead)[0],
        cross=(lead @ cross).flatten(0, 1),
        column_mean=(means @ lead.T).flatten(),
    )
    return prepare(moments, problem.weights, problem.ops, reuse=problem.reuse)


def fit_thin(problem: Problem, r1: int, r2: int, *, rounds: int = ROUNDS) -> Fit:
    """Reduce to r1, dense kernel r1 -> r2, expand: a data-aware Tucker-2 decomposition.

    Alternating least squares on second moments as in Kalle, Rudkiewicz, Ouerfelli &
    Tamaazousti, NeurIPS 2025, arXiv 2511.04494.
    """
    ops = torch.arange(problem.ops).repeat_interleave(r1)
    channels = torch.arange(r1).repeat(problem.ops)
    reduce = leading_reduction(problem, r1)
    state = solve_product(problem, reduce, ops, channels, r2)
    return _finish(problem, alternate(problem, state, r2, rounds), "thin", True)


def fit_low_rank(problem: Problem, r: int) -> Fit:
    """Dense kernel C -> r, expand: reduced-rank regression on the patches, in one step."""
    gram = problem.moments.gram
    factor = cholesky(gram)
    cross = problem.cross.flatten(0, 1)
    _, directions = principal(cross, factor)
    fit = Fit(
        form="low_rank",
        ops=torch.arange(problem.ops).repeat_interleave(problem.channels),
        channels=torch.arange(problem.channels).repeat(problem.ops),
        reduce=None,
        waist=torch.cholesky_solve(cross @ directions[:, :r], factor).T,
        expand=cross.new_zeros(problem.targets, min(r, problem.targets)),
        bias=cross.new_zeros(problem.targets),
        error=1.0,
        macs=cost(problem.channels, problem.targets, len(gram), None, r),
    )
    return refit_expansion(fit, problem.moments, problem.ops, problem.weights)


def thin_errors(problem: Problem, sizes: Sequence[tuple[int, int]]) -> list[float]:
    """Relative errors of thin bottlenecks (r1, r2) before any alternating round.

    The leading reductions are nested, so one reduced Gram matrix serves all widths, and one
    Cholesky factorisation all waists of a width. Alternating rounds lower the errors by a tenth.
    """
    if problem.total <= 0:
        return [0.0] * len(sizes)
    widest = max(r1 for r1, _ in sizes)
    gram, cross = reduced_moments(problem, leading_reduction(problem, widest))
    explained: dict[int, Tensor] = {}
    for r1 in sorted({r1 for r1, _ in sizes}):
        index = (torch.arange(problem.ops)[:, None] * widest + torch.arange(r1)).flatten()
        factor = cholesky(gram[index][:, index])
        explained[r1] = principal(cross[index], factor)[0].cumsum(0) / problem.total
    return [1 - float(explained[r1][r2 - 1]) for r1, r2 in sizes]


def fit_bottleneck(problem: Problem, r: int, *, rounds: int = ROUNDS) -> Fit:
    """Reduce to r, one operation a channel, expand.

    Starts from the r largest singular vectors over all operations' parts of the full solution.
    Channels are sorted by operation.
    """
    left, values = problem.directions
    most = min(r, values.numel())
    index = values.flatten().topk(most).indices.sort().values
    op, rank = index // values.shape[1], index % values.shape[1]
    rows = left[op, :, rank]
    reduce = torch.linalg.solve_triangular(
        problem.factors[op].transpose(1, 2), rows[:, :, None], upper=True
    )[:, :, 0]
    state = solve_product(problem, reduce, op, torch.arange(most), None)
    return _finish(problem, alternate(problem, state, None, rounds), "bottleneck", False)


def fit_mixed(problem: Problem, r1: int, columns: int, r2: int, *, rounds: int = ROUNDS) -> Fit:
    """Reduce to r1, `columns` columns of the reduced channels, waist r2, expand.

    The columns are chosen by forward selection after a thin bottleneck of the same widths has
    been fitted, then all parts are solved in turn.
    """
    ops = torch.arange(problem.ops).repeat_interleave(r1)
    every = torch.arange(r1).repeat(problem.ops)
    state = solve_product(problem, leading_reduction(problem, r1), ops, every, r2)
    state = alternate(problem, state, r2, rounds)
    gram, cross = reduced_moments(problem, state.reduce)
    index = select_columns(gram, cross @ state.turn.T, columns).order.sort().values
    state = solve_product(problem, state.reduce, index // r1, index % r1, r2)
    return _finish(problem, alternate(problem, state, r2, rounds), "mixed", True)
