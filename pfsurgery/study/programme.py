"""Choosing one option a site exactly, as a mixed-integer programme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from pfsurgery.errors import PolicyError, needs
from pfsurgery.recover.hull import Point, least_cost

_SECONDS = 10  # of the solver's time; what it has found by then is used
_SLACK = 1e-5  # of the largest cost: the solver takes sums that are this near as equal


def programme(options: Mapping[str, Sequence[Point]], budget: float) -> dict[str, int]:
    """Chooses one option a site so that the summed damage is least within a budget.

    With x_so = 1 where site s takes option o: minimise the sum of damage_so x_so, where the x_so of
    each site sum to 1 and the sum of cost_so x_so is at most `budget`. This is the multiple-choice
    knapsack problem; HiGHS solves it through `scipy.optimize.milp`. `recover.hull.spend` solves its
    linear relaxation, rounded down.

    Args:
        options: For each site the (cost, damage) of its options.
        budget: What all sites together may cost, in the unit of the costs.

    Returns:
        For each site the index of its option.

    Raises:
        PolicyError: Even the cheapest options cost more than the budget.
        MissingExtraError: SciPy is not installed.
    """
    least = least_cost(options, budget)
    places = _solved(options, budget)
    if sum(options[site][place][0] for site, place in places.items()) > budget:
        scale = max(cost for points in options.values() for cost, _ in points)
        places = _solved(options, max(least, budget - _SLACK * scale))
    return places


def _solved(options: Mapping[str, Sequence[Point]], budget: float) -> dict[str, int]:
    """The programme's solution; its cost may be above the budget by the solver's tolerance."""
    with needs("study", "Choosing by a programme"):
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_diag
    costs, damages = np.array(list(chain.from_iterable(options.values()))).T
    one_each = block_diag([np.ones((1, len(points))) for points in options.values()])
    scale = max(costs.max(), 1e-30)
    solved = milp(
        damages / max(np.abs(damages).max(), 1e-30),
        integrality=np.ones_like(damages),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs[None] / scale, -np.inf, budget / scale),
        ],
        options={"time_limit": _SECONDS},
    )
    if solved.x is None:
        raise PolicyError(f"The choice of forms was not solved: {solved.message}")
    edges = np.cumsum([len(points) for points in options.values()])[:-1]
    taken = np.split(solved.x, edges)
    return {site: int(x.argmax()) for site, x in zip(options, taken, strict=True)}
