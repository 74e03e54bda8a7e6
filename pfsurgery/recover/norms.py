"""Norm statistics, re-estimated from forward passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pfsurgery.batches import Images, sample_images, unlabelled_images
from pfsurgery.errors import DataError, TrainingError
from pfsurgery.fold import computes_as_known
from pfsurgery.graph import GraphView
from pfsurgery.measure.state import explained
from pfsurgery.recover.capture import on_input, run_watched
from pfsurgery.recover.state import keep_random_state, keep_train_flags, placement

# Of a norm's eps: a channel of a smaller variance is constant on these images, and keeps the
# variance that it had, by which other images will not be blown up.
_STILL = 1e-3


@dataclass
class _Pool:
    """Mean and variance of all values of a channel so far, merged batch by batch in float64."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        if not x.numel():
            return
        count = x.numel() // x.shape[1]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.detach().float(), dim=axes, correction=0)
        variance, mean = variance.cpu().double(), mean.cpu().double()
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + variance * count + delta**2 * (self.count * count / total)
        self.count = total


def recalibrate(model: nn.Module, batches: Images | Tensor | str | Path) -> int:
    """Re-estimate the running mean and variance of every batch norm, in place.

    After an operation was swapped, activations have other statistics than the ones that the norms
    recorded in training; this is often most of the loss of accuracy, and needs no gradient.

    Every batch passes through the model once, while batch norms normalise by the batch as they do
    in training and all else (dropout, stochastic depth) is in eval mode. The new statistics are
    exact over all batches: the mean of all values of a channel, and their unbiased variance, as
    pooled from the count, mean and variance of each batch (Chan's formula, float64), so that no
    momentum is involved and a smaller last batch weighs less. Larger batches give better
    statistics in deep layers; 10 to 20 batches of 64 images usually suffice.

    Train flags, momentum and `num_batches_tracked` are left as found, and so are the global random
    states. Should anything fail, all statistics are what they were.

    Args:
        model: The model; images are moved to its device and dtype.
        batches: Images of shape (N, C, H, W), normalised as the model expects: an iterable of
            tensors or of (images, labels), a `DataLoader` or `Dataset`, one tensor, or a path or
            name that `pfsurgery.data.open_data` understands, of which 2,000 images are taken,
            400 MB at the most. Labels are not used.

    Returns:
        How many norms were re-estimated; 0 if the model has no batch norm with running statistics
        (then no image is read).

    Raises:
        DataError: There is no batch, or a batch is no image tensor, or there is one image where a
            norm needs two.
        ShapeError: The model does not run on the images.
        TrainingError: The statistics of a norm are not finite; the message names it.
    """
    return reestimate(model, batches, {name for name, _ in model.named_modules()})


def reestimate(
    model: nn.Module, batches: Images | Tensor | str | Path, paths: Collection[str]
) -> int:
    """`recalibrate` for the batch norms among the modules at `paths` alone."""
    norms = {name: norm for name, norm in _norms_of(model).items() if name in paths}
    if not norms:
        return 0
    pools = {module: _Pool() for module in norms.values()}
    found = {module: (module.momentum, _statistics(module)) for module in norms.values()}

    def collect(name: str, x: Tensor) -> None:
        if x.numel() == x.shape[1]:
            raise DataError(
                f"The norm {name!r} sees one value a channel, from which no variance can be "
                f"estimated: give two images or more of the same size."
            )
        pools[norms[name]].add(x)

    handles = [on_input(module, partial(collect, name)) for name, module in norms.items()]
    try:
        with keep_random_state(), keep_train_flags(model), torch.no_grad():
            _run(model, list(norms.values()), batches)
    finally:
        for handle in handles:
            handle.remove()
        for module, (momentum, statistics) in found.items():
            module.momentum = momentum
            for tensor, before in zip(_buffers(module), statistics, strict=True):
                tensor.copy_(before)

    reached = {name: pools[module] for name, module in norms.items() if pools[module].count > 1}
    for name, pool in reached.items():
        total = torch.as_tensor(pool.mean) + torch.as_tensor(pool.squares)
        if not bool(torch.isfinite(total).all()):
            raise TrainingError(
                f"The inputs of the norm {name!r} are not finite, so its statistics cannot be "
                f"re-estimated; the model is unchanged. Check that the images are normalised and "
                f"that no weight is NaN."
            )
    for name, pool in reached.items():
        mean, variance = _buffers(norms[name])[:2]
        mean.copy_(torch.as_tensor(pool.mean))
        estimate = (torch.as_tensor(pool.squares) / (pool.count - 1)).to(variance)
        varies = estimate > _STILL * norms[name].eps
        variance.copy_(torch.where(varies, estimate, variance))
    return len(reached)


