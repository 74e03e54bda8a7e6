"""How far the outputs of an edited network are from the original's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.errors import RecordMismatchError, ShapeError
from pfsurgery.measure.state import explained

# What a model returns, the tensors that count of it, for each of some batches.
Outputs = Sequence[tuple[Tensor, ...]]

_MAIN = ("logits", "out")  # beside these, others are for training alone


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Tensor]) -> Outputs:
    """What the model returns for each batch: all its tensors, or those named logits or out."""
    return [_counted(model(batch)) for batch in batches]


def _counted(made: object) -> tuple[Tensor, ...]:
    from torch.utils._pytree import tree_leaves

    if isinstance(made, Mapping):
        made = next((made[name] for name in _MAIN if name in made), made)
    tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    return tuple(t for t in tensors if t.is_floating_point()) or tuple(tensors[:1])


def check_same_outputs(student: nn.Module, teacher: nn.Module, image: Tensor) -> None:
    """Check that both return tensors of the same shapes, before one is fitted to the other.

    Raises:
        RecordMismatchError: They do not.
        ShapeError: They do not run on it, or return no tensor, or none that is found.
    """
    with explained(teacher, (image,)):
        student_gives, teacher_gives = (
            ", ".join(str(tuple(tensor.shape)) for tensor in outputs(model, [image])[0])
            for model in (student, teacher)
        )
    if not teacher_gives:
        raise ShapeError(
            f"{type(teacher).__name__} returns something in which no tensor is found, so outputs "
            "cannot be compared. Wrap it in a module that returns tensors, lists or dicts of them."
        )
    if student_gives != teacher_gives:
        raise RecordMismatchError(
            f"For an image of shape {tuple(image.shape)} the model gives {student_gives} and the "
            f"teacher {teacher_gives}. The teacher is the network that the model was made from."
        )


def distance(original: Outputs, edited: Outputs) -> float:
    """How far the edited network's outputs are from the original's; the mean of several.

    Logits (N, classes) by the Kullback-Leibler divergence in nats, anything else, and single
    numbers (N, 1), by the squared error as a share of the original's variance.
    """
    pairs = zip(zip(*original, strict=True), zip(*edited, strict=True), strict=True)
    apart = [_apart(old, new) for old, new in pairs]
    return sum(apart) / len(apart)


def _apart(original: Sequence[Tensor], edited: Sequence[Tensor]) -> float:
    if original[0].ndim == 2 and original[0].shape[1] > 1:
        old, new = (torch.cat([*t]).double().log_softmax(1) for t in (original, edited))
        return float(F.kl_div(new, old, log_target=True, reduction="batchmean"))
    old, new = (torch.cat([part.flatten() for part in t]) for t in (original, edited))
    gap, spread = (old - new).square().mean(), old.var(correction=0)
    return float(gap / spread.clamp(min=1e-12))


def logits_in(made: Outputs) -> Tensor | None:
    """The outputs as logits (N, classes), None where they are something else."""
    if any(len(tensors) != 1 or tensors[0].ndim != 2 for tensors in made):
        return None
    return torch.cat([logits for (logits,) in made])
