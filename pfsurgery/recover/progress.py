"""What a person sees of a training run, and what is written down about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

Show = Callable[[int, str], None]
Write = Callable[[dict[str, Any]], None]
Item = TypeVar("Item")
_SECONDS_PER_LINE = 30.0


@contextmanager
def progress_bar(total: int, shown: bool | None) -> Iterator[Show]:
    """A bar on the standard error with the time left; yields `show(step, text)`.

    Args:
        total: Number of steps.
        shown: Whether to draw it; None means where a terminal is attached, and elsewhere (a
            notebook, a log file) a line every half a minute.
    """
    if shown is None and not sys.stderr.isatty():
        yield _lines(total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    columns = (
        BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=shown is False) as progress:
        task = progress.add_task("", total=total)
        yield lambda step, text: progress.update(task, completed=step, description=text)


def _lines(total: int) -> Show:
    start = last = time.monotonic()

    def show(step: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_PER_LINE:
            last = now
            print(f"{step}/{total} after {now - start:.0f} s, {text}", file=sys.stderr)

    return show


def tracked(items: Iterable[Item], what: str, number: int = 0) -> Iterator[Item]:
    """The items one by one, under a progress bar (see `progress_bar`).

    Args:
        items: What is worked on, one step each.
        what: What is done to them; stands behind the bar.
        number: How many they are, where they have no length.
    """
    with progress_bar(len(items) if isinstance(items, Sized) else number, None) as show:
        show(0, what)
        for place, item in enumerate(items):
            yield item
            show(place + 1, what)
