"""Refit the layers behind replaced convolutions in closed form, without labels or gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.graph import view
from pfsurgery.neighbours import neighbours_of_module
from pfsurgery.plan import Decision
from pfsurgery.policy import Tell
from pfsurgery.record import record
from pfsurgery.recover.calibration import calibration_batches, frozen_copy, hold_out
from pfsurgery.recover.capture import capture
from pfsurgery.recover.gram import Moments, MomentSum, sample_positions
from pfsurgery.recover.linalg import ridge_gcv
from pfsurgery.recover.norms import recalibrate
from pfsurgery.recover.polish import polish
from pfsurgery.recover.target import Readout, corrected, readout_of
from pfsurgery.rewrite import Composite
from pfsurgery.sites import Neighbours

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
    """

    site: str
    layer: str | None
    before: float = 0.0
    after: float = 0.0
    reason: str = ""


def reconstruct(
    model: nn.Module, teacher: nn.Module, images: Any, *, tell: Tell = lambda line: None
) -> tuple[Refit, ...]:
    """Refit a converted model to its original, in place.

    Norm statistics are re-estimated. Then, in the order of execution, the pointwise layer that
    reads each replaced site is solved again by ridge regression, with inputs from the converted
    network and the original's outputs as targets; where a shortcut is added behind it, the target
    is what the sum lacks, so that later layers correct earlier errors. At the end norms and
    classifier are corrected where that brings the output closer to the original's.

    He, Zhang & Sun, ICCV 2017 (arXiv 1707.06168) refit after channel pruning in this way; the
    strength of the ridge is chosen by generalised cross-validation (Golub, Heath & Wahba 1979).

    Args:
        model: What `convert` made.
        teacher: The model as it was before.
        images: A few hundred to a few thousand unlabelled images, as `recalibrate` takes them.
        tell: Called with a line of text for each site.

    Returns:
        What was refitted, site by site.

    Raises:
        RecordMismatchError: The model was not made by `convert`, or not from `teacher`.
        DataError: There is no image, or a value is not finite.
    """
    decisions = [d for plan in record(model).plans for d in plan.replaced]
    batches, judges = hold_out(calibration_batches(images, model))
    student, original = frozen_copy(model), frozen_copy(teacher)
    recalibrate(student, batches)
    seen = view(original, (batches[0][:1],))
    done = []
    for decision in decisions:
        name = _layer_behind(student, decision)
        if name is None:
            why = "no pointwise layer reads this site"
            done.append(Refit(decision.site.name, None, reason=why))
            tell(f"{decision.site.name}: not refitted, {why}")
            continue
        twin = name.removesuffix(".pointwise")
        around = neighbours_of_module(twin, seen)
        _check_twins(student, original, name, twin)
        refit = _refit(student, original, decision.site.name, name, twin, around, batches)
        done.append(refit)
        tell(f"{refit.site}: {name} refitted, error {refit.before:.3f} -> {refit.after:.3f}")
    polish(student, original, batches, judges, tell)
    model.load_state_dict(student.state_dict())
    return tuple(done)


def _layer_behind(student: nn.Module, decision: Decision) -> str | None:
    site = decision.site
    module = student.get_submodule(site.name)
    if isinstance(module, Composite) and decision.pointwise:
        return f"{site.name}.pointwise" if site.geometry.groups == 1 else None
    return site.neighbours.pointwise_after if site.calls == 1 else None


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


@torch.no_grad()
def _refit(
    student: nn.Module,
    original: nn.Module,
    site: str,
    name: str,
    twin: str,
    around: Neighbours,
    batches: Sequence[Tensor],
) -> Refit:
    layer = student.get_submodule(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise RecordMismatchError(f"{name} is neither a convolution nor linear.")
    how = readout_of(original, around, len(layer.weight))
    norm: Any = None
    if how.norm is not None:
        # The layer is fitted to what it gave before, so its norm takes back what it knew then.
        norm = student.get_submodule(how.norm)
        norm.load_state_dict(original.get_submodule(how.norm).state_dict())
    moments = _moments(student, original, name, twin, how, layer, batches)
    if layer.bias is None and norm is None:
        moments = moments.through_origin()
    weights = how.weights
    total = float((moments.target.diagonal() * weights.square()).sum())
    before = _error(layer, moments, weights, total)
    live = (weights > 0).to(weights)
    solved = ridge_gcv(moments.gram, moments.cross * weights, total, moments.count)
    solved = solved * (live / torch.where(weights > 0, weights, 1.0))
    layer.weight.copy_(solved.T.reshape(layer.weight.shape))
    offset = moments.target_mean - moments.column_mean @ solved
    if layer.bias is not None:
        layer.bias.copy_(offset)
    elif norm is not None:
        norm.running_mean.sub_(offset.to(norm.running_mean))
    return Refit(site, name, before, _error(layer, moments, weights, total, bias=offset))


def _moments(
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
            x, y = made["x"], corrected(goal, made["sum"] - made["out"], how)
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
    kernel = layer.weight.detach().cpu().double().flatten(1).T
    if bias is None:
        own = layer.bias
        bias = moments.target_mean * 0 if own is None else own.detach().cpu().double()
    weighted = kernel * weights
    explained = 2 * (weighted * moments.cross * weights).sum()
    explained -= (weighted * (moments.gram @ weighted)).sum()
    offset = (moments.target_mean - bias - moments.column_mean @ kernel) * weights
    return float((total - explained + offset.square().sum()) / total) if total > 0 else 0.0
