"""Depthwise convolutions: the one parameter-free operation a channel that comes closest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pfsurgery.errors import DataError
from pfsurgery.recover.capture import capture, first_of, run_watched
from pfsurgery.recover.columns import Operation, Reader, Window
from pfsurgery.recover.front import Front
from pfsurgery.recover.gram import Positions
from pfsurgery.recover.readout import site_readout
from pfsurgery.recover.target import POSITIONS, site_operations, site_window
from pfsurgery.sites import Site

_FLAT = 1e-12  # of the largest variance: below it a channel is constant


@dataclass(frozen=True, slots=True)
class ChannelFit:
    """For each of C channels `scale * operation(x) + offset`, close to what a convolution gave.

    Attributes:
        ops: Index of the operation, (C,).
        scale: (C,).
        offset: (C,).
        mean: Mean of the operation's output, (C,).
        variance: Its variance, (C,).
        error: Squared error as a share of the targets' variance, in the weights' measure.
    """

    ops: Tensor
    scale: Tensor
    offset: Tensor
    mean: Tensor
    variance: Tensor
    error: float


class ChannelSums:
    """Accumulates what choosing an operation for each channel needs; memory is 8 * 3 * ops * C."""

    def __init__(self, ops: int, channels: int) -> None:
        self._columns = torch.zeros(3, ops, channels, dtype=torch.float64)  # z, z^2, z y
        self._targets = torch.zeros(2, channels, dtype=torch.float64)  # y, y^2
        self.count = 0

    def add(
        self,
        x: Tensor,
        y: Tensor,
        window: Window,
        ops: Sequence[Operation],
        positions: Tensor | None = None,
    ) -> None:
        """Adds inputs (N, C, H, W) and the outputs (N, C, H', W') that they should give.

        Raises:
            DataError: A value is not finite.
        """
        goal = y.float().permute(0, 2, 3, 1).reshape(-1, y.shape[1])
        goal = (goal if positions is None else goal[positions]).double().cpu()
        sums = torch.zeros_like(self._columns)
        reader = Reader(x.float(), window, positions)
        for place, op in enumerate(ops):
            column = reader.apply(op).double().cpu()
            reader.read.clear()  # all taps of a 7x7 at once may be a gigabyte
            sums[0, place] = column.sum(0)
            sums[1, place] = column.square().sum(0)
            sums[2, place] = (column * goal).sum(0)
        targets = torch.stack([goal.sum(0), goal.square().sum(0)])
        if not (bool(sums.isfinite().all()) and bool(targets.isfinite().all())):
            raise DataError(
                "What a depthwise convolution reads or gives is NaN or infinite: look for it in "
                "the images, or for an overflow in the network."
            )
        self._columns += sums
        self._targets += targets
        self.count += len(goal)

    def fit(self, weights: Tensor) -> ChannelFit:
        """The best operation of each channel, by linear regression of the target on each.

        Args:
            weights: Importance of each channel, (C,).
        """
        mean, square, product = self._columns / self.count
        goal, goal_square = self._targets / self.count
        variance = (square - mean.square()).clamp(min=0)
        spread = (goal_square - goal.square()).clamp(min=0)
        covariance = product - mean * goal
        live = variance > _FLAT * variance.max().clamp(min=1e-300)
        explained = torch.where(live, covariance.square() / variance.clamp(min=1e-300), 0.0)
        best = explained.argmax(0)
        pick = best[None]
        scale = torch.where(live, covariance / variance.clamp(min=1e-300), 0.0).gather(0, pick)[0]
        chosen_mean = mean.gather(0, pick)[0]
        total = float((weights.square() * spread).sum())
        left = float((weights.square() * (spread - explained.gather(0, pick)[0])).sum())
        return ChannelFit(
            ops=best,
            scale=scale,
            offset=goal - scale * chosen_mean,
            mean=chosen_mean,
            variance=variance.gather(0, pick)[0],
            error=left / total if total > 0 else 0.0,
        )


@torch.no_grad()
def fold_into_norm(norm: nn.Module | None, fit: ChannelFit) -> None:
    """Let a batch norm apply scale and offset; other norms are left as they are.

    Its statistics become those of the operation's output, so that training goes on from there.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return
    if not norm.affine:
        return
    wide = (norm.running_var.double() + norm.eps).rsqrt().cpu()
    gamma = norm.weight.double().cpu() * wide
    shift = norm.bias.double().cpu() - norm.running_mean.double().cpu() * gamma
    norm.weight.copy_(gamma * fit.scale * (fit.variance + norm.eps).sqrt())
    norm.bias.copy_(shift + gamma * (fit.offset + fit.scale * fit.mean))
    norm.running_mean.copy_(fit.mean)
    norm.running_var.copy_(fit.variance)


def channel_fits(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor]
) -> dict[str, ChannelFit]:
    """The best operation for each channel of depthwise sites, in one pass over the images."""
    sums = {s.name: ChannelSums(len(site_operations(s)), s.geometry.in_channels) for s in sites}
    positions = Positions(sum(len(batch) for batch in batches), POSITIONS)

    def add(site: Site, x: Tensor, y: Tensor) -> None:
        _add_channels(sums[site.name], site, x, y, positions)

    hooks = [
        model.get_submodule(site.name).register_forward_hook(
            lambda _, args, kwargs, out, site=site: add(site, first_of(args, kwargs), out),
            with_kwargs=True,
        )
        for site in sites
    ]
    run_watched(model, batches, hooks)
    return {site.name: sums[site.name].fit(site_readout(model, site).weights) for site in sites}


def channel_refit(teacher: nn.Module, front: Front, site: Site) -> ChannelFit:
    """The best operation for each channel, with inputs from the edited network."""
    sums = ChannelSums(len(site_operations(site)), site.geometry.in_channels)
    positions = Positions(sum(len(batch) for batch in front.batches), POSITIONS)
    read = front.captures(site.name, {"x": (site.name, "input")})
    for batch, made in zip(front.batches, read, strict=True):
        y = capture(teacher, batch, {"y": (site.name, "output")})["y"]
        _add_channels(sums, site, made["x"], y, positions)
    return sums.fit(site_readout(teacher, site).weights)


def _add_channels(
    sums: ChannelSums, site: Site, x: Tensor, y: Tensor, positions: Positions
) -> None:
    chosen = positions(len(x), len(y) * y.shape[2] * y.shape[3])
    where = None if chosen is None else chosen.to(x.device)
    sums.add(x, y, site_window(site), site_operations(site), where)
