"""Solve one pointwise layer again, so that it gives what it gave in the original network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.graph import GraphView
from pfsurgery.neighbours import neighbours_of_module
from pfsurgery.recover.capture import Side
from pfsurgery.recover.front import Front
from pfsurgery.recover.gram import Moments, MomentSum, Positions
from pfsurgery.recover.groups import in_memory
from pfsurgery.recover.linalg import weighted_ridge
from pfsurgery.recover.readout import Readout, around_sum, lacking, rectified_readout, visible
from pfsurgery.recover.target import POSITIONS, ROWS_MEMORY, rows_bytes, sampled_rows
from pfsurgery.weights import applied_weight

_ROUNDS = 3  # towards what a ReLU lets through


@dataclass(frozen=True, slots=True)
class Refit:
    """What was refitted for one replaced site.

    Attributes:
        site: Name of the site.
        layer: Path of the layer that was refitted, None where there is none.
        before: Relative error of that layer's output before, behind its norm; 1 is no better
            than a constant.
        after: The same after, without what a ReLU hides.
        reason: Why nothing was refitted; empty where it was.
        seconds: Wall-clock time that it took.
    """

    site: str
    layer: str | None
    before: float = 0.0
    after: float = 0.0
    reason: str = ""
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class LayerAim:
    """A pointwise layer of the edited network, and what it should give.

    Attributes:
        site: Name of the replaced site that the layer reads.
        layer: Path of the layer in the edited network.
        twin: Path of the layer that stood there, in the original.
        goal: Path of the module whose outputs it should give, in the original: the twin, or the
            last one behind it that was dropped.
        how: How these outputs count.
    """

    site: str
    layer: str
    twin: str
    goal: str
    how: Readout


def layer_aim(
    student: nn.Module,
    original: nn.Module,
    site: str,
    name: str,
    twin: str,
    seen: GraphView,
    dropped: tuple[str, ...] = (),
) -> LayerAim:
    """What the pointwise layer `name` of the edited network should give.

    Args:
        student: The edited network.
        original: The original.
        site: Name of the replaced site that the layer reads.
        name: Path of the layer in the edited network.
        twin: Path of the layer that stood there, in the original.
        seen: The graph view of the original.
        dropped: Paths of norm and activation behind the twin that are no more.

    Raises:
        RecordMismatchError: The two layers do not fit.
    """
    _check_twins(student, original, name, twin)
    goal = (twin, *dropped)[-1]
    around = neighbours_of_module(goal, seen)
    how = rectified_readout(original, goal, around, len(_layer(student, name).weight), seen)
    return LayerAim(site, name, twin, goal, how)


def original_rows(
    original: nn.Module, aims: Sequence[LayerAim], batches: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """What the original gives for each aim, from as few passes as memory allows.

    Yields:
        For an aim, the sampled rows (P, C_out) of each batch.
    """
    for group in in_memory(aims, lambda aim: rows_bytes(aim.how), ROWS_MEMORY):
        paths, hows = [aim.goal for aim in group], [aim.how for aim in group]
        samples = [_RowSampler(batches, original.get_submodule(aim.twin)) for aim in group]
        yield from sampled_rows(original, paths, hows, batches, samples, [1] * len(group))


@torch.no_grad()
def refit_layer(front: Front, original: nn.Module, aim: LayerAim, goals: Sequence[Tensor]) -> Refit:
    """Refit a pointwise layer in place, by ridge regression on what it reads now.

    Where a ReLU reads its output, a few more regressions follow: what the ReLU hides anyway, the
    layer need not give.

    Args:
        front: The edited network, and the images.
        original: The original, in eval mode.
        aim: The layer, and what it should give.
        goals: The original's rows for it, from `original_rows` with the same images.

    Raises:
        RecordMismatchError: It is neither a convolution nor linear.
    """
    student = front.network
    layer = _layer(student, aim.layer)
    norm: Any = None
    mean = offset = torch.zeros(len(layer.weight))
    if aim.how.norm is not None:
        # The layer is fitted to what it gave before, so its norm takes back what it knew then.
        norm = student.get_submodule(aim.how.norm)
        norm.load_state_dict(original.get_submodule(aim.how.norm).state_dict())
        mean = norm.running_mean.clone()
    moments = _layer_moments(front, layer, aim, goals)
    first = solved = solve_layer(layer, norm, moments, aim.how.weights)
    for _ in range(_ROUNDS if aim.how.rectified else 0):
        if norm is not None:
            offset = (mean - norm.running_mean).cpu()
        moments = _visible_moments(front, layer, offset, aim, goals, moments)
        solved = solve_layer(layer, norm, moments, aim.how.weights)
    return Refit(aim.site, aim.layer, first.share(first.before), first.share(solved.after))


@dataclass(frozen=True, slots=True)
class Solved:
    """Mean squared errors of a layer's outputs, by their importance.

    Attributes:
        before: With the weights that it had.
        after: With those that it has now.
        variance: Of its targets.
    """

    before: float
    after: float
    variance: float

    def share(self, error: float) -> float:
        """An error as a share of the variance."""
        return error / self.variance if self.variance > 0 else 0.0


def solve_layer(
    layer: nn.Conv2d | nn.Linear, norm: Any, moments: Moments, weights: Tensor
) -> Solved:
    """Put the ridge solution into a layer, its bias into the norm behind where it has none.

    The layer stays as it is where that brings it no nearer.

    Args:
        layer: The layer, changed in place.
        norm: The batch norm behind it, None without one.
        moments: Of what the layer reads, tap by tap and channel by channel, and of its targets.
        weights: Importance of each output, (C_out,).
    """
    if layer.bias is None and norm is None:
        moments = moments.through_origin()
    total = moments.variance(weights)
    before = _error(layer, moments, weights)
    solved = weighted_ridge(moments.gram, moments.cross, weights, total, moments.count)
    held = layer.weight.clone()
    layer.weight.copy_(_as_weight(solved, layer))
    offset = moments.target_mean - moments.column_mean @ layer_columns(layer)
    after = _error(layer, moments, weights, bias=offset)
    if after > before:  # as may happen where the layer standardises what it is given
        layer.weight.copy_(held)
        return Solved(before, before, total)
    if layer.bias is not None:
        layer.bias.copy_(offset)
    elif norm is not None:
        norm.running_mean.sub_(offset.to(norm.running_mean))
    return Solved(before, after, total)


def layer_columns(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight that a layer applies, as (taps * C, C_out), tap by tap, float64 on the CPU."""
    weight = applied_weight(layer).detach().cpu().double()
    return weight.reshape(*weight.shape[:2], -1).permute(2, 1, 0).flatten(0, 1)


