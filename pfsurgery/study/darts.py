"""Differentiable architecture search: weights and choices of a supernet, trained in turns.

First-order DARTS (Liu et al., ICLR 2019, arXiv 1806.09055): on one half of the training images the
weights descend, on the other half the logits of the choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfsurgery.errors import TrainingError
from pfsurgery.recover import evaluate
from pfsurgery.recover.order import seed_of
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.snapshot import newest, prune, read_snapshot, write_snapshot
from pfsurgery.recover.state import keep_random_state, placement
from pfsurgery.study.images import AugmentedBatches, StudyImages
from pfsurgery.study.setting import StudySetting
from pfsurgery.study.supernet import choices

_MOMENTUM = 0.9
_BETAS = (0.5, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSetting:
    """How the supernet is trained.

    Attributes:
        epochs: Passes over both halves of the training images.
        warmup: The first of these epochs, in which only weights are trained.
        lr: Highest learning rate of the weights; it falls to 0 as a cosine.
        choice_lr: Learning rate of the logits of the choices, with Adam.
        choice_decay: Weight decay of these logits.
        seed: Of first weights, order of images and augmentation.

    Raises:
        TrainingError: A value is out of its range.
    """

    epochs: int = 12
    warmup: int = 2
    lr: float = 0.05
    choice_lr: float = 0.02
    choice_decay: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("warmup", 0 <= self.warmup < self.epochs, "from 0 to below the epochs of the search"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("choice_lr", 0 < self.choice_lr < math.inf, "above 0"),
            ("choice_decay", 0 <= self.choice_decay < math.inf, "0 or more"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise TrainingError(
                    f"The search's {name}={getattr(self, name)!r} must be {allowed}."
                )


@dataclass(frozen=True, slots=True)
class SearchEpoch:
    """One epoch of the search.

    Attributes:
        step: Steps of the weights taken since the start.
        loss: Mean cross-entropy on the images that the weights are trained on, in nats.
        top1: Of the supernet on the validation images, in percent. The search does not use it.
    """

    step: int
    loss: float
    top1: float


def search(
    model: nn.Module,
    images: StudyImages,
    setting: StudySetting,
    how: SearchSetting,
    *,
    val: list[tuple[Tensor, Tensor]],
    folder: Path,
) -> tuple[SearchEpoch, ...]:
    """Train a supernet in place, weights and choices; the global random states are put back.

    The state after each epoch is kept in `folder`; given again, the same call goes on from there.

    Args:
        model: From `supernet`.
        images: Each half of the training images serves one purpose.
        setting: Size of batches and weight decay.
        how: All else.
        val: Batches of validation images, for the history only.
        folder: For checkpoints.

    Raises:
        TrainingError: The loss is not finite, or a checkpoint cannot be written or read.
    """
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    model.to(memory_format=torch.channels_last)
    logits = [choice.logits for choice in choices(model)]
    own = {id(parameter) for parameter in logits}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in own]
    descend = torch.optim.SGD(
        weights, how.lr, momentum=_MOMENTUM, nesterov=True, weight_decay=setting.weight_decay
    )
    choose = torch.optim.Adam(logits, how.choice_lr, betas=_BETAS, weight_decay=how.choice_decay)
    history: list[SearchEpoch] = []
    folder.mkdir(exist_ok=True)
    if (path := newest(folder)) is not None:
        saved = read_snapshot(path)
        model.load_state_dict(saved["model"])
        descend.load_state_dict(saved["weights"])
        choose.load_state_dict(saved["choices"])
        history = [SearchEpoch(**entry) for entry in saved["history"]]
    halves = [
        AugmentedBatches(half, setting.batch_size, flip=images.flip)
        for half in images.train.halves()
    ]
    for epoch in tracked(range(len(history), how.epochs), "searching"):
        with keep_random_state():
            torch.manual_seed(seed_of(how.seed, epoch))
            loss = _epoch(model, halves, descend, choose, how, epoch)
        step = (epoch + 1) * len(halves[0])
        history.append(SearchEpoch(step, loss, evaluate(model, val).top1))
        content: dict[str, Any] = {
            "model": model.state_dict(),
            "weights": descend.state_dict(),
            "choices": choose.state_dict(),
            "history": [asdict(entry) for entry in history],
        }
        write_snapshot(folder, content, step=epoch + 1, total=how.epochs)
        prune(folder, keep=1)
    return tuple(history)


def _epoch(
    model: nn.Module,
    halves: list[AugmentedBatches],
    descend: torch.optim.Optimizer,
    choose: torch.optim.Optimizer,
    how: SearchSetting,
    epoch: int,
) -> float:
    """One pass over both halves; the mean loss of the weights' half."""
    model.train()
    logits = choose.param_groups[0]["params"]
    total = how.epochs * len(halves[0])
    others = _endless(halves[1])
    losses = []
    for place, batch in enumerate(halves[0]):
        rate = (1 + math.cos(math.pi * (epoch * len(halves[0]) + place) / total)) / 2
        descend.param_groups[0]["lr"] = how.lr * rate
        if epoch >= how.warmup:
            gradients = torch.autograd.grad(_loss(model, next(others)), logits)
            for parameter, gradient in zip(logits, gradients, strict=True):
                parameter.grad = gradient
            choose.step()
            choose.zero_grad()
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        descend.step()
        descend.zero_grad()
        choose.zero_grad()  # the weights' images leave no trace in the choices
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"The loss is {losses[-1]} in epoch {epoch + 1} of the search. Try a lower lr of "
                f"the search."
            )
    return math.fsum(losses) / len(losses)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    device, _ = placement(model)
    pixels = batch[0].to(device, memory_format=torch.channels_last)
    return F.cross_entropy(model(pixels), batch[1].to(device))


def _endless(batches: AugmentedBatches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches
