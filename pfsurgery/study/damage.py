"""What the network's output suffers when a site becomes something else, after the cheap repair."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from pfsurgery.graph import GraphView, view
from pfsurgery.modules import get_module, set_at
from pfsurgery.recover.aim import aim_at, goals_of
from pfsurgery.recover.choices import Choices
from pfsurgery.recover.distance import Outputs, distance, outputs
from pfsurgery.recover.front import Front
from pfsurgery.recover.options import Option
from pfsurgery.recover.reads import Reads, refit_moments
from pfsurgery.recover.sequence import place
from pfsurgery.recover.site_fit import place_fit, site_problem
from pfsurgery.sites import Site

Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class Judge:
    """Images, and what the original gives for them.

    Attributes:
        batches: Images (N, C, H, W), one batch each.
        wanted: The original's outputs.
    """

    batches: Sequence[Tensor]
    wanted: Outputs

    def __call__(self, model: nn.Module) -> float:
        """How far the outputs of `model` are from the original's; see `distance`."""
        return distance(self.wanted, outputs(model, self.batches))


def judge_of(choices: Choices) -> Judge:
    """Compares by the images that are held out."""
    return Judge(choices.judges, outputs(choices.teacher, choices.judges))


def seen_of(choices: Choices) -> GraphView:
    """The graph view of the original."""
    return view(choices.teacher, (choices.batches[0][:1],))


def damages(
    choices: Choices,
    site: Site,
    options: Sequence[Option],
    measure: Callable[[nn.Module], Measured],
    seen: GraphView,
) -> list[Measured]:
    """What is measured of the original with each of the options at a site.

    An option is fitted to what the site reads, and repaired in closed form: its own weights are
    solved once, without a conversion's fits to what a ReLU lets through, or the pointwise layer
    behind it is refitted as in a conversion.

    Args:
        choices: The original, which is left as it was, and its images.
        site: The site.
        options: What it becomes.
        measure: What to measure of each network, such as a `Judge`.
        seen: The graph view of the original, from `seen_of`.
    """
    teacher, batches = choices.teacher, choices.batches
    screen = choices.screens.get(site.name)
    convolution = get_module(teacher, site.name)
    problem = None
    found: list[Measured] = []
    try:
        for option in options:
            set_at(teacher, site.names, convolution)
            aim = aim_at(teacher, site, option, seen)
            if option.form in ("bare", "op"):  # these change more than the site
                (goals,) = goals_of(teacher, [aim], batches)
                own = copy.deepcopy(teacher)
                place(teacher, Front(own, batches), aim, goals, seen)
                found.append(measure(own))
                continue
            if problem is None:
                (goals,) = goals_of(teacher, [aim], batches)
                reads = Reads(Front(teacher, batches), aim, goals)
                moments = refit_moments(reads, aim, batches, screen)
                problem = site_problem(teacher, aim, moments, screen)
            place_fit(teacher, aim, problem, screen)
            found.append(measure(teacher))
    finally:
        set_at(teacher, site.names, convolution)
    return found
