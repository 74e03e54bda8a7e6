"""The processes that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

# While the first process converts and evaluates, the others wait; NCCL gives up after ten minutes.
_PATIENCE = timedelta(days=1)


def join_processes() -> Any:
    """Meet the other processes, before images are opened: streams are split among them then.

    Returns:
        Accelerate's `PartialState`, or None if this process is alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)


def training_device() -> torch.device:
    """Where Accelerate will put the models, if closed forms, in float64, can be solved there."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    state = join_processes()
    return torch.device("cuda") if state is None else torch.device(state.device)


@contextmanager
def first_process_first() -> Iterator[bool]:
    """Let the first process pass before the others; yields whether this is it."""
    state = join_processes()
    if state is None:
        yield True
        return
    with state.main_process_first():
        yield bool(state.is_main_process)
