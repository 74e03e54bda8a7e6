"""Run a compiled kernel on torch's own threads, or on this one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

_forked = False


def _note_fork() -> None:
    """Threads do not survive a fork, and the OpenMP runtime would wait for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def threads() -> int:
    """Threads that a kernel may use."""
    return 1 if _forked else torch.get_num_threads()


def run(kernel: int, arguments: int, wanted: int) -> None:
    """Call the C function at address `kernel` on `wanted` threads with the address `arguments`.

    The calls share their work by a counter among the arguments, so that any number of them does
    all of it. They run on the threads of the OpenMP runtime that torch itself runs on, where it
    has the GNU entry point: a second pool would compete with it for the cores.
    """
    if wanted == 1:
        _function(kernel)(arguments)
    elif (parallel := _openmp()) is not None:
        parallel(kernel, arguments, wanted, 0)
    else:
        calls = [_pool().submit(_function(kernel), arguments) for _ in range(wanted - 1)]
        _function(kernel)(arguments)
        for call in calls:
            call.result()


@lru_cache
def _function(kernel: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)


@lru_cache
def _openmp() -> Any:
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="pfsurgery")
