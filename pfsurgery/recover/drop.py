"""The cheapest conversion within a drop of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from pfsurgery.errors import PolicyError
from pfsurgery.plan import Decision
from pfsurgery.policy import Tell
from pfsurgery.recover.choices import Choices, carry_out
from pfsurgery.recover.hull import Point, spend

_TRIALS = 6  # networks that are made: the budget is then known to about 5 %


def cheapest_within(
    choices: Choices,
    points: Mapping[str, Sequence[Point]],
    max_drop: float,
    validate: Callable[[nn.Module], float],
    tell: Tell,
) -> tuple[nn.Module, dict[str, Decision]]:
    """Halve the range of budgets again and again, in equal ratios, until the drop is just allowed.

    Args:
        choices: The original and the options of its sites.
        points: (cost, relative error) of each option of each site; the first is the convolution.
        max_drop: Points of accuracy that may be lost.
        validate: Accuracy in percent.
        tell: Called with a line of text for each network.

    Returns:
        The edited network of the smallest budget that kept the accuracy, and what was done; the
        original if there is no site.

    Raises:
        PolicyError: Every network that was tried lost more, or `validate` gives no number.
    """
    if not points:
        return choices.teacher, {}
    before = _accuracy(validate, choices.teacher)
    low = sum(min(cost for cost, _ in options) for options in points.values())
    whole = sum(options[0][0] for options in points.values())
    low, high = max(low, whole / 1000), whole
    best = None
    least = math.inf
    for _ in range(_TRIALS):
        cost = math.sqrt(low * high)
        student, done = carry_out(choices, spend(points, cost))
        lost = before - _accuracy(validate, student)
        least = min(least, lost)
        tell(f"with {cost / whole:.1%} of the sites' multiply-adds {lost:.2f} points are lost")
        if lost <= max_drop:
            best, high = (student, done), cost
        else:
            low = cost
        del student
    if best is None:
        raise PolicyError(
            f"No conversion within {max_drop} points was found: the mildest loses {least:.2f}. "
            f"Allow more, give more images, or keep some sites (exclude=)."
        )
    return best


def _accuracy(validate: Callable[[nn.Module], float], model: nn.Module) -> float:
    given = validate(model)
    try:
        found = float(given)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise PolicyError(f"validate must give an accuracy in percent, not {given}.")
    return found
