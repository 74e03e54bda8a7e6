"""A short distillation from the original, the same for every method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import base_nets
import torch
from torch import Tensor, nn

from pfsurgery.recover.distill import kd_loss

RATES = (0.1, 0.03, 0.02)
_BATCH = 128
Scores = Callable[[int, Tensor], Tensor]  # of the teacher, for the batch (N, 3, H, W) of a step


def asking(teacher: nn.Module) -> Scores:
    """Scores of `teacher`, asked at every step."""
    teacher.eval()

    def ask(_: int, x: Tensor) -> Tensor:
        with torch.no_grad(), base_nets.autocast(teacher):
            return teacher(x)

    return ask


def remembering(teacher: nn.Module) -> Scores:
    """Scores of `teacher`, asked once a step for all students, as they all see the same batches."""
    ask, known = asking(teacher), list[Tensor]()

    def remember(step: int, x: Tensor) -> Tensor:
        if step == len(known):
            known.append(ask(step, x))
        return known[step]

    return remember


def distilled(
    model: nn.Module, scores: Scores, images: Tensor, steps: int, rate: float
) -> nn.Module:
    """A copy of `model` after `steps` of distillation, in eval mode.

    Args:
        model: The smaller network.
        scores: Of the original.
        images: uint8 training images (N, 3, 32, 32).
        steps: Batches of 128.
        rate: Peak of the one-cycle schedule.
    """
    student = copy.deepcopy(model).train().requires_grad_(True)
    for _ in stepwise(student, scores, images, steps, rate):
        pass
    return student.eval()


def stepwise(
    student: nn.Module, scores: Scores, images: Tensor, steps: int, rate: float
) -> Iterator[None]:
    """Train `student` by SGD with a one-cycle rate, giving way after each step.

    The loss is the Kullback-Leibler divergence from the teacher's classes, labels are not used.
    Batches, crops and mirrors come from one seed, so all methods see the same. Where the processor
    multiplies matrices in bfloat16, both networks run in it.
    """
    optimiser = torch.optim.SGD(base_nets.decayed(student), lr=rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=0.25
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        index = torch.randint(0, len(images), (_BATCH,), generator=generator)
        x = base_nets.normalise(base_nets.augment(images[index], images.shape[-1], generator))
        wanted = scores(step, x)
        with base_nets.autocast(student):
            found = student(x)
        loss = kd_loss(found.float(), wanted.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        yield
