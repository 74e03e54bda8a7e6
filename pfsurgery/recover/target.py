"""One site's fitting problem: what it reads in the edited network, what it should give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pfsurgery.errors import DataError
from pfsurgery.recover.capture import Side, capture
from pfsurgery.recover.columns import Operation, Window, column_rows, operations
from pfsurgery.recover.gram import Moments, MomentSum, sample_positions
from pfsurgery.recover.screen import Screen, screened
from pfsurgery.sites import Neighbours, Site

_DEAD = 1e-4  # norm weights below this share of the largest make a channel that says nothing
_CHUNK = 16384  # positions whose columns are in memory at once


@dataclass(frozen=True, slots=True)
class Readout:
    """How a site's output counts: behind its norm, and where a shortcut is added to it.

    Attributes:
        scale: What the norm multiplies each output channel by, (C_out,).
        shift: What it then adds, (C_out,).
        weights: Importance of each output channel, |scale|, and 0 where the channel is dead.
        norm: Path of the norm, None without a batch norm right behind the site.
        merge: Path of the module that reads the sum with the shortcut.
    """

    scale: Tensor
    shift: Tensor
    weights: Tensor
    norm: str | None
    merge: str | None


def readout_of(model: nn.Module, around: Neighbours, outputs: int) -> Readout:
    """How the output of a layer with these neighbours counts in `model`, in eval mode."""
    norm = model.get_submodule(around.norm) if around.norm else None
    if not isinstance(norm, _BatchNorm) or norm.running_var is None or norm.running_mean is None:
        scale, shift = torch.ones(outputs), torch.zeros(outputs)
        merge = around.merge if around.norm is None else None
        return Readout(scale, shift, scale.double(), None, merge)
    scale = (norm.running_var + norm.eps).rsqrt().detach().cpu().float()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().cpu()
    shift = -norm.running_mean.detach().cpu() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().cpu()
    weights = scale.abs().double()
    weights[weights < _DEAD * weights.max()] = 0
    return Readout(scale, shift, weights, around.norm, around.merge)


def corrected(goal: Tensor, shortcut: Tensor, how: Readout) -> Tensor:
    """What a layer should give (N, C, H, W) so that its sum with `shortcut` is `goal`."""
    scale, shift = (t.to(goal).view(1, -1, 1, 1) for t in (how.scale, how.shift))
    live = how.weights.to(goal).view(1, -1, 1, 1) > 0
    inverse = torch.where(live, 1 / torch.where(live, scale, 1.0), 0.0)
    return (goal - shortcut - shift) * inverse


def site_window(site: Site) -> Window:
    """The site's window with its padding resolved for its input size."""
    geometry = site.geometry
    (top, bottom), (left, right) = geometry.pads((site.input_shape[-2], site.input_shape[-1]))
    return Window(
        geometry.kernel_size, geometry.stride, (top, bottom, left, right), geometry.dilation
    )


def site_operations(site: Site) -> tuple[Operation, ...]:
    """The taps that a site's columns may be, every tap of a kernel up to 3x3, then averages."""
    window = site_window(site)
    pools = site.geometry.dilation == (1, 1)
    return tuple(op for op in operations(window, pools=pools) if op.linear)


def channel_operations(site: Site) -> tuple[Operation, ...]:
    """What a channel of a depthwise site may become: every tap, every centred average."""
    reach = max(site.geometry.kernel_size) // 2
    pools = site.geometry.dilation == (1, 1)
    return tuple(op for op in operations(site_window(site), reach=reach, pools=pools) if op.linear)


