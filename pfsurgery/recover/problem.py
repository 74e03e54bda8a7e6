"""One site's columns, prepared for fitting, and the state of a bottleneck fitted to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pfsurgery.recover.gram import Groups, Moments, by_operation, products_with
from pfsurgery.recover.linalg import cholesky


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

    @cached_property
    def explained(self) -> Tensor:
        """Principal directions of what `full` explains, largest first, (C_out, C_out)."""
        vectors: Tensor
        _, vectors = torch.linalg.eigh(self.full.flatten(0, 1).T @ self.cross.flatten(0, 1))
        return vectors.flip(1)


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
        total=moments.variance(weights),
        reuse=reuse,
    )


@dataclass(frozen=True, slots=True)
class State:
    """A bottleneck while it is fitted: D = squeeze @ turn.

    Attributes:
        reduce: (r1, C).
        ops: Operation of each column, (B,).
        channels: Its reduced channel, (B,).
        squeeze: (B, k).
        turn: (k, C_out), orthonormal rows.
        explained: Variance of the weighted targets that it explains.
    """

    reduce: Tensor
    ops: Tensor
    channels: Tensor
    squeeze: Tensor
    turn: Tensor
    explained: float


def own_operations(reduce: Tensor, ops: Tensor, channels: Tensor) -> Groups | None:
    """The channels of each operation, or None if a channel has several or none."""
    if len(ops) != len(reduce) or len(set(channels.tolist())) != len(reduce):
        return None
    return by_operation(ops[channels.argsort()])


def seen_by(problem: Problem, reduce: Tensor, own: Groups) -> Tensor:
    """Products of all columns with the reduced channels' own ones, (ops, C, r1)."""
    seen = products_with(problem.moments.gram, reduce, own)
    return seen.view(problem.ops, problem.channels, -1)


def reduced_moments(problem: Problem, reduce: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix (ops * r1, ops * r1) and products (ops * r1, C_out) of the reduced columns."""
    o, c, r = problem.ops, problem.channels, len(reduce)
    half = problem.moments.gram.view(o * c, o, c) @ reduce.T
    gram = reduce @ half.view(o, c, o * r)
    return gram.view(o * r, o * r), (reduce @ problem.cross).flatten(0, 1)
