"""Images changed within a bound so that a model errs, by its own gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfsurgery.errors import DataError, TrainingError
from pfsurgery.measure.state import undisturbed
from pfsurgery.recover.evaluate import check_labels, logits_of
from pfsurgery.recover.state import placement
from pfsurgery.study.corruptions import generator_of
from pfsurgery.study.pixels import Normalisation

_REACH = 2.5  # times epsilon that the steps of PGD can go in all


def fgsm(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    normalisation: Normalisation,
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., ICLR 2015, arXiv 1412.6572).

    One step of `epsilon` along the sign of the gradient of the cross-entropy. The model is run in
    eval mode and left as it was, the gradients of its parameters included.

    Shape:
        (N, C, H, W) -> (N, C, H, W), values from 0 to 1, float32.

    Args:
        model: A classifier: (N, C, H, W) -> (N, classes).
        pixels: Images with values from 0 to 1.
        labels: (N,) class indices; an image with the label -1 is left as it is.
        epsilon: Largest change of a value, in units of 1/255.
        normalisation: Of the images that the model is given.

    Raises:
        DataError: `epsilon` is negative, or a label does not fit.
        TrainingError: The model does not return one tensor of logits, or passes no gradient.
    """
    lowest, highest = _bounds(pixels, epsilon)
    with undisturbed(model):
        gradient = _gradient(model, pixels, labels, normalisation)
    moved = pixels + epsilon / 255 * gradient.sign()
    return moved.clamp(lowest, highest)


def pgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    normalisation: Normalisation,
    steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Projected gradient descent in L-infinity (Madry et al., ICLR 2018, arXiv 1706.06083).

    From a random place in the ball, each step goes along the sign of the gradient of the
    cross-entropy and back into the ball and the range of pixels. The model is run in eval mode and
    left as it was, the gradients of its parameters included.

    Shape:
        (N, C, H, W) -> (N, C, H, W), values from 0 to 1, float32.

    Args:
        model: As for `fgsm`.
        pixels: As for `fgsm`.
        labels: As for `fgsm`; with -1 only the random start is left.
        epsilon: Largest change of a value, in units of 1/255.
        normalisation: As for `fgsm`.
        steps: Number of steps.
        step_size: In units of 1/255; by default 2.5 epsilon / steps.
        seed: Of the start.
        first: Place of the first image among all images, so that batches may have any size.

    Raises:
        DataError: `epsilon` is negative, `steps` is less than 1, or a label does not fit.
        TrainingError: The model does not return one tensor of logits, or passes no gradient.
    """
    lowest, highest = _bounds(pixels, epsilon)
    if steps < 1:
        raise DataError(f"PGD takes at least one step, not {steps}.")
    size = _REACH * epsilon / steps if step_size is None else step_size
    starts = [
        torch.rand(pixels.shape[1:], generator=generator_of(seed, first + place))
        for place in range(len(pixels))
    ]
    share = torch.stack(starts).to(pixels.device) if starts else pixels
    moved = (pixels + epsilon / 255 * (2 * share - 1)).clamp(lowest, highest)
    with undisturbed(model):
        for _ in range(steps):
            gradient = _gradient(model, moved, labels, normalisation)
            moved = (moved + size / 255 * gradient.sign()).clamp(lowest, highest)
    return moved


def _bounds(pixels: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    if epsilon < 0:
        raise DataError(f"epsilon must not be negative, but is {epsilon}.")
    return (pixels - epsilon / 255).clamp(0, 1), (pixels + epsilon / 255).clamp(0, 1)


def _gradient(
    model: nn.Module, pixels: Tensor, labels: Tensor, normalisation: Normalisation
) -> Tensor:
    """Of each image's cross-entropy by its pixels."""
    device, dtype = placement(model)
    with torch.enable_grad():
        leaf = pixels.detach().clone().requires_grad_()
        logits = logits_of(model, normalisation.redo(leaf).to(device, dtype))
        check_labels(labels, logits, lowest=-1)
        if not logits.requires_grad:
            raise TrainingError(
                f"{type(model).__name__} passes no gradient to its input, so it cannot be attacked "
                f"by it. Give the model as it was before it was compiled for inference."
            )
        # In float32 the gradient of a sure prediction would be exactly zero.
        loss = F.cross_entropy(
            logits.cpu().double(), labels.cpu(), ignore_index=-1, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient
