"""Ways to make a smaller network from a trained one without a gradient: ours and the rivals'.

Each takes the trained network, a budget in multiply-adds and unlabelled images, and gives the
smaller network and what it decided. Pruning is tried with every setting in `PRUNING` and the one
with the best accuracy is kept, so its figures are chosen on the images that they are counted on;
ours and the decompositions have one setting.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pfsurgery
from pfsurgery.errors import NoEffectWarning
from pfsurgery.measure import count
from pfsurgery.recover import Budget, refit_layers

Judge = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        model: The trained network.
        macs: What one image may cost.
        images: Unlabelled, normalised batches (N, 3, 32, 32).
        judge: Accuracy in percent, for methods that choose among settings.
    """

    model: nn.Module
    macs: float
    images: list[Tensor]
    judge: Judge

    def cost(self, model: nn.Module) -> float:
        """Multiply-adds of one image."""
        return count(model, self.images[0][:1]).macs


Made = tuple[nn.Module, dict[str, object]]
Method = Callable[[Task], Made]

# Importance norm, and how the ratio is spread: Torch-Pruning's arguments of the same names.
PRUNING = tuple(
    {"p": p, "global_pruning": everywhere, "isomorphic": alike}
    for p in (1, 2)
    for everywhere, alike in ((False, False), (True, False), (True, True))
)


def fitted(task: Task) -> Made:
    """`budget` as it is."""
    return pfsurgery.convert(task.model, Budget(macs=task.macs), images=task.images), {}


def parameter_free(task: Task) -> Made:
    """`budget` without thin dense convolutions."""
    policy = pfsurgery.budget(macs=task.macs, thin=False)
    return pfsurgery.convert(task.model, policy, images=task.images), {}


def pointwise(task: Task) -> Made:
    """`budget` over 1x1 convolutions too."""
    policy = pfsurgery.budget(macs=task.macs, pointwise=True)
    return pfsurgery.convert(task.model, policy, images=task.images), {}


def tucker(task: Task) -> Made:
    """Data-aware Tucker-2 alone, spent by the same rule (Kalle et al., arXiv 2511.04494)."""
    policy = Budget(macs=task.macs, forms=("thin",))
    return pfsurgery.convert(task.model, policy, images=task.images), {}


def low_rank(task: Task) -> Made:
    """Reduced-rank regression on the patches, spent by the same rule."""
    policy = Budget(macs=task.macs, forms=("low_rank",))
    return pfsurgery.convert(task.model, policy, images=task.images), {}


def unfitted(task: Task) -> Made:
    """The plan of `budget` with fresh weights: what conversion alone leaves to training."""
    plan = pfsurgery.record(fitted(task)[0]).plans[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bare = pfsurgery.convert(task.model, plan, example=task.images[0][:1])
    pfsurgery.recalibrate(bare, task.images)
    return bare, {}


def max_pool(task: Task) -> Made:
    """Every convolution becomes max-pool and pointwise; nothing is fitted, norms re-estimated."""
    fast = pfsurgery.convert(task.model, "maxpool_all", example=task.images[0][:1])
    pfsurgery.recalibrate(fast, task.images)
    return fast, {}


def max_pool_refitted(task: Task) -> Made:
    """The same, refitted by `reconstruct`."""
    fast = pfsurgery.convert(task.model, "maxpool_all", example=task.images[0][:1])
    pfsurgery.reconstruct(fast, task.model, task.images)
    return fast, {}


def bare(task: Task) -> Made:
    """One parameter-free operation a channel, the pointwise layers behind refitted.

    Raises:
        NoEffectWarning: No pointwise layer follows any convolution.
    """
    warnings.simplefilter("error", NoEffectWarning)
    return pfsurgery.convert(task.model, pfsurgery.bare(), images=task.images), {}


def pruned(task: Task) -> Made:
    """Torch-Pruning with its best setting, norms re-estimated."""

    def finish(model: nn.Module) -> None:
        pfsurgery.recalibrate(model, task.images)

    return _best_pruned(task, finish)


def pruned_refitted(task: Task) -> Made:
    """Torch-Pruning with its best setting, refitted to the original by our least squares."""

    def finish(model: nn.Module) -> None:
        refit_layers(model, task.model, task.images)

    return _best_pruned(task, finish)


def _best_pruned(task: Task, finish: Callable[[nn.Module], None]) -> Made:
    best: tuple[float, nn.Module, dict[str, object]] | None = None
    tried = []
    for setting in PRUNING:
        found = _prune(task, setting)
        if found is None:
            continue
        model, ratio = found
        finish(model)
        top1 = task.judge(model.eval())
        tried.append({**setting, "ratio": ratio, "mmacs": task.cost(model) / 1e6, "top1": top1})
        if best is None or top1 > best[0]:
            best = top1, model, {**setting, "ratio": ratio}
    if best is None:
        raise SystemExit(f"Torch-Pruning does not reach {task.macs / 1e6} MMACs")
    return best[1], {"setting": best[2], "tried": tried}


def _prune(task: Task, setting: dict[str, object]) -> tuple[nn.Module, float] | None:
    """The largest network within the budget, widths rounded to 8, and its ratio.

    Widths rounded to 8 make the cost a staircase, so the ratio is found by bisection.
    """
    import torch_pruning as tp

    options = {key: value for key, value in setting.items() if key != "p"}
    low, high, best = 0.0, 0.97, None
    for _ in range(10):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(task.model)
        classifier = [m for m in candidate.modules() if isinstance(m, nn.Linear)][-1]
        tp.pruner.BasePruner(
            candidate,
            task.images[0][:1],
            importance=tp.importance.GroupMagnitudeImportance(p=setting["p"]),
            pruning_ratio=ratio,
            max_pruning_ratio=0.9 if setting["global_pruning"] else 1.0,
            ignored_layers=[classifier],
            round_to=8,
            **options,
        ).step()
        if task.cost(candidate) <= task.macs:
            best, high = (candidate, ratio), ratio
        else:
            low = ratio
    return best


METHODS: dict[str, Method] = {
    "budget": fitted,
    "budget, thin=False": parameter_free,
    "budget, pointwise=True": pointwise,
    "data-aware Tucker-2": tucker,
    "data-aware low rank": low_rank,
    "Torch-Pruning, norms re-estimated": pruned,
    "Torch-Pruning, our refit": pruned_refitted,
    "budget's plan, not fitted": unfitted,
    "max-pool, merely converted": max_pool,
    "max-pool, reconstructed": max_pool_refitted,
    "bare": bare,
}
# Of those that spend a budget: ours, and the rivals at their best.
COMPARED = (
    *("budget", "budget, thin=False", "data-aware Tucker-2", "data-aware low rank"),
    *("Torch-Pruning, norms re-estimated", "Torch-Pruning, our refit"),
)
WITHOUT_BUDGET = ("max-pool, merely converted", "max-pool, reconstructed", "bare")