def _as_weight(columns: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The inverse of `layer_columns`."""
    outputs, inputs = layer.weight.shape[:2]
    return columns.reshape(-1, inputs, outputs).permute(2, 1, 0).reshape(layer.weight.shape)


class _RowSampler:
    """Rows of channels at sampled positions, the same ones for every sampler of the same batches.

    Args:
        batches: All images; they are to be sampled batch by batch, in this order.
        layer: The layer that reads or gives the rows.
    """

    def __init__(self, batches: Sequence[Tensor], layer: nn.Module) -> None:
        self._axis = 1 if isinstance(layer, nn.Conv2d) else -1
        self._sizes = iter([len(batch) for batch in batches])
        self._positions = Positions(sum(len(batch) for batch in batches), POSITIONS)

    def __call__(self, x: Tensor) -> Tensor:
        """The rows (P, C), float32 on the CPU, of (N, C, H, W) or (N, ..., C)."""
        rows = x.movedim(self._axis, -1).reshape(-1, x.shape[self._axis])
        kept = self._positions(next(self._sizes), len(rows))
        return (rows if kept is None else rows[kept.to(rows.device)]).float().cpu()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one batch at the sampled positions: what a layer reads, makes and should give.

    Attributes:
        read: (P, C).
        made: (P, C_out).
        goal: What the original gives, less what the shortcut already gets wrong, (P, C_out).
        shortcut: What is added behind the norm, (P, C_out), None without.
    """

    read: Tensor
    made: Tensor
    goal: Tensor
    shortcut: Tensor | None


def _rows(
    front: Front, layer: nn.Conv2d | nn.Linear, aim: LayerAim, goals: Sequence[Tensor]
) -> Iterator[_Rows]:
    how = aim.how
    read, made, shortcuts = (_RowSampler(front.batches, layer) for _ in range(3))
    own: dict[str, tuple[str, Side]] = {"x": (aim.layer, "input"), "y": (aim.layer, "output")}
    wanted = own | around_sum(how, aim.layer)
    for seen, goal in zip(front.captures(aim.twin, wanted), goals, strict=True):
        yield _Rows(read(seen["x"]), made(seen["y"]), *lacking(goal, seen, shortcuts, how))


def _layer_moments(
    front: Front, layer: nn.Conv2d | nn.Linear, aim: LayerAim, goals: Sequence[Tensor]
) -> Moments:
    inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    total = MomentSum(inputs, len(layer.weight))
    for rows in _rows(front, layer, aim, goals):
        total.add(rows.read, rows.goal)
    return total.result()


def _visible_moments(
    front: Front,
    layer: nn.Conv2d | nn.Linear,
    offset: Tensor,
    aim: LayerAim,
    goals: Sequence[Tensor],
    known: Moments,
) -> Moments:
    """The moments with what a ReLU lets through as targets.

    Args:
        front: The edited network, and the images.
        layer: The layer.
        offset: What the norm behind now adds to its outputs, (C_out,).
        aim: What it should give.
        goals: The original's rows for it.
        known: Moments of what it reads.
    """
    total = MomentSum(len(known.gram), len(layer.weight), known)
    for rows in _rows(front, layer, aim, goals):
        wanted = visible(rows.goal, rows.made + offset, rows.shortcut, aim.how)
        total.add(rows.read, wanted - offset)
    return total.result()


def _layer(student: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    layer = student.get_submodule(name)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise RecordMismatchError(f"{name} is neither a convolution nor linear.")
    return layer


def _error(
    layer: nn.Conv2d | nn.Linear,
    moments: Moments,
    weights: Tensor,
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
    return moments.variance(weights) - float(explained) + float(offset.square().sum())


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
