"""Bottlenecks: reduce, operate, expand, fitted by alternating least squares on second moments.

All forms share one model. With X_o the channels under operation o, R the reduction (r1 x C) and
D_o (r1 x C_out) the product of operation o's columns, the output is the sum over o of
X_o R' D_o. D has a row for each column chosen and may be limited to a waist's rank. Given R, D is a
(reduced-rank) regression; given D, R is a least-squares problem solved by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pfsurgery.recover.fit import Fit, Form, cost, refit_expansion
from pfsurgery.recover.fit_columns import select_columns
from pfsurgery.recover.gram import Moments
from pfsurgery.recover.linalg import RIDGE, cholesky, principal

ROUNDS = 6
_STEPS = 4  # of conjugate gradients in a round; the next round goes on from there


@dataclass(frozen=True)
class Problem:
    """One site's linear columns, prepared for fitting bottlenecks of any width.

    Attributes:
        moments: Of the linear columns only.
        weights: Importance of each output (C_out,).
        ops: Number of linear operations.
        cross: Products with the weighted targets, (ops, C, C_out).
        full: The unrestricted least-squares solution, (ops, C, C_out).
        whitener: Inverse of the Cholesky factor of the channels' covariance averaged over
            operations, (C, C).
        factors: Cholesky factors of each operation's own covariance, (ops, C, C).
        total: Variance of the weighted targets.
        reuse: Input positions for each output position.
    """

    moments: Moments
    weights: Tensor
    ops: int
    cross: Tensor
    full: Tensor
    whitener: Tensor
    factors: Tensor
    total: float
    reuse: float

    @property
    def channels(self) -> int:
        """Input channels C."""
        return self.cross.shape[1]

    @property
    def targets(self) -> int:
        """Output channels C_out."""
        return self.cross.shape[2]

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """Singular vectors (ops, C, k) and values (ops, k) of each operation's part of `full`."""
        colour = self.factors.transpose(1, 2) @ self.full
        left, values, _ = torch.linalg.svd(colour, full_matrices=False)
        return left, values


def prepare(moments: Moments, weights: Tensor, ops: int, *, reuse: float = 1.0) -> Problem:
    """Prepares a site's moments.

    Args:
        moments: Of the columns of linear operations (taps, averages), ops * C of them.
        weights: (C_out,).
        ops: Number of operations.
        reuse: Input positions for each output position (the stride's area).
    """
    channels = len(moments.gram) // ops
    weighted = moments.cross * weights
    full = torch.cholesky_solve(weighted, cholesky(moments.gram))
    blocks = moments.gram.view(ops, channels, ops, channels)
    own = torch.stack([blocks[o, :, o] for o in range(ops)])
    eye = torch.eye(channels, dtype=weighted.dtype)
    mean = cholesky(own.mean(0))
    return Problem(
        moments=moments,
        weights=weights,
        ops=ops,
        cross=weighted.view(ops, channels, -1),
        full=full.view(ops, channels, -1),
        whitener=torch.linalg.solve_triangular(mean, eye, upper=False),
        factors=cholesky(own),
        total=float((moments.target.diagonal() * weights.square()).sum()),
        reuse=reuse,
    )


@dataclass(frozen=True, slots=True)
class _State:
    """A bottleneck while it is fitted: D = squeeze @ turn."""

    reduce: Tensor  # (r1, C)
    ops: Tensor  # (B,)
    channels: Tensor  # (B,)
    squeeze: Tensor  # (B, k)
    turn: Tensor  # (k, C_out), orthonormal rows
    explained: float


