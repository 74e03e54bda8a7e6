"""Rounds of the best product for a reduction, and a better reduction for that product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pfsurgery.recover.gram import Groups
from pfsurgery.recover.linalg import RIDGE, cholesky, principal
from pfsurgery.recover.problem import Problem, State, own_operations, reduced_moments, seen_by

_STEPS = 4  # of conjugate gradients in a round; the next round goes on from there


def alternate(problem: Problem, state: State, waist: int | None, rounds: int) -> State:
    """The best state of so many rounds, fewer when they gain nothing."""
    best = state
    for _ in range(rounds):
        reduce = _balance(problem, _solve_reduction(problem, best, _STEPS))
        if not bool(reduce.isfinite().all()):
            break
        state = solve_product(problem, reduce, best.ops, best.channels, waist)
        if state.explained <= best.explained:
            break
        gain = state.explained - best.explained
        best = state
        if gain < 1e-5 * problem.total:
            break
    return best


def solve_product(
    problem: Problem, reduce: Tensor, ops: Tensor, channels: Tensor, waist: int | None
) -> State:
    """The best product for a given reduction and columns."""
    own = own_operations(reduce, ops, channels)
    if own is None:
        gram, cross = reduced_moments(problem, reduce)
        index = ops * len(reduce) + channels
    else:
        seen = seen_by(problem, reduce, own)
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
    return State(reduce, ops, channels, squeeze, turn.T, float(values[:keep].sum()))


@dataclass(frozen=True, slots=True)
class _Normal:
    """The normal equations of the reduction for a given product: `of(reduce) = goal`."""

    of: Callable[[Tensor], Tensor]
    goal: Tensor
    precondition: Callable[[Tensor], Tensor]


def _normal_of_own(problem: Problem, state: State, own: Groups, ridge: float) -> _Normal:
    """One operation a channel: the products of all columns with few others are needed."""
    product = (state.squeeze @ state.turn)[state.channels.argsort()]
    both = product @ product.T
    inner = [(o, rows, cholesky(both[rows][:, rows])) for o, rows in own]

    def of(reduce: Tensor) -> Tensor:
        seen, out = seen_by(problem, reduce, own), torch.empty_like(reduce)
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


def _normal_of_shared(problem: Problem, state: State, ridge: float) -> _Normal:
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


def _solve_reduction(problem: Problem, state: State, steps: int) -> Tensor:
    """Improves the reduction for a given product by preconditioned conjugate gradients."""
    ridge = RIDGE * float(problem.moments.gram.diagonal().mean())
    own = own_operations(state.reduce, state.ops, state.channels)
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
