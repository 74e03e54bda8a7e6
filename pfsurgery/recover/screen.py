"""Very wide sites: look at the directions of the channels that matter instead of every channel.

With C = 2,048 channels the candidates' Gram matrix would take gigabytes. Such a site is fitted on
the `WIDTH` directions that its kernel reads most from; what the others carry counts as error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from pfsurgery.recover.capture import on_input, run_watched
from pfsurgery.recover.columns import Operation
from pfsurgery.recover.fit import Fit
from pfsurgery.recover.gram import MomentSum, Positions
from pfsurgery.sites import Site

MOST_COLUMNS = 6144  # of a Gram matrix: 302 MB
_POSITIONS = 32768
_RIDGE = 1e-8


@dataclass(frozen=True, slots=True)
class Screen:
    """Directions of a site's input channels, most important first.

    Attributes:
        project: Channels to directions, (W, C).
        lift: Directions back to channels, (C, W): `lift @ project @ x` is close to x.
        missing: Share of the output's variance that the other directions carry.
    """

    project: Tensor
    lift: Tensor
    missing: float


def is_wide(site: Site, ops: Sequence[Operation]) -> bool:
    """Whether a site has more columns than a Gram matrix should hold."""
    return len(ops) * site.geometry.in_channels > MOST_COLUMNS


def screens(
    model: nn.Module,
    sites: Sequence[Site],
    ops: Sequence[Sequence[Operation]],
    kernels: Sequence[Tensor],
    batches: Sequence[Tensor],
) -> dict[str, Screen]:
    """The screens of the wide ones among `sites`, in one pass over the images.

    Args:
        model: The original, in eval mode.
        sites: The sites.
        ops: Operations of each.
        kernels: Each site's kernel as weights of its columns, (ops * C, C_out).
        batches: Images (N, C, H, W), one batch each.
    """
    wide = [(s, len(o), k) for s, o, k in zip(sites, ops, kernels, strict=True) if is_wide(s, o)]
    if not wide:
        return {}
    sums = {site.name: MomentSum(site.geometry.in_channels) for site, _, _ in wide}
    positions = Positions(sum(len(batch) for batch in batches), _POSITIONS)

    def add(name: str, x: Tensor) -> None:
        rows = x.detach().float().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        kept = positions(len(x), len(rows))
        sums[name].add((rows if kept is None else rows[kept.to(rows.device)]).cpu())

    hooks = [
        on_input(model.get_submodule(site.name), partial(add, site.name)) for site, _, _ in wide
    ]
    run_watched(model, batches, hooks)
    return {
        site.name: _screen(sums[site.name].result().gram, kernel.view(count, -1, kernel.shape[1]))
        for site, count, kernel in wide
    }


def _screen(gram: Tensor, kernel: Tensor) -> Screen:
    """The leading directions of G^1/2 (sum of W W') G^1/2, with G the channels' covariance.

    Args:
        gram: (C, C).
        kernel: (ops, C, C_out).
    """
    width = MOST_COLUMNS // len(kernel)
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp(min=0).sqrt()
    least = _RIDGE**0.5 * root.max().clamp(min=1e-30)
    inverse = torch.where(root > least, 1 / root.clamp(min=float(least)), 0.0)
    colour, whiten = vectors * root @ vectors.T, vectors * inverse @ vectors.T
    read = colour @ sum(w @ w.T for w in kernel.to(gram)) @ colour
    power, directions = torch.linalg.eigh(read)
    kept = directions.flip(1)[:, :width]
    total = float(power.clamp(min=0).sum())
    share = float(power.flip(0)[:width].clamp(min=0).sum()) / total if total > 0 else 1.0
    return Screen((kept.T @ whiten), colour @ kept, 1 - share)


def lifted_kernel(kernel: Tensor, screen: Screen | None) -> Tensor:
    """A kernel (ops * C, C_out) as it acts on the screened directions, (ops * W, C_out)."""
    if screen is None:
        return kernel
    channels = len(screen.lift)
    blocks = kernel.to(screen.lift).view(-1, channels, kernel.shape[1])
    return (screen.lift.T @ blocks).flatten(0, 1)


def screened(x: Tensor, screen: Screen | None) -> Tensor:
    """An input (N, C, H, W) as its directions (N, W, H, W)."""
    if screen is None:
        return x
    return torch.einsum("dc,nchw->ndhw", screen.project.to(x), x)


def unscreened(fit: Fit, screen: Screen | None) -> Fit:
    """A fit with a reduction on directions as one on channels."""
    if screen is None or fit.reduce is None:
        return fit
    return replace(fit, reduce=fit.reduce @ screen.project)
