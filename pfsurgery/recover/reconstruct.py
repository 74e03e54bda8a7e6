"""Refit the layers behind replaced convolutions in closed form, without labels or gradients."""

from __future__ import annotations

from typing import Any

from torch import nn

from pfsurgery.graph import view
from pfsurgery.policy import Tell
from pfsurgery.record import record
from pfsurgery.recover.behind import aim_behind, fitted_aims, refit_behind
from pfsurgery.recover.calibration import (
    calibration_batches,
    frozen_copy,
    frozen_teacher,
    hold_out,
    in_fast_layout,
)
from pfsurgery.recover.distance import check_same_outputs
from pfsurgery.recover.front import Front
from pfsurgery.recover.norms import recalibrate, settle
from pfsurgery.recover.polish import polish
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.refit import Refit


def reconstruct(
    model: nn.Module, teacher: nn.Module, images: Any, *, tell: Tell = lambda line: None
) -> tuple[Refit, ...]:
    """Refit a converted model to its original, in place.

    Norm statistics are re-estimated. Then, in the order of execution, the pointwise layer that
    reads each replaced site, or the output layer of what replaced an attention, is solved again by
    ridge regression, with inputs from the converted network and the original's outputs as targets;
    where a shortcut is added behind it, the target is what the sum lacks, so that later layers
    correct earlier errors. What a ReLU behind the layer hides is not asked for. At the end norms
    and classifier are corrected where that brings the output closer to the original's, and norms
    are given the statistics of what they now read without a change of what they make, so that
    training starts from this network.

    He, Zhang & Sun, ICCV 2017 (arXiv 1707.06168) refit after channel pruning in this way; the
    strength of the ridge is chosen by generalised cross-validation (Golub, Heath & Wahba 1979).

    Args:
        model: What `convert` made.
        teacher: The model as it was before, in any dtype and on any device.
        images: A few hundred to a few thousand unlabelled images, as `recalibrate` takes them.
        tell: Called with a line of text for each site.

    Returns:
        What was refitted, site by site.

    Raises:
        RecordMismatchError: The model was not made by `convert`, or not from `teacher`.
        DataError: There is no image, or a value is not finite.
    """
    student, original = frozen_copy(model), frozen_teacher(teacher, model)
    batches, judges = hold_out(in_fast_layout(original, calibration_batches(images, model)))
    check_same_outputs(student, original, batches[0][:1])
    recalibrate(student, batches)
    seen = view(original, (batches[0][:1],))
    aims = [aim_behind(student, original, decision, seen) for decision in record(model).replaced]
    front = Front(student, batches, seen, [aim.twin for aim in fitted_aims(aims)])
    done = []
    for refit in tracked(refit_behind(front, original, aims), "refitting", len(aims)):
        done.append(refit)
        told = f"{refit.layer} refitted, error {refit.before:.3f} -> {refit.after:.3f}"
        tell(f"{refit.site}: {told if refit.layer else f'not refitted, {refit.reason}'}")
    polish(student, original, batches, judges, tell)
    settle(student, batches, seen)
    model.load_state_dict(student.state_dict())
    return tuple(done)
