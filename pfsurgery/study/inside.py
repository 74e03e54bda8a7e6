"""How much of what sites do alone counts inside the converted network, all behind them refitted."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from torch import nn

from pfsurgery.policy import Tell
from pfsurgery.recover.choices import Choices, Places, edit
from pfsurgery.recover.hull import Point, lower_hull
from pfsurgery.recover.polish import polish
from pfsurgery.recover.progress import tracked
from pfsurgery.sites import Site
from pfsurgery.study.damage import Judge
from pfsurgery.study.known import Known, named_options

_RUNS = 8  # of sites that are measured together: each takes about as long as a conversion
_LEAST = 0.1  # of the median weight: a difference of nearly nothing is noise


def weights_inside(
    choices: Choices,
    places: Places,
    points: Mapping[str, Sequence[Point]],
    judge: Judge,
    known: Known,
    tell: Tell,
) -> dict[str, float]:
    """For each site, by how much its damages count where the whole network is converted.

    Damages that sites do alone do not add up: what is behind a site is fitted to what it gives, and
    makes good for a part of it, more in one place than in another. So for each run of neighbouring
    sites the network is made with all of them a step cheaper and a step better, everything behind
    them refitted, and

        weight = (damage(cheaper) - damage(better)) / (sum alone(cheaper) - sum alone(better))

    Args:
        choices: The original, the images to fit to, and the options of the sites.
        places: The converted network that is looked at: index of each site's option.
        points: (cost, damage that it does alone) of each option of each site.
        judge: Measures how far outputs are from the original's.
        known: What was measured before.
        tell: Called with a line of text for each run of sites.
    """
    length = -(-len(choices.sites) // _RUNS)
    runs = [choices.sites[at : at + length] for at in range(0, len(choices.sites), length)]
    steps = {name: _steps(points[name], place) for name, place in places.items()}
    before, waiting = copy.deepcopy(choices.teacher), list[Site]()
    weights: list[float | None] = []

    def measure(number: int, *changes: Places) -> list[float]:
        """The damage of the network with each of the changes to a run."""
        edit(choices, before, waiting, places)
        waiting.clear()
        behind = [site for later in runs[number:] for site in later]
        return [_damage(choices, before, behind, places | changed, judge) for changed in changes]

    looked_at = named_options(choices, places)
    for number, run in enumerate(tracked(runs, "measuring sites inside")):
        alone, weight = sum(steps[site.name].damage for site in run), None
        if alone > 0:
            cheaper = {site.name: steps[site.name].cheaper for site in run}
            better = {site.name: steps[site.name].better for site in run}
            what = {
                "inside": looked_at,
                "cheaper": named_options(choices, cheaper),
                "better": named_options(choices, better),
            }
            worst, best = known.measured(what, partial(measure, number, cheaper, better))
            weight = (worst - best) / alone
            tell(f"{run[0].name} to {run[-1].name}: {weight:.3g} of what they do alone")
        weights.append(weight)
        waiting += run
    usual = median([weight for weight in weights if weight is not None and weight > 0] or [1.0])
    kept = [usual if weight is None else max(weight, _LEAST * usual) for weight in weights]
    return {site.name: weight for run, weight in zip(runs, kept, strict=True) for site in run}


@dataclass(frozen=True, slots=True)
class _Steps:
    """Options beside that of a site: the next cheaper and better ones, and how they differ."""

    cheaper: int
    better: int
    damage: float


def _steps(points: Sequence[Point], place: int) -> _Steps:
    hull = lower_hull(points)
    cost = points[place][0]
    cheaper = max((i for i in hull if points[i][0] < cost), key=lambda i: points[i], default=place)
    better = min((i for i in hull if points[i][0] > cost), key=lambda i: points[i], default=place)
    return _Steps(cheaper, better, points[cheaper][1] - points[better][1])


def _damage(
    choices: Choices, before: nn.Module, behind: Sequence[Site], places: Places, judge: Judge
) -> float:
    """Of a network that is edited so far, with the sites behind made anew."""
    network = copy.deepcopy(before)
    edit(choices, network, behind, places)
    polish(network, choices.teacher, choices.batches, choices.judges, lambda line: None)
    return judge(network)
