"""A short distillation from the original, the same for every method."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import base_nets
import torch
from torch import Tensor, nn

from pfsurgery.recover.distill import kd_loss

RATES = (0.1, 0.03, 0.02)
_BATCH = 128


def distilled(
    model: nn.Module, teacher: nn.Module, images: Tensor, steps: int, rate: float
) -> nn.Module:
    """A copy of `model` after `steps` of distillation, in eval mode.

    Args:
        model: The smaller network.
        teacher: The original.
        images: uint8 training images (N, 3, 32, 32).
        steps: Batches of 128.
        rate: Peak of the one-cycle schedule.
    """
    student = copy.deepcopy(model).train().requires_grad_(True)
    for _ in stepwise(student, teacher, images, steps, rate):
        pass
    return student.eval()


def stepwise(
    student: nn.Module, teacher: nn.Module, images: Tensor, steps: int, rate: float
) -> Iterator[None]:
    """Train `student` by SGD with a one-cycle rate, giving way after each step.

    The loss is the Kullback-Leibler divergence from the teacher's classes, labels are not used.
    Batches, crops and mirrors come from one seed, so all methods see the same. Where the processor
    multiplies matrices in bfloat16, both networks run in it.
    """
    teacher = teacher.eval()
    optimiser = torch.optim.SGD(base_nets.decayed(student), lr=rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=0.25
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(0, len(images), (_BATCH,), generator=generator)
        x = base_nets.normalise(base_nets.augment(images[index], images.shape[-1], generator))
        with torch.no_grad(), base_nets.autocast(teacher):
            wanted = teacher(x)
        with base_nets.autocast(student):
            scores = student(x)
        loss = kd_loss(scores.float(), wanted.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        yield
