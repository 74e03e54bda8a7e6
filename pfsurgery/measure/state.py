"""Run a caller's model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pfsurgery.errors import ShapeError, SurgeryError
from pfsurgery.modules import gpus_of


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on leaving, flags, buffers and torch's RNG are as before.

    Flags are set one by one instead of by `eval()`, because a model's own `train()` may do work
    that cannot be undone.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    flags = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    with torch.random.fork_rng(devices=gpus_of(*models)), torch.no_grad():
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


@contextmanager
def explained(model: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    """Turn the failure of a forward pass inside the block into a `ShapeError` for people.

    Raises:
        ShapeError: The block raised; running out of memory is passed on as it is.
    """
    try:
        yield
    except (SurgeryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        weight = next(model.parameters(), None)
        held = "" if weight is None else f" Its parameters are {weight.dtype} on {weight.device}."
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ShapeError(
            f"{type(model).__name__} does not run on the example {describe(args)}: "
            f"{type(error).__name__}: {reason}.{held} Pass an example input that the model accepts."
        ) from error


def describe(args: tuple[Any, ...]) -> str:
    """Shapes, dtypes and devices of the tensors in `args`, e.g. `(1, 3, 224, 224) float32 cpu`."""
    shown = [
        f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')} on {leaf.device}"
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in tree_leaves(args)
    ]
    return "; ".join(shown)
