"""Stopping in good order when a cluster asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import active_children, util
from typing import Any

from torch.utils.data import DataLoader

from pfsurgery.errors import TrainingError


class StoppedError(TrainingError):
    """The run was asked to end (SIGTERM), and saved where it was.

    Args:
        checkpoint: What it saved, in words.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(
            f"Stopped on request; all is saved in {checkpoint}. Continue with --resume "
            f"(resume=True in Python)."
        )


class StopRequest:
    """Whether the run was asked to end."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def stop_on_sigterm(active: bool) -> Iterator[StopRequest]:
    """While inside, SIGTERM only sets the request; afterwards it does what it did before.

    Args:
        active: If not, or in another thread than the main one, signals are left alone.
    """
    request = StopRequest()
    if not active or threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: Any) -> None:
        request.made = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@dataclass(frozen=True, slots=True)
class _Deaf:
    """How a worker process of a loader begins: deaf to SIGTERM, then as its user said."""

    begin: Callable[[int], object] | None

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.begin is not None:
            self.begin(worker)


@cache
def _end_with_this_process() -> None:
    """Let this process kill workers when it ends: it would send them SIGTERM and wait."""
    util.Finalize(None, _kill_workers, exitpriority=10)


def _kill_workers() -> None:
    for child in active_children():
        if child.daemon:
            child.kill()


@contextmanager
def workers_outlive_sigterm(*loaders: object) -> Iterator[None]:
    """While inside, worker processes that loaders start ignore SIGTERM; they end with this process.

    Clusters and `torchrun` send the signal to all processes of a group: without its workers, a run
    could not go on to where it saves.
    """
    _end_with_this_process()
    shielded = [loader for loader in loaders if isinstance(loader, DataLoader)]
    before = [loader.worker_init_fn for loader in shielded]
    try:
        for loader in shielded:
            loader.worker_init_fn = _Deaf(loader.worker_init_fn)
        yield
    finally:
        for loader, begin in zip(shielded, before, strict=True):
            loader.worker_init_fn = begin
