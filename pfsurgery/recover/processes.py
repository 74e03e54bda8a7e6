"""The processes that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def join_processes() -> Any:
    """Meet the other processes, before images are opened: streams are split among them then.

    Returns:
        Accelerate's `PartialState`, or None if this process is alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def first_process_first() -> Iterator[bool]:
    """Let the first process pass before the others; yields whether this is it."""
    state = join_processes()
    if state is None:
        yield True
        return
    with state.main_process_first():
        yield bool(state.is_main_process)
