"""Select sites by exact name, glob, regular expression or predicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pfsurgery.errors import PatternError, closest
from pfsurgery.sites import Site

Patterns = str | Sequence[str] | None
Where = Callable[[Site], bool]


def matches(site: Site, patterns: Patterns) -> bool:
    """Whether any of a site's names matches any pattern; no patterns match nothing.

    Args:
        site: The site.
        patterns: One pattern or several: an exact name, a glob (`layer4.*`), or `re:` and a regular
            expression that must match the whole name.

    Raises:
        PatternError: A regular expression is malformed.
    """
    return any(_match(name, pattern) for pattern in as_patterns(patterns) for name in site.names)


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Patterns as a tuple, whether given as none, one or several.

    Raises:
        PatternError: They are something else than text.
    """
    if patterns is None:
        return ()
    one = isinstance(patterns, str) or not isinstance(patterns, Iterable)
    found: tuple[Any, ...] = (patterns,) if one else tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise PatternError(
                f"Sites are selected by names or patterns as text, for instance 'layer4.*', not by "
                f"the {type(pattern).__name__} {pattern!r}."
            )
    return found


def _match(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise PatternError(f"{pattern!r} is not a regular expression: {error}.") from None


def check_patterns(sites: Iterable[Site], *groups: Patterns) -> None:
    """Raise a PatternError that names every pattern which matches no site, with the closest names.

    A pattern that selects nothing is a mistake in nearly all cases, and a silent one is costly.
    """
    sites = tuple(sites)
    idle = [
        pattern
        for patterns in groups
        for pattern in as_patterns(patterns)
        if not any(matches(site, pattern) for site in sites)
    ]
    if idle:
        names = [name for site in sites for name in site.names]
        hints = " ".join(f"{p!r} matches no site. {closest(p, names)}" for p in idle)
        raise PatternError(f"{hints} pfsurgery.scan(model) lists all sites.")
