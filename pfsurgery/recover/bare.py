"""The policy `bare`: one parameter-free operation a channel, with no product of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pfsurgery.graph import view
from pfsurgery.plan import Plan, warn_of_no_effect
from pfsurgery.policy import Rule, Tell
from pfsurgery.recover.calibration import (
    calibration_batches,
    frozen_copy,
    hold_out,
    in_fast_layout,
)
from pfsurgery.recover.choices import finished
from pfsurgery.recover.norms import settle
from pfsurgery.recover.options import Option
from pfsurgery.recover.polish import polish
from pfsurgery.recover.screen import is_wide
from pfsurgery.recover.sequence import refit_in_order
from pfsurgery.recover.target import site_operations
from pfsurgery.sites import Site


@dataclass(frozen=True, slots=True)
class Bare:
    """Every site that can becomes one operation a channel; made by `bare`."""

    name: str = "bare"
    pointwise: bool = False

    def decide(self, site: Site) -> Rule | None:
        """Every site between pointwise layers takes part."""
        return Rule("bare")

    def convert(
        self,
        model: nn.Module,
        mark: Callable[[Tensor], Plan],
        images: Any,
        tell: Tell = lambda line: None,
    ) -> tuple[nn.Module, Plan]:
        """A converted copy of `model` and the plan that was carried out; see `Budget.convert`."""
        batches, judges = hold_out(calibration_batches(images, model))
        plan = mark(batches[0][:1])
        if not plan.replaced:
            warn_of_no_effect(model, plan, stacklevel=5)
        teacher = frozen_copy(model)
        batches = in_fast_layout(teacher, batches)
        sites = [d.site for d in plan.replaced]
        chosen = {s.name: _option(s) for s in sites}
        student = copy.deepcopy(teacher)
        done = refit_in_order(teacher, student, sites, chosen, batches, tell, {})
        if done:
            polish(student, teacher, batches, judges, tell)
            settle(student, batches, view(teacher, (batches[0][:1],)))
        kept = "too many channels to choose all their operations together"
        return finished(model, student, self.name, plan, done, kept)


def _option(site: Site) -> Option | None:
    if site.kind == "dense" and is_wide(site, site_operations(site)):
        return None
    return Option("bare", (site.geometry.in_channels,), 0.0, 0.0)


def bare() -> Bare:
    """A policy that leaves parameter-free operations only, as in the paper's efficient bottleneck.

    Each dense convolution that keeps its channels and has a pointwise layer behind it, and each
    depthwise one, becomes one operation a channel (a shift, an average or the channel itself),
    chosen from data. Behind a dense one norm
    and activation are dropped. The pointwise layer that follows is refitted in closed form. Pass
    the policy to `convert` together with `images`, and `include=` to choose sites.
    """
    return Bare()
