"""One site's fitting problem: what it reads in the edited network, what it should give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pfsurgery.errors import DataError
from pfsurgery.recover.capture import Side, capture, on_input
from pfsurgery.recover.columns import Operation, Window, column_rows, operations
from pfsurgery.recover.front import Front
from pfsurgery.recover.gram import Moments, MomentSum, sample_positions
from pfsurgery.recover.screen import Screen, screened
from pfsurgery.sites import Neighbours, Site

POSITIONS = 65536  # looked at for each layer, about
ROWS_MEMORY = 1 << 29  # bytes of the original's rows that are held at once, about
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
        rectified: Whether a ReLU alone reads what becomes of it, so that it matters less how far
            below zero that is.
    """

    scale: Tensor
    shift: Tensor
    weights: Tensor
    norm: str | None
    merge: str | None
    rectified: bool = False


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
    """What a layer should give, (N, C, ...), so that its sum with `shortcut` is `goal`."""
    shape = (1, -1, *[1] * (goal.ndim - 2))
    scale, shift = (t.to(goal).view(shape) for t in (how.scale, how.shift))
    live = how.weights.to(goal).view(shape) > 0
    inverse = torch.where(live, 1 / torch.where(live, scale, 1.0), 0.0)
    return (goal - shortcut - shift) * inverse


def visible(goal: Tensor, made: Tensor, shortcut: Tensor | None, how: Readout) -> Tensor:
    """Rows (P, C) that a layer should give, of which it gives `made`, where a ReLU reads them.

    Where the ReLU raises both to zero, what is made is good as it is; where it raises the goal
    alone, zero is enough. The squared distance to these rows is no less than the error that the
    ReLU leaves, and equal to it at `made`, except where the goal is above zero and what is made
    below: so a step of least squares towards them lessens that error (majorisation). Zhang, Zou,
    He & Sun (TPAMI 2016, arXiv 1505.06798, section 3.2) fit nonlinear responses for the same
    reason.

    Args:
        goal: What the original gives, corrected for the shortcut.
        made: What the layer gives now.
        shortcut: What is added behind the norm, (P, C), None without.
        how: How the outputs count.
    """
    zero = -how.shift if shortcut is None else -how.shift - shortcut
    live = how.weights > 0
    scale = torch.where(live, how.scale, 1.0)
    hidden, negative = goal * scale <= zero, made * scale <= zero
    seen = torch.where(hidden, torch.where(negative, made, zero / scale), goal)
    return torch.where(live, seen, goal)


def site_window(site: Site) -> Window:
    """The site's window with its padding resolved for its input size."""
    geometry = site.geometry
    (top, bottom), (left, right) = geometry.pads((site.input_shape[-2], site.input_shape[-1]))
    return Window(
        geometry.kernel_size, geometry.stride, (top, bottom, left, right), geometry.dilation
    )


def site_operations(site: Site) -> tuple[Operation, ...]:
    """What a channel of a site may become: every tap of the kernel, every centred average."""
    reach = max(site.geometry.kernel_size) // 2
    pools = site.geometry.dilation == (1, 1)
    return tuple(op for op in operations(site_window(site), reach=reach, pools=pools) if op.linear)


