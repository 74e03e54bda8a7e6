import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfsurgery.errors import PolicyError
from pfsurgery.recover.hull import lower_hull, spend

NUMBERS = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 3))
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30)


@given(POINTS)
def test_hull_is_monotone_convex_and_below_every_point(points: list[tuple[float, float]]) -> None:
    hull = [points[i] for i in lower_hull(points)]
    assert hull[0][0] == min(cost for cost, _ in points)
    assert hull[-1][1] == min(error for _, error in points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert all(a < b for a, b in itertools.pairwise(slopes))
    for cost, error in points:
        for (c0, e0), (c1, e1) in itertools.pairwise(hull):
            if c0 <= cost <= c1:
                assert error >= e0 + (e1 - e0) * (cost - c0) / (c1 - c0) - 1e-9


@given(st.lists(POINTS, min_size=1, max_size=5), NUMBERS)
def test_spending_keeps_the_budget_and_uses_it(
    sites: list[list[tuple[float, float]]], more: float
) -> None:
    options = {str(i): points for i, points in enumerate(sites)}
    least = sum(min(cost for cost, _ in points) for points in sites)
    chosen = spend(options, least + more)
    spent = sum(options[site][i][0] for site, i in chosen.items())
    assert spent <= least + more + 1e-6
    start = sum(options[site][lower_hull(points)[0]][1] for site, points in options.items())
    assert sum(options[site][i][1] for site, i in chosen.items()) <= start + 1e-9
    assert spend(options, least + more) == chosen


def test_spending_goes_where_it_removes_most() -> None:
    options = {
        "a": [(1.0, 0.5), (2.0, 0.1), (9.0, 0.0)],
        "b": [(1.0, 0.5), (2.0, 0.4), (9.0, 0.0)],
    }
    assert spend(options, 3.0) == {"a": 1, "b": 0}
    assert spend(options, 18.0) == {"a": 2, "b": 2}


def test_a_budget_that_cannot_be_met_says_the_least() -> None:
    with pytest.raises(PolicyError, match=r"the least that they can cost is 3\b"):
        spend({"a": [(1.0, 0.5)], "b": [(2.0, 0.5), (4.0, 0.0)]}, 2.5)
