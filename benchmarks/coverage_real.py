"""The part of the coverage sweep that runs models with real weights, forwards and backwards."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from coverage_models import NotBuilt, build
from torch import Tensor, nn
from torch.nn.functional import softsign

import pfsurgery

# Images of this many pixels a side are tried before a model's own size: deep stages get small.
SMALL = 128
# Default configurations of some families are too large for a backward pass on a small machine.
MOST_PARAMETERS = 250_000_000
# Modules of a replacement that hold what was the convolution's own.
_ADDED = ("pointwise.", "conv.")


def smallest(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The model with the fewest parameters of each family, of those with something converted."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("maxpool_all", {}).get("converted"):
            best = found.setdefault(row["family"], row)
            if row["parameters"] < best["parameters"]:
                found[row["family"]] = row
    return [row["model"] for row in found.values()]


def run_for_real(name: str) -> dict[str, Any]:
    """A forward and a backward pass of the model and of its conversion by `maxpool_all`.

    Returns:
        The model's name, and under `real` what was run and what was wrong with it.
    """
    said: dict[str, Any] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said |= _run(name)
    except NotBuilt as reason:
        said["skipped"] = str(reason)
    except Exception:
        said["error"] = traceback.format_exc(limit=-3)
    said["seconds"] = round(time.perf_counter() - wall, 2)
    said["cpu_seconds"] = round(time.process_time() - cpu, 2)
    return {"model": name, "real": said}


def _run(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = build(name, "cpu")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise NotBuilt(f"{parameters / 1e6:.0f} million parameters, more than are run for real")
    inputs, training, meant = _original(model, inputs)
    fast = pfsurgery.convert(model, "maxpool_all", example=inputs)
    del model
    made = _gradients(fast, inputs, training)
    problems = []
    for parameter, finite in made.items():
        before = _of_the_original(parameter, meant)
        if finite is None and before is not None:
            problems.append(f"{parameter} has no gradient")
        elif finite is False and before is not False:
            problems.append(f"the gradient of {parameter} is not finite")
    shape = list(inputs[0].shape) if isinstance(inputs[0], Tensor) else list(inputs[0][0].shape)
    said = {"input": shape, "training": training, "gradients": sum(map(bool, made.values()))}
    return said | ({"problems": problems} if problems else {})


def _original(
    model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[tuple[Any, ...], bool, dict[str, bool | None]]:
    """On what the model runs, whether in training, and the gradients that it then has.

    Two small images in training are tried first, then two of its own size, then one in eval mode.
    """
    attempts = [(inputs, False)]
    if isinstance(inputs[0], Tensor):
        _, channels, height, width = inputs[0].shape
        own = (torch.rand(2, channels, height, width),)
        attempts = [(own, True), ((own[0][:1],), False)]
        if min(height, width) > SMALL:
            attempts.insert(0, ((torch.rand(2, channels, SMALL, SMALL),), True))
    for given, training in attempts[:-1]:
        try:
            return given, training, _gradients(model, given, training)
        except Exception:
            model.zero_grad()
    given, training = attempts[-1]
    return given, training, _gradients(model, given, training)


def _gradients(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> dict[str, bool | None]:
    """Whether each parameter's gradient is finite, None where there is none."""
    torch.manual_seed(0)  # layers that are dropped at random are the same before and after
    model.train(training)
    outputs = [y for y in _tensors(model(*inputs)) if y.requires_grad and y.is_floating_point()]
    # bounded, since what comes out of random weights may be large
    torch.stack([softsign(y[y.isfinite()]).sum() for y in outputs]).sum().backward()
    found = {
        path: None if p.grad is None else bool(p.grad.isfinite().all())
        for path, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _of_the_original(parameter: str, meant: dict[str, bool | None]) -> bool | None:
    """What is known of the parameter that this one is, or was made from."""
    if parameter in meant:
        return meant[parameter]
    for added in _ADDED:
        before, found, after = parameter.rpartition(added)
        if found and before + after in meant:
            return meant[before + after]
    raise KeyError(parameter)