def reduced_moments(problem: Problem, reduce: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix (ops * r1, ops * r1) and products (ops * r1, C_out) of the reduced columns."""
    o, c, r = problem.ops, problem.channels, len(reduce)
    half = problem.moments.gram.view(o * c, o, c) @ reduce.T
    gram = reduce @ half.view(o, c, o * r)
    return gram.view(o * r, o * r), (reduce @ problem.cross).flatten(0, 1)


def _solve_product(
    problem: Problem, reduce: Tensor, ops: Tensor, channels: Tensor, waist: int | None
) -> _State:
    """The best product for a given reduction and columns."""
    own = _own_operations(reduce, ops, channels, problem.ops)
    if own is None:
        gram, cross = reduced_moments(problem, reduce)
        index = ops * len(reduce) + channels
    else:
        seen = _seen(problem, reduce, own)
        gram = seen.new_empty(len(reduce), len(reduce))
        cross = seen.new_empty(len(reduce), problem.targets)
        for o, rows in own:
            gram[rows] = reduce[rows] @ seen[o]
            cross[rows] = reduce[rows] @ problem.cross[o]
        index = channels
    gram, cross = gram[index][:, index], cross[index]
    factor = cholesky(gram)
    values, directions = principal(cross, factor)
    keep = min(len(index), problem.targets, waist or problem.targets)
    turn = directions[:, :keep]
    squeeze = torch.cholesky_solve(cross @ turn, factor)
    return _State(reduce, ops, channels, squeeze, turn.T, float(values[:keep].sum()))


Own = list[tuple[int, Tensor]]  # operations, and the channels that have no other one


def _own_operations(reduce: Tensor, ops: Tensor, channels: Tensor, count: int) -> Own | None:
    """The channels of each operation, or None if a channel has several or none."""
    if len(ops) != len(reduce) or len(set(channels.tolist())) != len(reduce):
        return None
    op = torch.empty(len(reduce), dtype=torch.long)
    op[channels] = ops
    rows = [(o, (op == o).nonzero()[:, 0]) for o in range(count)]
    return [(o, mine) for o, mine in rows if len(mine)]


def _seen(problem: Problem, reduce: Tensor, own: Own) -> Tensor:
    """Products of all columns with the reduced channels' own ones, (ops, C, r1)."""
    c = problem.channels
    seen = reduce.new_empty(problem.ops * c, len(reduce))
    for o, rows in own:
        seen[:, rows] = problem.moments.gram[:, o * c : (o + 1) * c] @ reduce[rows].T
    return seen.view(problem.ops, c, -1)


@dataclass(frozen=True, slots=True)
class _Normal:
    """The normal equations of the reduction for a given product: `of(reduce) = goal`."""

    of: Callable[[Tensor], Tensor]
    goal: Tensor
    precondition: Callable[[Tensor], Tensor]


def _normal_of_own(problem: Problem, state: _State, own: Own, ridge: float) -> _Normal:
    """One operation a channel: the products of all columns with few others are needed."""
    product = torch.empty_like(state.squeeze @ state.turn)
    product[state.channels] = state.squeeze @ state.turn
    both = product @ product.T
    inner = [(o, rows, cholesky(both[rows][:, rows])) for o, rows in own]

    def of(reduce: Tensor) -> Tensor:
        seen, out = _seen(problem, reduce, own), torch.empty_like(reduce)
        for o, rows in own:
            out[rows] = (seen[o] @ both[:, rows]).T + ridge * both[rows][:, rows] @ reduce[rows]
        return out

    def precondition(residual: Tensor) -> Tensor:
        out = torch.empty_like(residual)
        for o, rows, factor in inner:
            left = torch.cholesky_solve(residual[rows], factor)
            out[rows] = torch.cholesky_solve(left.T, problem.factors[o]).T
        return out

    goal = torch.empty_like(state.reduce)
    for o, rows in own:
        goal[rows] = product[rows] @ problem.cross[o].T
    return _Normal(of, goal, precondition)


def _normal_of_shared(problem: Problem, state: _State, ridge: float) -> _Normal:
    """Channels with several operations, or none."""
    r, c, k = len(state.reduce), problem.channels, state.squeeze.shape[1]
    product = state.squeeze.new_zeros(problem.ops, r, k)
    product[state.ops, state.channels] = state.squeeze
    shared = cholesky((product @ product.transpose(1, 2)).sum(0))

    def of(reduce: Tensor) -> Tensor:
        spread = torch.einsum("ic,oik->ock", reduce, product).reshape(-1, k)
        back = (problem.moments.gram @ spread + ridge * spread).view(problem.ops, c, k)
        return torch.einsum("ock,oik->ic", back, product)

    def precondition(residual: Tensor) -> Tensor:
        left: Tensor = torch.cholesky_solve(residual, shared)
        return left @ problem.whitener.T @ problem.whitener

    goal = torch.einsum("ock,oik->ic", problem.cross @ state.turn.T, product)
    return _Normal(of, goal, precondition)


def _solve_reduction(problem: Problem, state: _State, steps: int) -> Tensor:
    """Improves the reduction for a given product by preconditioned conjugate gradients."""
    ridge = RIDGE * float(problem.moments.gram.diagonal().mean())
    own = _own_operations(state.reduce, state.ops, state.channels, problem.ops)
    if own is None:
        equations = _normal_of_shared(problem, state, ridge)
    else:
        equations = _normal_of_own(problem, state, own, ridge)
    normal, precondition = equations.of, equations.precondition
    reduce = state.reduce
    residual = equations.goal - normal(reduce)
    direction = precondition(residual)
    power = (residual * direction).sum()
    for _ in range(steps):
        if float(power) <= 1e-14 * problem.total:
            break
        image = normal(direction)
        curvature = (direction * image).sum()
        if not float(curvature) > 0:  # the Gram matrix is singular up to rounding
            break
        step = power / curvature
        reduce = reduce + step * direction
        residual = residual - step * image
        ahead = precondition(residual)
        fresh = (residual * ahead).sum()
        direction = ahead + (fresh / power) * direction
        power = fresh
    return reduce


def _balance(problem: Problem, reduce: Tensor) -> Tensor:
    """Scales every reduced channel to unit variance, which changes nothing but the rounding."""
    deviation: Tensor = (reduce @ torch.linalg.inv(problem.whitener)).norm(dim=1)
    return reduce / deviation.clamp(min=1e-30)[:, None]


def _alternate(problem: Problem, state: _State, waist: int | None, rounds: int) -> _State:
    best = state
    for _ in range(rounds):
        reduce = _balance(problem, _solve_reduction(problem, best, _STEPS))
        if not bool(reduce.isfinite().all()):
            break
        state = _solve_product(problem, reduce, best.ops, best.channels, waist)
        if state.explained <= best.explained:
            break
        gain = state.explained - best.explained
        best = state
        if gain < 1e-5 * problem.total:
            break
    return best


def _finish(problem: Problem, state: _State, form: Form, waist: bool) -> Fit:
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


def fit_thin(problem: Problem, r1: int, r2: int, *, rounds: int = ROUNDS) -> Fit:
    """Reduce to r1, dense kernel r1 -> r2, expand: a data-aware Tucker-2 decomposition.

    Alternating least squares on second moments as in Kalle, Rudkiewicz, Ouerfelli &
    Tamaazousti, NeurIPS 2025, arXiv 2511.04494.
    """
    ops = torch.arange(problem.ops).repeat_interleave(r1)
    channels = torch.arange(r1).repeat(problem.ops)
    reduce = leading_reduction(problem, r1)
    state = _solve_product(problem, reduce, ops, channels, r2)
    return _finish(problem, _alternate(problem, state, r2, rounds), "thin", True)


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
    state = _solve_product(problem, reduce, op, torch.arange(most), None)
    return _finish(problem, _alternate(problem, state, None, rounds), "bottleneck", False)


def fit_mixed(problem: Problem, r1: int, columns: int, r2: int, *, rounds: int = ROUNDS) -> Fit:
    """Reduce to r1, `columns` columns of the reduced channels, waist r2, expand.

    The columns are chosen by forward selection after a thin bottleneck of the same widths has
    been fitted, then all parts are solved in turn.
    """
    ops = torch.arange(problem.ops).repeat_interleave(r1)
    every = torch.arange(r1).repeat(problem.ops)
    state = _solve_product(problem, leading_reduction(problem, r1), ops, every, r2)
    state = _alternate(problem, state, r2, rounds)
    gram, cross = reduced_moments(problem, state.reduce)
    index = select_columns(gram, cross @ state.turn.T, columns).order.sort().values
    state = _solve_product(problem, state.reduce, index // r1, index % r1, r2)
    return _finish(problem, _alternate(problem, state, r2, rounds), "mixed", True)
