"""Least squares from second moments: singular matrices, ridge by cross-validation, low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from pfsurgery.errors import DataError

RIDGE = 1e-6  # of the mean diagonal: far below any signal, enough for a singular Gram matrix
_EXACT = 1e-6  # a smaller share of the variance left is rounding: nothing to regularise
_LADDER = torch.logspace(-7, 0, 15, dtype=torch.float64)


def cholesky(gram: Tensor) -> Tensor:
    """Lower Cholesky factor of a positive semi-definite matrix (..., K, K), with a ridge.

    `RIDGE` of the diagonal's mean is added to it, ten times as much until a factor exists.

    Raises:
        DataError: A value is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise DataError(
            "Second moments are not finite: look for NaN or very large values in the images, or "
            "for an overflow in the network."
        )
    ridge = RIDGE
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale, 1.0)  # of a matrix of zeros
    while True:
        factor: Tensor
        info: Tensor
        raised = gram.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_((ridge * scale)[..., None])
        factor, info = torch.linalg.cholesky_ex(raised)
        if not bool(info.any()):
            return factor
        ridge *= 10


def ridge_gcv(gram: Tensor, cross: Tensor, total: float, count: int) -> Tensor:
    """Ridge regression whose strength minimises the generalised cross-validation score.

    (rss / n) / (1 - df / n)^2 over a ladder of strengths: Golub, Heath & Wahba, Technometrics
    1979. One eigendecomposition serves all strengths.

    Args:
        gram: (K, K), averages over positions.
        cross: (K, M).
        total: Sum of the targets' variances.
        count: Positions averaged over.

    Returns:
        Weights (K, M).
    """
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    largest = float(values.max()) if len(values) else 0.0
    if largest == 0.0:
        return torch.zeros_like(cross)
    rotated = vectors.T @ cross
    ladder = torch.cat([_LADDER.new_tensor([1e-12, 1e-10, 1e-8]), _LADDER]) * values.mean()
    kept = values[None] / (values[None] + ladder[:, None])
    live = values > 1e-13 * largest
    power = torch.where(live, rotated.square().sum(1) / values.clamp(min=1e-300), 0.0)
    loss = (total - (power * (1 - (1 - kept).square())).sum(1)).clamp(min=1e-15 * total)
    left = 1 - (kept * live).sum(1) / count
    if float(loss[0]) < _EXACT * total and float(left[0]) > 1e-3:
        return vectors @ (rotated / (values + ladder[0])[:, None])
    score = torch.where(left > 1e-3, loss / left.clamp(min=1e-3).square(), torch.inf)
    strength = ladder[int(score.argmin())] if bool(score.isfinite().any()) else ladder[-1]
    return vectors @ (rotated / (values + strength)[:, None])


def weighted_ridge(
    gram: Tensor, cross: Tensor, weights: Tensor, total: float, count: int
) -> Tensor:
    """`ridge_gcv` where targets have weights, and are 0 where these are.

    Args:
        gram: (K, K), averages over positions.
        cross: (K, M), of the targets without weights.
        weights: (M,), importance of each target, not negative.
        total: Sum of the weighted targets' variances.
        count: Positions averaged over.

    Returns:
        Weights (K, M) of the targets without weights.
    """
    live = (weights > 0).to(weights)
    solved = ridge_gcv(gram, cross * weights, total, count)
    return solved * (live / torch.where(weights > 0, weights, 1.0))


def principal(cross: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions of the least-squares fitted targets, largest first.

    Args:
        cross: (K, M).
        factor: Cholesky factor of the Gram matrix, (K, K).

    Returns:
        The variance explained by each direction (M,), and the directions as columns (M, M). The
        first r span the optimum of reduced-rank regression: Izenman, J. Multivariate Anal. 1975.
    """
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    values, vectors = torch.linalg.eigh(half.T @ half)
    return values.flip(0).clamp(min=0), vectors.flip(1)
