"""Refit every convolution of an edited network, a pruned one say, to what the original gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pfsurgery.errors import RecordMismatchError
from pfsurgery.graph import GraphView, view
from pfsurgery.neighbours import neighbours_of_module
from pfsurgery.policy import Tell
from pfsurgery.recover.calibration import (
    calibration_batches,
    frozen_copy,
    frozen_teacher,
    hold_out,
)
from pfsurgery.recover.capture import Side, capture
from pfsurgery.recover.columns import column_rows, operations
from pfsurgery.recover.distance import check_same_outputs
from pfsurgery.recover.gram import Moments, MomentSum, Positions
from pfsurgery.recover.polish import polish
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.readout import Readout, around_sum, lacking, readout_of
from pfsurgery.recover.refit import Refit, layer_columns, solve_layer
from pfsurgery.recover.target import POSITIONS, window_of
from pfsurgery.sites import geometry_of


def refit_layers(
    model: nn.Module, teacher: nn.Module, images: Any, *, tell: Tell = lambda line: None
) -> tuple[Refit, ...]:
    """Refit an edited network to its original, in place, layer by layer.

    For networks that other tools made smaller: layers have the names that they have in the
    original, and fewer channels. Every dense convolution is solved again in the order of execution
    by ridge regression, with inputs from the edited network and, as targets, the channels of the
    original that it kept; where a shortcut is added, the target is what the sum lacks. Which
    channels were kept is read from the norms (or biases) behind, so refit before norm statistics
    are re-estimated and before any training. At the end norms and classifier are corrected where
    that brings the output closer to the original's.

    He, Zhang & Sun, ICCV 2017, arXiv 1707.06168, section 3.

    Args:
        model: The edited network, for instance a pruned one.
        teacher: The original, in any dtype and on any device.
        images: A few hundred to a few thousand unlabelled images, as `recalibrate` takes them.
        tell: Called with a line of text for each layer.

    Returns:
        What was refitted, layer by layer.

    Raises:
        RecordMismatchError: No layer of the model maps onto the original's, or its outputs have
            another shape.
        DataError: There is no image, or a value is not finite.
    """
    batches, judges = hold_out(calibration_batches(images, model))
    student, original = frozen_copy(model), frozen_teacher(teacher, model)
    check_same_outputs(student, original, batches[0][:1])
    seen = view(original, (batches[0][:1],))
    twins = [_twin(student, original, name, seen) for name in _convolutions(original, seen)]
    misfits = [twin for twin in twins if isinstance(twin, Refit)]
    if len(misfits) == len(twins):
        reasons = "; ".join(f"{misfit.site}: {misfit.reason}" for misfit in misfits[:3])
        raise RecordMismatchError(
            f"No convolution of {type(model).__name__} maps onto one of the original's "
            f"({reasons}): is it the network that was edited, before norms were re-estimated or "
            f"trained?"
        )
    done = []
    for twin in tracked(twins, "refitting"):
        if isinstance(twin, Refit):
            tell(f"{twin.site}: not refitted, {twin.reason}")
            done.append(twin)
            continue
        started = time.perf_counter()
        refit = _refit(student, original, twin, batches)
        done.append(replace(refit, seconds=time.perf_counter() - started))
        tell(f"{refit.site}: refitted, error {refit.before:.3f} -> {refit.after:.3f}")
    polish(student, original, batches, judges, tell)
    model.load_state_dict(student.state_dict())
    return tuple(done)


@dataclass(frozen=True, slots=True)
class _Twin:
    """A layer and what it should give.

    Attributes:
        name: Path of the layer in both networks.
        kept: Its channels in the original, (C_out,).
        how: How these outputs count.
    """

    name: str
    kept: Tensor
    how: Readout


def _convolutions(original: nn.Module, seen: GraphView) -> list[str]:
    """Paths of the convolutions that are called once, in the order of execution."""
    called = [str(node.target) for node in seen.graph.nodes if node.op == "call_module"]
    return [
        name
        for name in called
        if called.count(name) == 1 and isinstance(original.get_submodule(name), nn.Conv2d)
    ]


def _twin(student: nn.Module, original: nn.Module, name: str, seen: GraphView) -> _Twin | Refit:
    old, new = original.get_submodule(name), _module(student, name)
    if not isinstance(old, nn.Conv2d) or not isinstance(new, nn.Conv2d):
        return Refit(name, None, reason="the edited network has no such convolution")
    if new.groups > 1:
        return Refit(name, None, reason="it is grouped")
    if (new.kernel_size, new.stride) != (old.kernel_size, old.stride):
        return Refit(name, None, reason="its geometry is not that of the original's")
    if new.padding_mode != "zeros":
        return Refit(name, None, reason=f"its padding is {new.padding_mode}, not zeros")
    around = neighbours_of_module(name, seen)
    how = readout_of(original, around, old.out_channels)
    path = name if how.norm is None else how.norm
    mark = _module(student, path)
    if mark is None or (how.norm is not None and not isinstance(mark, _BatchNorm)):
        return Refit(name, None, reason=f"the edited network has no batch norm at {path}")
    kept = _kept(mark, original.get_submodule(path))
    if kept is None:
        return Refit(name, None, reason=f"{path} does not tell which channels were kept")
    part = replace(how, scale=how.scale[kept], shift=how.shift[kept], weights=how.weights[kept])
    return _Twin(name, kept, part)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _kept(new: nn.Module, old: nn.Module) -> Tensor | None:
    """Channels of the original that a pruned norm or convolution still has, None if unclear."""
    after, before = _marks(new), _marks(old)
    if len(after) == len(before):
        return torch.arange(len(after))
    if not before.shape[1]:
        return None
    same = (after[:, None] == before[None]).all(2)
    return same.int().argmax(1) if bool((same.sum(1) == 1).all()) else None


def _marks(module: nn.Module) -> Tensor:
    """What tells the channels of a norm or convolution apart, (C, marks)."""
    if isinstance(module, _BatchNorm):
        marks = [module.weight, module.bias, module.running_mean, module.running_var]
        found = [mark for mark in marks if mark is not None]
        return torch.stack(found, dim=1).detach().cpu()
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.new_zeros(len(weight), 0) if bias is None else bias.detach().cpu()[:, None]


@torch.no_grad()
def _refit(
    student: nn.Module, original: nn.Module, twin: _Twin, batches: Sequence[Tensor]
) -> Refit:
    layer = student.get_submodule(twin.name)
    if not isinstance(layer, nn.Conv2d):
        raise RecordMismatchError(f"{twin.name} is no convolution.")
    norm = None if twin.how.norm is None else student.get_submodule(twin.how.norm)
    moments = _moments(student, original, twin, layer, batches)
    moments = moments.with_prior(layer_columns(layer))
    solved = solve_layer(layer, norm, moments, twin.how.weights)
    return Refit(twin.name, twin.name, solved.share(solved.before), solved.share(solved.after))


def _moments(
    student: nn.Module,
    original: nn.Module,
    twin: _Twin,
    layer: nn.Conv2d,
    batches: Sequence[Tensor],
) -> Moments:
    geometry = geometry_of(layer)
    total = MomentSum(layer_columns(layer).shape[0], layer.out_channels)
    positions = Positions(sum(len(batch) for batch in batches), POSITIONS)
    for batch in batches:
        x, y = _input_and_target(student, original, twin, batch)
        window = window_of(geometry, (x.shape[2], x.shape[3]))
        taps = operations(window, reach=max(geometry.kernel_size), pools=False)
        goals = y.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = positions(len(batch), len(goals))
        if chosen is not None:
            chosen = chosen.to(x.device)
            goals = goals[chosen]
        rows = column_rows(x.float(), window, taps, chosen)
        total.add(rows.cpu(), goals.float().cpu())
    return total.result()


def _input_and_target(
    student: nn.Module, original: nn.Module, twin: _Twin, batch: Tensor
) -> tuple[Tensor, Tensor]:
    name, how = twin.name, twin.how
    kept = twin.kept.to(batch.device)
    wanted: tuple[str, Side] = (name, "output") if how.merge is None else (how.merge, "input")
    goal = capture(original, batch, {"y": wanted})["y"][:, kept]
    own: dict[str, tuple[str, Side]] = {"x": (name, "input")}
    made = capture(student, batch, own | around_sum(how, name))
    return made["x"], lacking(goal, made, lambda shortcut: shortcut, how)[0]