def _norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that keep statistics, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def settle(model: nn.Module, batches: Sequence[Tensor], seen: GraphView) -> None:
    """Give batch norms the statistics of what they read, and weights that leave what they make.

    A refitted layer gives less variance than the original's did. In training its norm would make
    up for that, so that the network were another one from the first step on; now the norm's weight
    says how much is meant. A norm stays that has no weights of its own, or of less than 32 bits,
    or is of a class that may compute otherwise; so does a channel that is constant on the images.

    Args:
        model: The network, in eval mode, changed in place.
        batches: Images (N, C, H, W), one batch each.
        seen: The graph view of the original, which knows what other code reads.
    """
    norms = _norms_of(model)
    owners = Counter(id(tensor) for norm in norms.values() for tensor in _tensors(norm))
    pools = {
        norm: _Pool()
        for path, norm in norms.items()
        if path not in seen.foreign_reads
        and _can_make_up(norm)
        and all(owners[id(tensor)] == 1 for tensor in _tensors(norm))
    }
    run_watched(model, batches, [on_input(norm, pool.add) for norm, pool in pools.items()])
    for norm, pool in pools.items():
        if pool.count > 1:
            _normalise_by(norm, pool)


def _tensors(norm: _BatchNorm) -> list[Tensor]:
    """Weight and bias, where they are parameters and not computed from others, and statistics."""
    found = (norm._parameters.get(name) for name in ("weight", "bias"))
    return [*(tensor for tensor in found if tensor is not None), *_buffers(norm)[:2]]


def _can_make_up(norm: _BatchNorm) -> bool:
    """Whether weight and bias can make up for other statistics, but for rounding."""
    kinds = [tensor.dtype for tensor in _tensors(norm)]
    return (
        computes_as_known(norm) and len(kinds) == 4 and {*kinds} <= {torch.float32, torch.float64}
    )


def _normalise_by(norm: _BatchNorm, pool: _Pool) -> None:
    """Put other statistics into a norm with weights, which then make up for it."""
    mean, variance = _buffers(norm)[:2]
    found = torch.as_tensor(pool.squares) / (pool.count - 1)
    varies = found > _STILL * norm.eps
    old = (variance.cpu().double() + norm.eps).sqrt()
    new = torch.where(varies, (found + norm.eps).sqrt(), old)
    moved = torch.where(varies, torch.as_tensor(pool.mean) - mean.cpu().double(), 0.0)
    norm.bias.add_((norm.weight.cpu().double() * moved / old).to(norm.bias))
    norm.weight.mul_((new / old).to(norm.weight))
    mean.add_(moved.to(mean))
    variance.copy_(torch.where(varies.to(variance.device), found.to(variance), variance))


def _run(model: nn.Module, norms: list[_BatchNorm], batches: Images | Tensor | str | Path) -> None:
    model.eval()
    for norm in norms:
        norm.training = True  # not .train(): timm's norms hold dropout and activation inside
        norm.momentum = 0.0
    device, dtype = placement(model)
    count = 0
    read = sample_images if isinstance(batches, (str, Path)) else unlabelled_images
    given = (batch for batch in read(batches, model) if len(batch))
    for images in _of_two_or_more(given):
        images = images.to(device=device, dtype=dtype)
        with explained(model, (images,)):
            model(images)
        count += 1
    if not count:
        raise DataError("There is no batch to re-estimate norm statistics from; give at least one.")


def _of_two_or_more(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, those of one image joined with a neighbour: a norm of 1x1 maps needs two."""
    held: Tensor | None = None
    single: Tensor | None = None
    for batch in batches:
        if single is not None and single.shape[1:] == batch.shape[1:]:
            batch = torch.cat([single, batch])
        elif single is not None:  # of another size
            yield single
        single = batch if len(batch) == 1 else None
        if single is None:
            if held is not None:
                yield held
            held = batch
    if held is not None and single is not None and held.shape[1:] == single.shape[1:]:
        held, single = torch.cat([held, single]), None
    yield from (batch for batch in (held, single) if batch is not None)


def _buffers(norm: _BatchNorm) -> list[Tensor]:
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return [buffer for buffer in buffers if buffer is not None]


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    return [buffer.clone() for buffer in _buffers(norm)]