def input_moments(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Tensor],
    ops: Sequence[Sequence[Operation]],
    most: int,
    screens: Mapping[str, Screen] | None = None,
) -> list[Moments]:
    """Moments of the columns that each of `sites` reads in `model`, in one pass over the images.

    Args:
        model: The model, in eval mode.
        sites: The sites.
        batches: Images (N, C, H, W), one batch each.
        ops: The operations of each site.
        most: Positions that are looked at for each site, about.
        screens: Directions that stand for the channels of very wide sites.
    """
    looked = [(screens or {}).get(site.name) for site in sites]
    widths = [
        site.geometry.in_channels if screen is None else len(screen.project)
        for site, screen in zip(sites, looked, strict=True)
    ]
    sums = [MomentSum(len(o) * width) for width, o in zip(widths, ops, strict=True)]
    windows = [site_window(site) for site in sites]
    generator = torch.Generator().manual_seed(0)
    images = sum(len(batch) for batch in batches)
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _, args, place=place: _add(
                sums[place],
                screened(args[0], looked[place]),
                None,
                windows[place],
                ops[place],
                most / images,
                generator,
            )
        )
        for place, site in enumerate(sites)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [total.result() for total in sums]


def refit_moments(
    teacher: nn.Module,
    student: nn.Module,
    site: Site,
    batches: Sequence[Tensor],
    ops: Sequence[Operation],
    how: Readout,
    most: int,
    layer: str | None = None,
    screen: Screen | None = None,
) -> Moments:
    """Moments of the columns that `site` reads in the edited network, and of what it should give.

    The target is what the original gives at the same place. Where a shortcut is added, the target
    is what the sum lacks: the original's sum less the edited network's shortcut, so that a site
    corrects what the sites before it got wrong.

    Args:
        teacher: The original, in eval mode.
        student: The edited network, whose site still is its convolution.
        site: The site.
        batches: Images (N, C, H, W), one batch each.
        ops: The operations of its columns.
        how: How its output counts.
        most: Positions that are looked at, about.
        layer: Path of the layer whose output is wanted, the site itself if None.
        screen: Directions that stand for the channels of a very wide site.
    """
    layer = layer or site.name
    total: MomentSum | None = None
    window = site_window(site)
    generator = torch.Generator().manual_seed(0)
    images = sum(len(batch) for batch in batches)
    for batch in batches:
        x, y = _input_and_target(teacher, student, site, layer, batch, how)
        x = screened(x.float(), screen)
        total = total or MomentSum(len(ops) * x.shape[1], y.shape[1])
        _add(total, x, y, window, ops, most / images, generator)
    if total is None:
        raise DataError("There is no image to fit to.")
    return total.result()


def _input_and_target(
    teacher: nn.Module, student: nn.Module, site: Site, layer: str, batch: Tensor, how: Readout
) -> tuple[Tensor, Tensor]:
    behind = how.norm or layer
    if how.merge is None:
        goal = capture(teacher, batch, {"out": (layer, "output")}, site.calls)["out"]
        read = capture(student, batch, {"x": (site.name, "input")}, site.calls)["x"]
        return read, goal
    merged: dict[str, tuple[str, Side]] = {"sum": (how.merge, "input")}
    goal = capture(teacher, batch, merged, site.calls)["sum"]
    wanted = {"x": (site.name, "input"), "out": (behind, "output"), **merged}
    made = capture(student, batch, wanted, site.calls)  # type: ignore[arg-type]
    return made["x"], corrected(goal, made["sum"] - made["out"], how)


def _add(
    total: MomentSum,
    x: Tensor,
    y: Tensor | None,
    window: Window,
    ops: Sequence[Operation],
    per_image: float,
    generator: torch.Generator,
) -> None:
    """Add sampled positions of one batch, in chunks of images that fit in memory."""
    x = x.detach().float()
    rows, columns = window.output_size(x.shape[2], x.shape[3])
    here = rows * columns
    kept = min(1.0, per_image / here)
    step = max(1, int(_CHUNK / (here * kept)))
    for first in range(0, len(x), step):
        part = x[first : first + step]
        number = len(part) * here
        chosen = sample_positions(number, max(1, round(number * kept)), generator)
        if chosen is not None:
            chosen = chosen.to(x.device)
        values = column_rows(part, window, ops, chosen).cpu()
        goals = None
        if y is not None:
            flat = y[first : first + step].float().permute(0, 2, 3, 1).reshape(number, -1)
            goals = (flat if chosen is None else flat[chosen]).cpu()
        total.add(values, goals)
