"""Which options of a site compete once their damage is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from pfsurgery.plan import decide
from pfsurgery.policy import Rule
from pfsurgery.recover.choices import Choices
from pfsurgery.recover.hull import lower_hull, spread
from pfsurgery.recover.options import Option
from pfsurgery.recover.screen import is_wide
from pfsurgery.recover.target import site_operations
from pfsurgery.sites import Site


def on_hull(
    choices: Choices,
    most: int,
    cost: Callable[[Site, Option | None], float],
    chosen: Mapping[str, Option | None] = MappingProxyType({}),
) -> Choices:
    """The choices with few bottlenecks a site, spread along the hull of cost and error.

    Args:
        choices: What `read_choices` found.
        most: How many bottlenecks a site keeps.
        cost: Of a site with an option.
        chosen: Options that stay in any case, by site.
    """
    options = {
        site.name: _on_hull(
            choices.options[site.name], most, partial(cost, site), chosen.get(site.name)
        )
        for site in choices.sites
    }
    return replace(choices, options=options)


def with_unfitted(choices: Choices, ops: Sequence[str]) -> Choices:
    """The choices with the bare form and plain ops behind the options of each site.

    They act through the layer behind the site, of which a relative error of the site says nothing:
    only a measured damage lets them compete with fitted bottlenecks.

    Args:
        choices: What `read_choices` found.
        ops: Names of ops that are not fitted, such as `max_pool`.
    """
    options = {
        site.name: [
            *choices.options[site.name],
            *_bare(site),
            *(option for op in ops if (option := _plain(site, op)) is not None),
        ]
        for site in choices.sites
    }
    return replace(choices, options=options)


def _on_hull(
    options: Sequence[Option | None],
    most: int,
    cost: Callable[[Option], float],
    chosen: Option | None,
) -> list[Option | None]:
    """Keeping the convolution, at most `most` options spread along the hull, and the chosen one."""
    fitted = [option for option in options if option is not None]
    hull = spread(lower_hull([(cost(option), option.error) for option in fitted]), most)
    kept = [None, *(fitted[i] for i in hull)]
    return kept if chosen in kept else [*kept, chosen]


def _bare(site: Site) -> list[Option]:
    """One operation a channel at a dense site; depthwise ones have it among the fitted."""
    if site.kind != "dense" or is_wide(site, site_operations(site)):
        return []
    possible = decide(site, Rule("bare")).replaced
    return [Option("bare", (site.geometry.in_channels,), 0.0, 0.0)] if possible else []


def _plain(site: Site, op: str) -> Option | None:
    decision = decide(site, Rule(op))
    if site.kind == "pointwise" or not decision.replaced:
        return None
    macs = (site.macs - decision.macs_saved) / site.positions
    return Option("op", (), macs, 0.0, op)
