"""Work in groups that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_memory(
    items: Sequence[Item], size: Callable[[Item], int], most: int
) -> Iterator[list[Item]]:
    """The items in order, in groups that together need at most `most` bytes, one item at least.

    Args:
        items: What is to be worked on.
        size: Bytes that an item needs.
        most: Bytes that a group may need.
    """
    group: list[Item] = []
    held = 0
    for item in items:
        if group and held + size(item) > most:
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    if group:
        yield group
