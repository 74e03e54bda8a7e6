"""Calibration images, and frozen copies of the models that they run through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.batches import sample_images
from pfsurgery.errors import DataError
from pfsurgery.modules import copied
from pfsurgery.recover.state import placement

_FEWEST = 64  # images of which a part is held out
_IMAGE = 3 * 224 * 224
# Numbers of one batch: larger ones need fresh memory for every layer on a CPU, which takes longer
# than the layer, and a GPU should have work for all its cores.
_CPU_BATCH, _GPU_BATCH = 8 * _IMAGE, 32 * _IMAGE


def calibration_batches(images: Any, model: nn.Module) -> list[Tensor]:
    """Unlabelled images as batches (N, C, H, W) on the device and in the dtype of `model`.

    Large batches are split: 8 images of 224 x 224 pixels at a time on a CPU, 32 on a GPU. Paths,
    data sets and loaders may hold millions of images: of these 2,000 are taken, 400 MB at the most.

    Raises:
        DataError: There are none, or they have different numbers of channels.
    """
    if images is None:
        raise DataError(
            "This is fitted to images: pass images= (a few hundred to a few thousand, "
            "unlabelled), as an iterable of batches (N, C, H, W), a DataLoader or a path; on the "
            "command line --data."
        )
    device, dtype = placement(model)
    most = _CPU_BATCH if device.type == "cpu" else _GPU_BATCH
    batches = [
        part.to(device, dtype)
        for batch in sample_images(images, model)
        for part in torch.split(batch, max(1, most // max(1, batch.shape[1:].numel())))
        if len(part)
    ]
    if not batches:
        raise DataError("images= holds no batch; give at least one.")
    channels = sorted({batch.shape[1] for batch in batches})
    if len(channels) > 1:
        raise DataError(f"images= holds images of {channels} channels; give images of one kind.")
    return batches


def hold_out(batches: Sequence[Tensor], every: int = 10) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to fit to, and every tenth image to judge by; all serve for both if few."""
    if sum(len(batch) for batch in batches) < _FEWEST:
        return list(batches), list(batches)
    fitted, judges, at = [], [], 0
    for batch in batches:
        held = torch.arange(at, at + len(batch), device=batch.device) % every == every - 1
        fitted.append(batch[~held])
        judges.append(batch[held])
        at += len(batch)
    return [batch for batch in fitted if len(batch)], [batch for batch in judges if len(batch)]


def in_fast_layout(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """The batches with channels innermost, a third faster on CPUs, where `model` can read them."""
    as_wanted = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    try:
        with torch.no_grad():
            model(as_wanted[0][:2])
    except RuntimeError:  # it views what it should reshape
        return list(batches)
    return as_wanted


def as_batch(image: Tensor, batch: int) -> Tensor:
    """An image (1, C, H, W) as a batch of so many, channels innermost, to time networks with."""
    return image.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose parameters need no gradients."""
    return copied(model).eval().requires_grad_(False)


def frozen_teacher(teacher: nn.Module, model: nn.Module) -> nn.Module:
    """A frozen copy of `teacher` that runs on the same images as `model`: its device and dtype."""
    original, place = frozen_copy(teacher), placement(model)
    return original if placement(original) == place else original.to(*place)


def dressed(student: nn.Module, model: nn.Module) -> nn.Module:
    """The student with the train flags and gradient flags of the model.

    What is new has those of what it replaced: a module, and that module's weight.
    """
    flags = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, module in student.named_modules():
        module.training = flags[_nearest(name, flags)]
    for name, parameter in student.named_parameters():
        own = f"{_nearest(name, flags)}.weight"
        parameter.requires_grad_(trained.get(name, trained.get(own, True)))
    return student


def _nearest(name: str, modules: Mapping[str, bool]) -> str:
    """The path of the module of the original that `name` is, or lies in."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name
