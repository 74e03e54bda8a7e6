"""What a pass over a model must leave as it was: random states, train flags, weights."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pfsurgery.errors import TrainingError
from pfsurgery.files import write_atomically


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Put the global random states of Python, NumPy and torch (CPU and CUDA) back at the end."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def keep_train_flags(*models: nn.Module) -> Iterator[None]:
    """Put the `training` flag of every module back at the end."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def keep_layouts(*models: nn.Module) -> Iterator[None]:
    """Put the memory format of every weight back at the end; one that is new gets the usual."""
    last = {p for model in models for p in _kernels(model) if not p.is_contiguous()}
    try:
        yield
    finally:
        for p in (p for model in models for p in _kernels(model)):
            wanted = torch.channels_last if p in last else torch.contiguous_format
            p.data = p.data.contiguous(memory_format=wanted)


def _kernels(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 4]


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of the first parameter (or buffer); CPU and float32 without any."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def whole(value: Tensor) -> Tensor:
    """`value`; put together on the CPU if it is split over processes, which must all call this."""
    together = getattr(value, "full_tensor", None)
    return value if together is None else together().cpu()


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """What this process has of `value` where `like`, of the same shape, is split over processes."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, each tensor contiguous and with its own memory."""
    return {
        name: whole(value.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict, each tensor put together if it is split over processes."""
    state = model.state_dict()
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = whole(value)
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `whole_weights` gave; of tensors that are split over processes, the own share.

    Raises:
        TrainingError: They are another model's.
    """
    for name, own in model.state_dict().items():
        if name in state:
            state[name] = share_of(state[name], own)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise TrainingError(
            f"The checkpoint is of another model: {' '.join(lines[1:2])} Give the model that the "
            f"run began with."
        ) from None


def same_buffers(model: nn.Module) -> None:
    """Every process takes over the buffers (norm statistics) of the first."""
    from accelerate.utils import broadcast

    for buffer in model.buffers():
        buffer.copy_(broadcast(buffer))


def restore_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, made by `copy_weights`, back into the tensors of `model`."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in weights:
                value.copy_(weights[name])


def non_finite(weights: dict[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity."""
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return name
    return None


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file such that `path` is at all times the old or the new one, whole.

    Raises:
        TrainingError: The file could not be written; what stood at `path` before is intact.
    """
    from safetensors.torch import save

    try:
        write_atomically(path, save(weights))
    except OSError as error:
        raise TrainingError(
            f"Could not write the weights to {path}: {error}. Weights written there earlier are "
            f"intact. Make room or choose another output folder."
        ) from error


def writable_folder(path: str | Path) -> Path:
    """Create the folder `path` if needed, and make sure that files can be written into it.

    Raises:
        TrainingError: It cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TrainingError(
            f"The output folder {folder} cannot be written to: {error}. Choose another folder."
        ) from error
    return folder
