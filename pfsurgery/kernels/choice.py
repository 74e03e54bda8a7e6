"""Which path an operation takes: a fast kernel, or the stock ATen calls."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pfsurgery.kernels.axes import MOST_NUMBERS, Axis, are_near

_SWITCH = "PFSURGERY_KERNELS"
_NARROW = (torch.bfloat16, torch.float16)
_KINDS = (torch.float32, torch.float64, *_NARROW)  # of numbers that CPU kernels compute with
_SMALL = 2048  # numbers; below, the stock call is over before a kernel has started
_enabled: ContextVar[bool] = ContextVar("pfsurgery_kernels", default=True)


@contextmanager
def disabled() -> Iterator[None]:
    """Take the stock ATen calls within the block, in this thread."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def why_stock(x: Tensor) -> str | None:
    """Why the stock calls are taken for an input (N, C, H, W); None where a kernel runs."""
    if (reason := _why_not(x)) is not None:
        return reason
    return f"the input has less than {_SMALL} numbers" if x.numel() < _SMALL else None


def has_loops(x: Tensor, down: Axis, across: Axis, *, sums: bool) -> bool:
    """Whether a kernel computes maxima or sums of these windows of (N, C, H, W).

    On a CPU, numbers of two bytes have loops for windows of 3x3 at stride 1, for sums without a
    gradient.
    """
    if not x.is_cpu or x.dtype not in _NARROW:
        return True
    tracked = sums and is_tracked(x)
    return are_near(down, across) and x.shape[1:].numel() < MOST_NUMBERS and not tracked


def is_tracked(x: Tensor, weights: Iterable[Tensor] = ()) -> bool:
    """Whether autograd follows what is made of `x` and of weights."""
    return torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights))


def why_unfused(x: Tensor) -> str | None:
    """Why a bottleneck runs as several stock operators; None where one kernel runs it whole."""
    if (reason := _why_not(x)) is not None:
        return reason
    if not x.numel():
        return "the input is empty"
    if x.is_cpu and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _has_tiles())):
        return None
    return f"no fused kernel computes in {_kind(x)} on this {x.device}"


def explain(x: Tensor) -> str:
    """Which path the operations take for an input (N, C, H, W) here and now, and why.

    Operations have reasons of their own beside these. The stock calls are taken for padding that
    is not zeros, kernels of more than 256 taps, blurs under autocast and, on a CPU, pools with a
    stride in channels_last or on planes less than 16 pixels wide, where ATen's are faster. So they
    are there for numbers of two bytes in windows that are not 3x3 at stride 1, and, with gradients,
    for their means and blurs. A fitted bottleneck runs in one kernel for inference only: with
    gradients it is several operators, and so it is in bfloat16 where its input channels are no
    multiple of 32.
    """
    reason = why_stock(x)
    if reason is not None:
        return f"stock ATen calls: {reason}"
    library = "Triton" if x.is_cuda else "Numba"
    layout = "NCHW" if x.is_contiguous() else "channels_last"
    fused = "" if why_unfused(x) else "; bottlenecks in one kernel"
    return f"{library} kernel: {layout}, {_kind(x)} on {x.device}{fused}"


def why_traced(x: Tensor) -> str | None:
    """Why someone has to see standard operators."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a functorch transform (vmap, grad, jvp) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode is active that watches torch's calls"
    return None


def why_off(x: Tensor) -> str | None:
    """Why nothing but torch's own calls may run, whatever the input is like."""
    if (reason := why_traced(x)) is not None:
        return reason
    if not _enabled.get():
        return "kernels are switched off by `disabled`"
    return _why_switched_off()


def _why_not(x: Tensor) -> str | None:
    """Why no kernel runs for an input of this kind, of whatever size."""
    if (reason := why_off(x)) is not None:
        return reason
    if x.ndim != 4:
        return f"the input has {x.ndim} dimensions, not 4"
    if x.is_neg():
        return "the input is a view that negates lazily"
    if x.is_cpu:
        if x.dtype in _NARROW and torch.backends.cpu.get_cpu_capability() != "AVX512":
            return f"CPU kernels compute in {_kind(x)} on processors with AVX-512 only"
        if x.dtype not in _KINDS:
            return f"no CPU kernel computes in {_kind(x)}"
        return _why_missing("numba")
    if x.is_cuda:
        if not x.is_floating_point():
            return f"no GPU kernel computes in {_kind(x)}"
        return _why_missing("triton")
    return f"there is no kernel for {x.device.type}"


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@lru_cache
def _has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (Intel AMX), as system and Numba allow."""
    if any(name in os.environ for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")):
        return False  # Numba compiles for another processor, which may have no tiles
    has = torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()
    return has and torch.cpu._init_amx()


@lru_cache
def _why_switched_off() -> str | None:
    off = os.environ.get(_SWITCH, "1") == "0"
    return f"{_SWITCH}=0 switches the kernels off" if off else None


@lru_cache
def _why_missing(library: str) -> str | None:
    try:
        missing = find_spec(library) is None
    except ValueError:
        missing = True
    return f"{library} is not installed" if missing else None
