"""Solve one pointwise layer again, so that it gives what it gave in the original network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.recover.capture import capture
from pfsurgery.recover.gram import Moments, MomentSum, sample_positions
from pfsurgery.recover.linalg import ridge_gcv
from pfsurgery.recover.target import Readout, corrected, readout_of
from pfsurgery.sites import Neighbours
from pfsurgery.weights import applied_weight

_POSITIONS = 65536


@dataclass(frozen=True, slots=True)
class Refit:
    """What was refitted for one replaced site.

    Attributes:
        site: Name of the site.
        layer: Path of the layer that was refitted, None where there is none.
        before: Relative error of that layer's output before, behind its norm; 1 is no better
            than a constant.
        after: The same after.
        reason: Why nothing was refitted; empty where it was.
        seconds: Wall-clock time that it took.
    """

    site: str
    layer: str | None
    before: float = 0.0
    after: float = 0.0
    reason: str = ""
    seconds: float = field(default=0.0, compare=False)


@torch.no_grad()
def refit_layer(
    student: nn.Module,
    original: nn.Module,
    site: str,
    name: str,
    twin: str,
    around: Neighbours,
    batches: Sequence[Tensor],
) -> Refit:
    """Refit a pointwise layer in place, by ridge regression on what it reads now.

    Args:
        student: The edited network, in eval mode.
        original: The original, in eval mode.
        site: Name of the replaced site that the layer reads.
        name: Path of the layer in the edited network.
        twin: Path of the layer whose outputs it should give, in the original.
        around: Neighbours of `twin`.
        batches: Images (N, C, H, W), one batch each.

    Raises:
        RecordMismatchError: The two layers do not fit.
    """
    _check_twins(student, original, name, twin)
    layer = student.get_submodule(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise RecordMismatchError(f"{name} is neither a convolution nor linear.")
    how = readout_of(original, around, len(layer.weight))
    norm: Any = None
    if how.norm is not None:
        # The layer is fitted to what it gave before, so its norm takes back what it knew then.
        norm = student.get_submodule(how.norm)
        norm.load_state_dict(original.get_submodule(how.norm).state_dict())
    moments = _layer_moments(student, original, name, twin, how, layer, batches)
    before, after = solve_layer(layer, norm, moments, how.weights)
    return Refit(site, name, before, after)


def solve_layer(
    layer: nn.Conv2d | nn.Linear, norm: Any, moments: Moments, weights: Tensor
) -> tuple[float, float]:
    """Put the ridge solution into a layer, its bias into the norm behind where it has none.

    The layer stays as it is where that brings it no nearer.

    Args:
        layer: The layer, changed in place.
        norm: The batch norm behind it, None without one.
        moments: Of what the layer reads, tap by tap and channel by channel, and of its targets.
        weights: Importance of each output, (C_out,).

    Returns:
        The relative error before and after.
    """
    if layer.bias is None and norm is None:
        moments = moments.through_origin()
    total = float((moments.target.diagonal() * weights.square()).sum())
    before = _error(layer, moments, weights, total)
    live = (weights > 0).to(weights)
    solved = ridge_gcv(moments.gram, moments.cross * weights, total, moments.count)
    solved = solved * (live / torch.where(weights > 0, weights, 1.0))
    held = layer.weight.clone()
    layer.weight.copy_(_as_weight(solved, layer))
    offset = moments.target_mean - moments.column_mean @ layer_columns(layer)
    after = _error(layer, moments, weights, total, bias=offset)
    if after > before:  # as may happen where the layer standardises what it is given
        layer.weight.copy_(held)
        return before, before
    if layer.bias is not None:
        layer.bias.copy_(offset)
    elif norm is not None:
        norm.running_mean.sub_(offset.to(norm.running_mean))
    return before, after


def layer_columns(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight that a layer applies, as (taps * C, C_out), tap by tap, float64 on the CPU."""
    weight = applied_weight(layer).detach().cpu().double()
    return weight.reshape(*weight.shape[:2], -1).permute(2, 1, 0).flatten(0, 1)


def _as_weight(columns: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The inverse of `layer_columns`."""
    outputs, inputs = layer.weight.shape[:2]
    return columns.reshape(-1, inputs, outputs).permute(2, 1, 0).reshape(layer.weight.shape)


def _layer_moments(
    student: nn.Module,
    original: nn.Module,
    name: str,
    twin: str,
    how: Readout,
    layer: nn.Conv2d | nn.Linear,
    batches: Sequence[Tensor],
) -> Moments:
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    total = MomentSum(inputs, len(layer.weight))
    generator = torch.Generator().manual_seed(0)
    images = sum(len(batch) for batch in batches)
    for batch in batches:
        if how.merge is None:
            x = capture(student, batch, {"x": (name, "input")})["x"]
            y = capture(original, batch, {"y": (twin, "output")})["y"]
        else:
            behind = how.norm or name
            made = capture(
                student,
                batch,
                {"x": (name, "input"), "out": (behind, "output"), "sum": (how.merge, "input")},
            )
            goal = capture(original, batch, {"sum": (how.merge, "input")})["sum"]
            shortcut = made["sum"] - made["out"]
            x = made["x"]
            y = corrected(goal, shortcut, how) if axis == 1 else goal - shortcut
        rows, goals = _rows(x, axis), _rows(y, axis)
        most = max(1, round(_POSITIONS * len(batch) / images))
        kept = sample_positions(len(rows), most, generator)
        if kept is not None:
            rows, goals = rows[kept.to(rows.device)], goals[kept.to(goals.device)]
        total.add(rows.float().cpu(), goals.float().cpu())
    return total.result()


def _rows(x: Tensor, axis: int) -> Tensor:
    """(..., C, ...) as rows of channels."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def _error(
    layer: nn.Conv2d | nn.Linear,
    moments: Moments,
    weights: Tensor,
    total: float,
    bias: Tensor | None = None,
) -> float:
    kernel = layer_columns(layer)
    if bias is None:
        own = layer.bias
        bias = moments.target_mean * 0 if own is None else own.detach().cpu().double()
    weighted = kernel * weights
    explained = 2 * (weighted * moments.cross * weights).sum()
    explained -= (weighted * (moments.gram @ weighted)).sum()
    offset = (moments.target_mean - bias - moments.column_mean @ kernel) * weights
    return float((total - explained + offset.square().sum()) / total) if total > 0 else 0.0


def _check_twins(student: nn.Module, original: nn.Module, name: str, twin: str) -> None:
    try:
        old = original.get_submodule(twin)
    except AttributeError:
        old = None
    new = student.get_submodule(name)
    fits = isinstance(old, nn.Conv2d | nn.Linear) and isinstance(new, nn.Conv2d | nn.Linear)
    if not fits or len(old.weight) != len(new.weight):  # type: ignore[union-attr,arg-type]
        raise RecordMismatchError(
            f"{twin} of the teacher does not have the outputs that {name} should give: is this "
            f"the model that was converted?"
        )
