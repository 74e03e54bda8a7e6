"""Second moments of candidate columns and targets, summed over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pfsurgery.errors import DataError

_ROWS = 4096  # of one product: few enough that float32 rounding stays near 1e-6
_ENOUGH = 1024  # rows that are worth a product
_BLOCK = 512
_PRIOR = 0.02  # how much a kernel counts where the images say little
DOUBLE = 2048  # up to this many columns products are float64: twice the time, and exact


@dataclass(frozen=True, slots=True)
class Moments:
    """Centred second moments of K columns and M targets, averages over positions, float64.

    Attributes:
        count: Positions averaged over.
        gram: Columns by columns, (K, K).
        cross: Columns by targets, (K, M).
        target: Targets by targets, (M, M).
        column_mean: (K,).
        target_mean: (M,).
    """

    count: int
    gram: Tensor
    cross: Tensor
    target: Tensor
    column_mean: Tensor
    target_mean: Tensor

    def columns(self, index: Tensor) -> Moments:
        """The moments of some of the columns, in the order of `index`."""
        return Moments(
            self.count,
            self.gram[index][:, index],
            self.cross[index],
            self.target,
            self.column_mean[index],
            self.target_mean,
        )

    def variance(self, weights: Tensor) -> float:
        """Of all targets together, each multiplied by its weight, (M,)."""
        return float((self.target.diagonal() * weights.square()).sum())

    def through_origin(self) -> Moments:
        """Moments about zero in place of the means, for a product without a bias."""
        x, y = self.column_mean, self.target_mean
        return Moments(
            self.count,
            self.gram + torch.outer(x, x),
            self.cross + torch.outer(x, y),
            self.target + torch.outer(y, y),
            torch.zeros_like(x),
            torch.zeros_like(y),
        )

    def with_linear_target(self, weight: Tensor, bias: Tensor | None = None) -> Moments:
        """The moments with the targets `columns @ weight + bias`, which need no pass over data.

        Args:
            weight: (K, M), for instance `kernel_columns(conv.weight, ops)`.
            bias: (M,).
        """
        weight = weight.to(self.gram)
        cross = self.gram @ weight
        mean = self.column_mean @ weight
        if bias is not None:
            mean = mean + bias.to(mean)
        return Moments(self.count, self.gram, cross, weight.T @ cross, self.column_mean, mean)

    def with_prior(self, weight: Tensor, share: float = _PRIOR) -> Moments:
        """The moments as if white noise had also been seen, with `columns @ weight` as target.

        Directions that few images show are then fitted as the original kernel acts on them
        instead of freely, so that the fit holds on other images too.

        Args:
            weight: (K, M), `kernel_columns(conv.weight, ops)`.
            share: Variance of the noise, as a share of the columns' mean variance.
        """
        weight = weight.to(self.gram)
        noise = share * self.gram.diagonal().mean()
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return Moments(
            self.count,
            self.gram + noise * eye,
            self.cross + noise * weight,
            self.target + noise * weight.T @ weight,
            self.column_mean,
            self.target_mean,
        )


class MomentSum:
    """Accumulates moments over batches: products of short chunks, float64 sums.

    Products are float64 up to 2,048 columns and float32 above, where they would take long; the
    difference is 1e-6 of the largest variance, which matters only to (nearly) singular matrices.
    Both sides are shifted by the mean of the first batch, so that a large mean costs no digits.
    Only blocks on and above the diagonal of the Gram matrix are computed. Memory is
    8 (K^2 + K M + M^2) bytes and one chunk, and up to 1,024 rows that wait for more.

    Args:
        columns: Number of columns K.
        targets: Number of targets M, 0 for none.
        known: Moments of the same columns, with other targets: their Gram matrix, which takes
            longest, is not summed again.
    """

    def __init__(self, columns: int, targets: int = 0, known: Moments | None = None) -> None:
        self._known = None if known is None else known.gram
        self._gram = torch.zeros(0 if known else columns, columns, dtype=torch.float64)
        self._cross = torch.zeros(columns, targets, dtype=torch.float64)
        self._target = torch.zeros(targets, targets, dtype=torch.float64)
        self._column_sum = torch.zeros(columns, dtype=torch.float64)
        self._target_sum = torch.zeros(targets, dtype=torch.float64)
        self._column_shift: Tensor | None = None
        self._target_shift: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def add(self, columns: Tensor, targets: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            columns: (P, K), one row a position.
            targets: (P, M).

        Raises:
            DataError: A value is not finite, or the shapes do not fit.
        """
        if targets is None:
            targets = columns.new_zeros(len(columns), 0)
        wanted = (len(self._column_sum), len(self._target_sum))
        if (columns.shape[1], targets.shape[1]) != wanted or len(columns) != len(targets):
            raise DataError(
                f"Columns {tuple(columns.shape)} and targets {tuple(targets.shape)} do not fit "
                f"moments of {wanted[0]} columns and {wanted[1]} targets: rows are positions."
            )
        for name, values in (("columns", columns), ("targets", targets)):
            if not bool(torch.isfinite(values.sum())) and not bool(values.isfinite().all()):
                raise DataError(
                    f"The {name} of batch positions {self.count} to {self.count + len(values)} "
                    "hold NaN or infinite values: look for them in the images, or for an "
                    "overflow in the network."
                )
        if not len(columns):
            return
        self.count += len(columns)
        self._waiting.append((columns, targets))
        if sum(len(rows) for rows, _ in self._waiting) >= _ENOUGH:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Multiply what has come in: a few rows at a time would only move the Gram matrix about."""
        if not self._waiting:
            return
        columns, targets = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        if self._column_shift is None or self._target_shift is None:
            self._column_shift = columns.mean(0)
            self._target_shift = targets.mean(0)
        kind = torch.float64 if columns.shape[1] <= DOUBLE else torch.float32
        for first in range(0, len(columns), _ROWS):
            x = columns[first : first + _ROWS].to(kind) - self._column_shift
            self._add_chunk(x, targets[first : first + _ROWS].to(kind) - self._target_shift)

    def _add_chunk(self, x: Tensor, y: Tensor) -> None:
        self._column_sum += x.sum(0, dtype=torch.float64)
        self._target_sum += y.sum(0, dtype=torch.float64)
        self._cross += x.T @ y
        self._target += y.T @ y
        if self._known is not None:
            return
        for first in range(0, x.shape[1], _BLOCK):
            block = x[:, first : first + _BLOCK]
            self._gram[first : first + _BLOCK, first:] += block.T @ x[:, first:]

    def result(self) -> Moments:
        """The centred moments of what was added.

        Raises:
            DataError: Nothing was added.
        """
        self._add_waiting()
        if not self.count or self._column_shift is None or self._target_shift is None:
            raise DataError("No positions were added: pass at least one image.")
        x, y = self._column_sum / self.count, self._target_sum / self.count
        gram = self._known
        if gram is None:
            gram = torch.triu(self._gram) / self.count
            gram = gram + torch.triu(gram, 1).T - torch.outer(x, x)
        return Moments(
            self.count,
            gram,
            self._cross / self.count - torch.outer(x, y),
            self._target / self.count - torch.outer(y, y),
            x + self._column_shift,
            y + self._target_shift,
        )


def sample_positions(total: int, most: int, generator: torch.Generator) -> Tensor | None:
    """At most `most` of `total` positions, sorted and without repeats; None stands for all."""
    if total <= most:
        return None
    return torch.randperm(total, generator=generator, device="cpu")[:most].sort().values


class Positions:
    """Which positions are looked at, batch by batch: every instance picks the same ones.

    Args:
        images: How many images there are in all batches.
        most: Positions that are looked at in all of them, about.
    """

    def __init__(self, images: int, most: int) -> None:
        self._images, self._most = images, most
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, images: int, total: int) -> Tensor | None:
        """Some of the `total` positions of so many images, sorted; None stands for all."""
        most = max(1, round(self._most * images / self._images))
        return sample_positions(total, most, self._generator)


Groups = list[tuple[int, Tensor]]  # operations, and the places of what each has


def by_operation(ops: Tensor) -> Groups:
    """Where each operation stands in `ops`, (B,), in the order of operations."""
    return [(o, (ops == o).nonzero()[:, 0]) for o in sorted(set(ops.tolist()))]


def products_with(gram: Tensor, vectors: Tensor, groups: Groups) -> Tensor:
    """Products of all columns with sums over the channels of one operation each, (K, B).

    Args:
        gram: Columns by columns, (K, K), where K is operations times channels.
        vectors: Each sum's weights of the channels, (B, C).
        groups: The sums of each operation.
    """
    channels = vectors.shape[1]
    made = gram.new_empty(len(gram), len(vectors))
    for o, rows in groups:
        made[:, rows] = gram[:, o * channels : (o + 1) * channels] @ vectors[rows].T
    return made
