"""A colour for each op, the same in all figures of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pfsurgery.measure.structures import COLORS as OPERATIONS

GREY = "#868e94"  # what is not an op: the original, limits; it can be read on black and on white
MODELS = ("#2a7f8e", "#c8552f")  # two models side by side
KEPT = "rgba(134,142,148,0.35)"
_OPS = {
    "keep": KEPT,
    "conv": "#5f7fb8",
    "dense": "#5f7fb8",
    "depthwise": "#74953a",
    "identity": OPERATIONS["identity"],
    "shift": OPERATIONS["shift"],
    "avg_pool": OPERATIONS["average"],
    "avg_down": "#b07a1e",
    "max_pool": OPERATIONS["maximum"],
    "thin": OPERATIONS["dense convolution"],
    "mixed": "#3f9b6c",
    "blur": "#4a90c2",
    "bare": "#c2708f",
    "eff_attention": "#8c8f2e",
}
_OTHERS = ("#c0567f", "#6a74c9", "#a8683c", "#2f9bb3", "#8b7bb0", "#4c9a8a", "#c98a5a", "#9a5050")


def family(label: str) -> str:
    """The op in a label: `thin` of `thin 16>24`, `max_pool` of `max_pool+pointwise`."""
    return re.split(r"[+:\s(]", label, maxsplit=1)[0]


def colors(labels: Iterable[str]) -> dict[str, str]:
    """A colour for the `family` of each label; ops that we do not know get what is left."""
    names = dict.fromkeys(map(family, labels))
    chosen: dict[str, str] = {}
    for name in names:
        known = _OPS.get(name) or next((c for op, c in _OPS.items() if name.startswith(op)), None)
        if known is not None and known not in chosen.values():
            chosen[name] = known
    left = [color for color in _OTHERS if color not in chosen.values()]
    for place, name in enumerate(name for name in names if name not in chosen):
        chosen[name] = left[place % len(left)]
    return chosen
