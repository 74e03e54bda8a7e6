"""Latency of models that are timed side by side."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pfsurgery.errors import ShapeError, SurgeryError
from pfsurgery.example import Example, example_inputs
from pfsurgery.measure.state import explained, undisturbed
from pfsurgery.modules import set_layout

MemoryFormat = Literal["contiguous", "channels_last"]

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True, slots=True)
class Setting:
    """Under which circumstances something was timed.

    Attributes:
        device: Name of the processor or GPU.
        threads: Threads of torch on the CPU.
        dtype: Data type of the model's parameters, e.g. `float32`.
        memory_format: `channels_last` if the weights or the input have that layout, else
            `contiguous`.
        input_shape: Shape of the first tensor of the example input.
        torch: Version of torch.
    """

    device: str
    threads: int
    dtype: str
    memory_format: str
    input_shape: tuple[int, ...]
    torch: str

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.threads} CPU {'thread' if self.threads == 1 else 'threads'}, "
            f"{self.dtype}, {self.memory_format}, batch {self.batch}, "
            f"input {'x'.join(map(str, self.input_shape))}, torch {self.torch}"
        )

    @property
    def batch(self) -> int:
        """First size of the example input."""
        return self.input_shape[0] if self.input_shape else 1


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of single forward passes of one batch.

    Attributes:
        times_ms: One time a round, in ms. Latencies of one call of `latency` share their rounds,
            so that times at the same place were taken right after each other.
        setting: Device, threads, dtype, layout and batch.
    """

    times_ms: tuple[float, ...]
    setting: Setting

    @property
    def median_ms(self) -> float:
        """Median time in ms."""
        return median(self.times_ms)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range of the times in ms: half of all rounds lie within it."""
        low, _, high = quantiles(self.times_ms, n=4, method="inclusive")
        return high - low


def latency(
    models: Mapping[str, nn.Module],
    example: Example | None = None,
    *,
    repeats: int = 20,
    warmup: int = 3,
    memory_format: MemoryFormat | None = None,
) -> dict[str, Latency]:
    """Time forward passes of several models in turns, so that noise hits all of them alike.

    Each round runs every model once, every second round in reverse order. Models run in eval mode
    under `torch.inference_mode`, and are left as they were. A GPU is timed by CUDA events, a CPU
    by the clock.

    Args:
        models: Models by name, all on one device.
        example: A tensor (N, C, H, W) or a tuple of arguments on that device; by default one
            image of the first model's own input size.
        repeats: Timed rounds, at least 2.
        warmup: Rounds before them that are thrown away.
        memory_format: Layout to time, of weights and input. The models are copied for it, so this
            needs memory for a second set of them. By default everything stays as it is.

    Returns:
        The times, in ms, by the names of `models`.

    Raises:
        ShapeError: A model does not run on the example.
        SurgeryError: There is no model, fewer than 2 repeats, a negative warm-up, or an unknown
            memory format.
    """
    if not models:
        raise SurgeryError("There is no model to time; pass at least one, as {name: model}.")
    if repeats < 2 or warmup < 0:
        raise SurgeryError(
            f"Cannot time {repeats} rounds after a warm-up of {warmup}: repeats must be at least "
            "2 for a spread, and warmup at least 0."
        )
    args = example_inputs(next(iter(models.values())), example)
    laid_out = [in_format(model, args, memory_format) for model in models.values()]
    args = laid_out[0][1]
    timed = [model for model, _ in laid_out]
    with undisturbed(*timed):
        for model in timed:
            # Not in inference mode: what a model caches here must stay fit for training.
            with explained(model, args):
                model(*args)
        settings = [setting_of(model, args) for model in timed]
        times: list[list[float]] = [[] for _ in timed]
        clock = _cuda_ms if first_tensor(args).is_cuda else _clock_ms
        with torch.inference_mode():
            for round_ in range(warmup + repeats):
                order = range(len(timed))
                for index in order if round_ % 2 == 0 else reversed(order):
                    elapsed = clock(timed[index], args)
                    if round_ >= warmup:
                        times[index].append(elapsed)
    return {
        name: Latency(times_ms=tuple(taken), setting=setting)
        for name, taken, setting in zip(models, times, settings, strict=True)
    }


def in_format(
    model: nn.Module, args: tuple[Any, ...], memory_format: MemoryFormat | None
) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of `model`, and `args`, in a layout; the very same objects if none is asked for.

    Raises:
        SurgeryError: `memory_format` is unknown.
    """
    if memory_format is None:
        return model, args
    if memory_format not in _FORMATS:
        raise SurgeryError(
            f"memory_format is {memory_format!r}; it must be one of {', '.join(_FORMATS)}, or None."
        )
    layout = _FORMATS[memory_format]

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() == 4:
            return leaf.contiguous(memory_format=layout)
        return leaf

    copy = deepcopy(model)
    set_layout(copy, layout)
    return copy, tree_map(convert, args)


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The first tensor among the arguments.

    Raises:
        ShapeError: There is none.
    """
    for leaf in tree_leaves(args):
        if isinstance(leaf, Tensor):
            return leaf
    raise ShapeError("The example input holds no tensor; pass at least one, e.g. (N, C, H, W).")


def setting_of(model: nn.Module, args: tuple[Any, ...]) -> Setting:
    """Device, threads, dtype, layout and batch of a forward pass."""
    tensor = first_tensor(args)
    weights = [tensor, *model.parameters()]
    floating = next((w for w in weights[1:] if w.is_floating_point()), tensor)
    last = any(
        w.dim() == 4
        and w.is_contiguous(memory_format=torch.channels_last)
        and not w.is_contiguous()
        for w in weights
    )
    return Setting(
        device=device_name(tensor.device),
        threads=torch.get_num_threads(),
        dtype=str(floating.dtype).removeprefix("torch."),
        memory_format="channels_last" if last else "contiguous",
        input_shape=tuple(tensor.shape),
        torch=torch.__version__,
    )


def _cuda_ms(model: nn.Module, args: tuple[Any, ...]) -> float:
    event: Any = torch.cuda.Event
    with torch.cuda.device(first_tensor(args).device):
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        model(*args)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def _clock_ms(model: nn.Module, args: tuple[Any, ...]) -> float:
    wait: Callable[[], None] = (
        torch.accelerator.synchronize if first_tensor(args).device.type != "cpu" else lambda: None
    )
    wait()
    start = perf_counter()
    output = model(*args)
    wait()
    elapsed = (perf_counter() - start) * 1e3
    del output
    return elapsed


@lru_cache
def device_name(device: torch.device) -> str:
    """Name of a processor or GPU, as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU {name}"
