"""How a layer's output counts: behind its norm, beside a shortcut, behind a ReLU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pfsurgery.graph import GraphView
from pfsurgery.neighbours import is_rectified
from pfsurgery.recover.capture import Side
from pfsurgery.sites import Neighbours, Site

_DEAD = 1e-4  # norm weights below this share of the largest make a channel that says nothing


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


def rectified_readout(
    model: nn.Module, path: str, around: Neighbours, outputs: int, seen: GraphView
) -> Readout:
    """`readout_of` the layer at `path`, with whether a ReLU alone reads it in the view `seen`."""
    how = readout_of(model, around, outputs)
    return replace(how, rectified=is_rectified(path, how.norm, how.merge, seen))


def site_readout(teacher: nn.Module, site: Site) -> Readout:
    """How a site's output counts in the original."""
    return readout_of(teacher, site.neighbours, site.geometry.out_channels)


def around_sum(how: Readout, layer: str) -> dict[str, tuple[str, Side]]:
    """What to capture where a shortcut is added: "sum" less "out" is the shortcut; else nothing."""
    if how.merge is None:
        return {}
    return {"out": (how.norm or layer, "output"), "sum": (how.merge, "input")}


def corrected(goal: Tensor, shortcut: Tensor, how: Readout) -> Tensor:
    """What a layer should give, (N, C, ...), so that its sum with `shortcut` is `goal`."""
    shape = (1, -1, *[1] * (goal.ndim - 2))
    scale, shift = (t.to(goal).view(shape) for t in (how.scale, how.shift))
    live = how.weights.to(goal).view(shape) > 0
    inverse = torch.where(live, 1 / torch.where(live, scale, 1.0), 0.0)
    return (goal - shortcut - shift) * inverse


def lacking(
    goal: Tensor, made: Mapping[str, Tensor], rows: Callable[[Tensor], Tensor], how: Readout
) -> tuple[Tensor, Tensor | None]:
    """What a layer should give, and the shortcut that is added to it, None without one.

    Args:
        goal: What the original gives: where a shortcut is added, the sum.
        made: What `around_sum` captured in the edited network.
        rows: Takes the part of a tensor that `goal` has.
        how: How the outputs count.
    """
    if how.merge is None:
        return goal, None
    shortcut = rows(made["sum"] - made["out"])
    return corrected(goal, shortcut, how), shortcut


def visible(goal: Tensor, made: Tensor, shortcut: Tensor | None, how: Readout) -> Tensor:
    """Rows (P, C) that a layer should give, of which it gives `made`, where a ReLU reads them.

    Where the ReLU raises both to zero, what is made is good as it is; where it raises the goal
    alone, zero is enough. The squared distance to these rows is no less than the error that the
    ReLU leaves. At `made` it is equal to it, except where the goal is above zero and what is made
    below: but for these a step of least squares towards the rows lessens the error (majorisation).
    Zhang, Zou, He & Sun (TPAMI 2016, arXiv 1505.06798, section 3.2) fit nonlinear responses for the
    same reason.

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