class _Sampler:
    """The positions of a site's output that are looked at, the same ones for every sampler of it.

    Args:
        site: The site.
        batches: All images; they are to be sampled batch by batch, in this order.
        most: Positions that are looked at in all batches, about.
    """

    def __init__(self, site: Site, batches: Sequence[Tensor], most: int) -> None:
        self._window = site_window(site)
        self._per_image = most / sum(len(batch) for batch in batches)
        self._generator = torch.Generator().manual_seed(0)

    def inputs(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Parts of a batch (N, C, H, W) with the flat positions of their outputs, None for all."""
        rows, columns = self._window.output_size(x.shape[2], x.shape[3])
        for images, chosen in self._parts(len(x), rows * columns):
            yield x[images], None if chosen is None else chosen.to(x.device)

    def outputs(self, y: Tensor) -> Tensor:
        """The rows (P, C_out), float32 on the CPU, of outputs (N, C_out, H', W')."""
        rows = []
        for images, chosen in self._parts(len(y), y.shape[2] * y.shape[3]):
            flat = y[images].permute(0, 2, 3, 1).flatten(0, 2)
            rows.append(flat if chosen is None else flat[chosen.to(y.device)])
        return torch.cat(rows).float().cpu()

    def _parts(self, images: int, here: int) -> Iterator[tuple[slice, Tensor | None]]:
        kept = min(1.0, self._per_image / here)
        step = max(1, int(_CHUNK / (here * kept)))
        for first in range(0, images, step):
            last = min(first + step, images)
            number = (last - first) * here
            most = max(1, round(number * kept))
            yield slice(first, last), sample_positions(number, most, self._generator)


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
    samplers = [_Sampler(site, batches, most) for site in sites]

    def add(place: int, x: Tensor) -> None:
        x = screened(x.detach().float(), looked[place])
        for part, chosen in samplers[place].inputs(x):
            rows = column_rows(part, site_window(sites[place]), ops[place], chosen)
            sums[place].add(rows.cpu())

    handles = [
        on_input(model.get_submodule(site.name), partial(add, place))
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


def goal_rows(
    teacher: nn.Module,
    sites: Sequence[Site],
    layers: Sequence[str],
    hows: Sequence[Readout],
    batches: Sequence[Tensor],
    most: int,
) -> list[list[Tensor]]:
    """What the original gives at the sampled positions of each site, in one pass over the images.

    Args:
        teacher: The original, in eval mode.
        sites: The sites.
        layers: For each, the path of the layer whose output is wanted: the site itself, or the
            pointwise layer behind it.
        hows: For each, how that output counts: where a shortcut is added, the sum is read.
        batches: Images (N, C, H, W), one batch each.
        most: Positions that are looked at for each site, about.

    Returns:
        For each site and batch the rows (P, C_out).
    """
    samples = [_Sampler(site, batches, most).outputs for site in sites]
    return sampled_rows(teacher, layers, hows, batches, samples, [site.calls for site in sites])


def sampled_rows(
    teacher: nn.Module,
    layers: Sequence[str],
    hows: Sequence[Readout],
    batches: Sequence[Tensor],
    samples: Sequence[Callable[[Tensor], Tensor]],
    calls: Sequence[int],
) -> list[list[Tensor]]:
    """What the original gives at each of some layers, in one pass over the images.

    Args:
        teacher: The original, in eval mode.
        layers: Paths of the layers.
        hows: For each, how its output counts: where a shortcut is added, the sum is read.
        batches: Images (N, C, H, W), one batch each.
        samples: For each layer what takes rows (P, C_out) of a batch of its outputs.
        calls: How often each is called.

    Returns:
        For each layer and batch the rows (P, C_out).
    """
    found: list[list[Tensor]] = [[] for _ in layers]
    wanted: dict[str, tuple[str, Side]] = {
        str(place): (layer, "output") if how.merge is None else (how.merge, "input")
        for place, (layer, how) in enumerate(zip(layers, hows, strict=True))
    }
    called = {str(place): number for place, number in enumerate(calls)}

    def sample(key: str, y: Tensor) -> Tensor:
        return samples[int(key)](y)

    for batch in batches:
        for key, rows in capture(teacher, batch, wanted, called, sample).items():
            found[int(key)].append(rows)
    return found


def rows_bytes(how: Readout) -> int:
    """Bytes of the rows of one layer's output at `POSITIONS` positions."""
    return 4 * POSITIONS * len(how.weights)


def refit_moments(
    front: Front,
    site: Site,
    goals: Sequence[Tensor],
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
        front: The edited network, whose site still is its convolution, and the images.
        site: The site.
        goals: The original's rows of this site, from `goal_rows` with the same images.
        ops: The operations of its columns.
        how: How its output counts.
        most: Positions that are looked at, about.
        layer: Path of the layer whose output is wanted, the site itself if None.
        screen: Directions that stand for the channels of a very wide site.
    """
    total: MomentSum | None = None
    window = site_window(site)
    sampler, shortcuts = (_Sampler(site, front.batches, most) for _ in range(2))
    wanted: dict[str, tuple[str, Side]] = {"x": (site.name, "input")}
    if how.merge is not None:
        wanted |= {"out": (how.norm or layer or site.name, "output"), "sum": (how.merge, "input")}
    calls = dict.fromkeys(wanted, site.calls)
    for made, goal in zip(front.captures(site.name, wanted, calls), goals, strict=True):
        x = screened(made["x"].float(), screen)
        total = total or MomentSum(len(ops) * x.shape[1], goal.shape[1])
        if how.merge is not None:
            goal = corrected(goal, shortcuts.outputs(made["sum"] - made["out"]), how)
        first = 0
        for part, chosen in sampler.inputs(x):
            values = column_rows(part, window, ops, chosen).cpu()
            total.add(values, goal[first : first + len(values)])
            first += len(values)
    if total is None:
        raise DataError("There is no image to fit to.")
    return total.result()
