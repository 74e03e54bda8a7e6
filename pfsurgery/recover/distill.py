"""The losses of distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's to the student's softened classes.

    Both logits are divided by the temperature T, and the result is multiplied by T^2, so that the
    size of the gradients hardly depends on T (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes), without gradient.
        temperature: T > 0; above 1, wrong classes count for more.

    Returns:
        A scalar, the mean over the batch in nats; computed in float32. It is 0 when both agree.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def recovery_loss(
    student_logits: Tensor,
    labels: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`(1 - kd_weight) * cross-entropy + kd_weight * kd_loss`.

    Args:
        student_logits: (N, classes).
        labels: (N,) class indices; may be left out when `kd_weight` is 1.
        teacher_logits: (N, classes); without them the loss is the cross-entropy alone.
        temperature: See `kd_loss`.
        kd_weight: Share of the distillation, 0 to 1.
        label_smoothing: Share of the target that is spread evenly over all classes, 0 to 1.

    Returns:
        A scalar in nats, computed in float32.

    Raises:
        ValueError: The labels, or both labels and teacher, are needed and missing.
    """
    share = kd_weight if teacher_logits is not None else 0.0
    loss = student_logits.new_zeros((), dtype=student_logits.float().dtype)
    if share < 1:
        if labels is None:
            raise ValueError("labels are needed unless there is a teacher and kd_weight is 1.")
        logits = student_logits.float()
        loss = loss + (1 - share) * F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if teacher_logits is not None and share > 0:
        loss = loss + share * kd_loss(student_logits, teacher_logits, temperature=temperature)
    return loss
