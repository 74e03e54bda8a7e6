"""Time several calls in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def times(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Median and interquartile range of each call in microseconds, in turns."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 20 or time.perf_counter() < end:
        for name in list(calls) if rounds % 2 else list(calls)[::-1]:
            wait()
            start = time.perf_counter()
            calls[name]()
            wait()
            taken[name].append((time.perf_counter() - start) * 1e6)
        rounds += 1
    rows = {}
    for name, all_ in taken.items():
        low, middle, high = statistics.quantiles(all_, n=4)
        rows[name] = {"median_us": middle, "iqr_us": high - low, "rounds": rounds}
    return rows
