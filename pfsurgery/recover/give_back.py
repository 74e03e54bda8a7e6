"""Giving changed blocks back to the original, until the accuracy is within bounds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from pfsurgery.modules import get_module, set_module
from pfsurgery.plan import Decision
from pfsurgery.policy import KEEP
from pfsurgery.record import record, remember_instead
from pfsurgery.recover.blocks import Block, changed_blocks
from pfsurgery.recover.evaluate import Accuracy

_log = logging.getLogger(__name__)

_REASON = "given back to keep the accuracy"


def give_back(
    model: nn.Module,
    original: nn.Module,
    accuracy: Callable[[], Accuracy],
    *,
    now: Accuracy,
    wanted: float,
) -> tuple[tuple[str, ...], Accuracy]:
    """Put the original's blocks in place of changed ones, in `model` itself, until it is enough.

    Each changed block (see `pfsurgery.recover.blocks.Block`) is tried on its own; the one that
    brings most top-1 goes back to the original, with the weights that it has there, and the rest is
    tried again, until the accuracy is as wanted or no block brings anything. With matching
    (`match_weight`) the blocks around have learned to expect what the original's block gives.

    The plan on the model says of each such site that it is kept, and why.

    Args:
        model: The converted model.
        original: The model as it was before.
        accuracy: Gives that of `model` as it is now.
        now: That accuracy.
        wanted: Top-1 in percent that is enough.

    Returns:
        Names of the sites that have their convolution back, and the accuracy then. A warning is
        logged where the wanted accuracy was not reached.
    """
    returned: list[str] = []
    while now.top1 < wanted:
        tries = []
        for block in changed_blocks(model):
            undo = _swap(model, original, block)
            try:
                tries.append((accuracy(), block))
            finally:
                for path, module in undo:
                    set_module(model, path, module)
        gains = [(found, block) for found, block in tries if found.top1 > now.top1]
        if not gains:
            _log.warning(
                "The accuracy is %.2f %%, %.2f were wanted, and no block that is given back brings "
                "more. Train longer, or convert less.", now.top1, wanted,
            )  # fmt: skip
            break
        now, best = max(gains, key=lambda entry: (entry[0].top1, -entry[0].loss))
        _swap(model, original, best)
        names = _replaced_below(model, best.modules)
        _note(model, names)
        returned += names
    return tuple(returned), now


def _swap(model: nn.Module, original: nn.Module, block: Block) -> list[tuple[str, nn.Module]]:
    """Put copies of the original's modules in place; what was there, by path."""
    before = [(path, get_module(model, path)) for path in block.modules]
    for path, module in before:
        new = copy.deepcopy(get_module(original, path)).requires_grad_(True)
        set_module(model, path, new.train(module.training))
    return before


def _replaced_below(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Names of the replaced sites at these paths or inside: a block may hold others."""
    return tuple(
        decision.site.name
        for decision in record(model).replaced
        if any(f"{decision.site.name}.".startswith(f"{path}.") for path in paths)
    )


def _note(model: nn.Module, names: tuple[str, ...]) -> None:
    """Say in the plans on the model that these sites are kept."""

    def kept(decision: Decision) -> Decision:
        if decision.site.name in names and decision.replaced:
            return Decision(decision.site, KEEP, reason=_REASON)
        return decision

    plans = record(model).plans
    edited = (replace(plan, decisions=tuple(map(kept, plan.decisions))) for plan in plans)
    remember_instead(model, edited)
