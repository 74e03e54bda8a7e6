"""Last corrections of a fitted network, each kept only where it brings the output closer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pfsurgery.errors import DataError
from pfsurgery.policy import Tell
from pfsurgery.recover.capture import capture
from pfsurgery.recover.distance import distance, logits_in, outputs
from pfsurgery.recover.gram import MomentSum
from pfsurgery.recover.linalg import ridge_gcv
from pfsurgery.recover.norms import recalibrate


def polish(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Tensor],
    judges: Sequence[Tensor],
    tell: Tell,
) -> None:
    """Re-estimate norm statistics and refit the classifier, in place, where it helps.

    Re-estimated norms hurt after very small budgets, and a refitted classifier may know nothing but
    the images that it was fitted to, so neither step is taken on trust.

    Args:
        student: The fitted network, in eval mode.
        teacher: The original, in eval mode.
        batches: Images (N, C, H, W) to fit to, one batch each.
        judges: Images to judge by.
        tell: Called with a line of text for each step that was kept.
    """
    wanted = outputs(teacher, judges)

    def attempt(name: str, change: Callable[[], object]) -> None:
        before = copy.deepcopy(student.state_dict())
        away = distance(wanted, outputs(student, judges))
        try:
            change()
        except DataError:  # there is too little to do it with
            now = away
        else:
            now = distance(wanted, outputs(student, judges))
        if now < away:
            tell(f"{name}: distance to the original {away:.4f} -> {now:.4f}")
        else:
            student.load_state_dict(before)

    attempt("norms re-estimated", lambda: recalibrate(student, list(batches)))
    logits = logits_in(wanted)
    classifier = None if logits is None else _classifier(teacher, logits.shape[1])
    if classifier is not None:
        goal = logits_in(outputs(teacher, batches))
        assert goal is not None
        attempt("classifier refitted", lambda: _refit(student, goal, classifier, batches))


def _classifier(teacher: nn.Module, classes: int) -> str | None:
    """Path of the last linear layer, if it makes the logits."""
    linear = [name for name, module in teacher.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear and _width(teacher, linear[-1]) == classes else None


def _width(model: nn.Module, path: str) -> int:
    module = model.get_submodule(path)
    return module.out_features if isinstance(module, nn.Linear) else 0


@torch.no_grad()
def _refit(student: nn.Module, wanted: Tensor, path: str, batches: Sequence[Tensor]) -> None:
    linear = student.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        return
    moments = MomentSum(linear.in_features, linear.out_features)
    captured = [capture(student, batch, {"x": (path, "input")}) for batch in batches]
    if not all("x" in seen for seen in captured):  # a head for training alone
        return
    features = torch.cat([seen["x"] for seen in captured]).float().cpu()
    if features.ndim != 2 or len(features) != len(wanted):  # more is done behind it
        return
    moments.add(features, wanted.float().cpu())
    found = moments.result()
    total = float(found.target.diagonal().sum())
    weight = ridge_gcv(found.gram, found.cross, total, found.count)
    linear.weight.copy_(weight.T)
    if linear.bias is not None:
        linear.bias.copy_(found.target_mean - found.column_mean @ weight)
