"""Spending a budget over sites: lower convex hulls of (cost, error), cheapest gain first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from pfsurgery.errors import PolicyError

Point = tuple[float, float]
# Chooses one option a site: its index, from the (cost, damage) of all and what may be spent.
Pick = Callable[[Mapping[str, Sequence[Point]], float], dict[str, int]]


def lower_hull(points: Sequence[Point]) -> list[int]:
    """Indices of the points on the lower convex hull, from the cheapest to the smallest error.

    Along it the cost rises, the error falls, and each step removes less error for its cost than
    the one before. Among equal points the first is taken. Andrew, Inf. Process. Lett. 1979.

    Args:
        points: (cost, error) of each option of a site.
    """
    hull: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        cost, error = points[i]
        if hull and error >= points[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (c0, e0), (c1, e1) = points[hull[-2]], points[hull[-1]]
            if (e0 - e1) * (cost - c0) > (e0 - error) * (c1 - c0):
                break
            hull.pop()
        hull.append(i)
    return hull


def spread(hull: Sequence[int], most: int) -> list[int]:
    """At most `most` points of a hull, from its first to its last."""
    if len(hull) <= most:
        return list(hull)
    return [hull[round(i * (len(hull) - 1) / max(1, most - 1))] for i in range(most)]


def least_cost(options: Mapping[str, Sequence[Point]], budget: float) -> float:
    """What the cheapest options of all sites cost together.

    Raises:
        PolicyError: That is more than the budget.
    """
    least = sum(min(cost for cost, _ in points) for points in options.values())
    if least > budget:
        raise PolicyError(
            f"A budget of {budget:.4g} for {len(options)} sites cannot be met: the least that they "
            f"can cost is {least:.4g}. Ask for that or more, or let more sites be converted."
        )
    return least


def spend(
    options: Mapping[str, Sequence[Point]],
    budget: float,
) -> dict[str, int]:
    """Chooses one option a site so that the summed error is small within a budget.

    Starts from the cheapest option of every site and walks along the hulls, always taking the
    step that removes most error for its cost; a step that no longer fits ends its
    site, and the others go on.

    Args:
        options: For each site the (cost, error) of its options, "keep the convolution" among
            them; costs in the unit of the budget.
        budget: What all sites together may cost.

    Returns:
        For each site the index of its option.

    Raises:
        PolicyError: Even the cheapest options cost more than the budget.
    """
    hulls = {site: lower_hull(points) for site, points in options.items()}
    least = least_cost(options, budget)
    place = dict.fromkeys(hulls, 0)
    left = budget - least
    queue: list[tuple[float, str]] = []

    def offer(site: str) -> None:
        at, hull = place[site], hulls[site]
        if at + 1 < len(hull):
            (c0, e0), (c1, e1) = options[site][hull[at]], options[site][hull[at + 1]]
            heapq.heappush(queue, (-(e0 - e1) / (c1 - c0), site))

    for site in hulls:
        offer(site)
    while queue:
        _, site = heapq.heappop(queue)
        hull = hulls[site]
        step = options[site][hull[place[site] + 1]][0] - options[site][hull[place[site]]][0]
        if step <= left:
            left -= step
            place[site] += 1
            offer(site)
    return {site: hulls[site][at] for site, at in place.items()}
