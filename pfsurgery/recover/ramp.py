"""Gradual conversion: from the original's convolutions to the new operations, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import TrainingError
from pfsurgery.plan import Decision
from pfsurgery.record import has_record, record
from pfsurgery.sites import Convolution


class Ramp:
    """Replaced sites give `(1 - alpha) * convolution + alpha * operation`, alpha rising to 1.

    The convolution (with its norm and activation, where the conversion dropped these) is the
    teacher's, and stays as it is. Blending is done by hooks, so that modules and names of the model
    are what they were. Evaluation sees the operations alone.

    Args:
        student: A converted model.
        teacher: The model as it was before.
        steps: After so many, alpha is 1 and the hooks are gone.

    Raises:
        TrainingError: The student has no replaced site, or the teacher lacks one of them.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, steps: int) -> None:
        self.steps = steps
        self.alpha = torch.zeros((), device=next(student.parameters()).device)
        replaced = record(student).replaced if has_record(student) else ()
        if not replaced:
            raise TrainingError(
                "ramp is set, but the model has no replaced site. Give a model that "
                "pfsurgery.convert made, or ramp=0."
            )
        self._pairs = [
            (student.get_submodule(d.site.name), _original(teacher, d)) for d in replaced
        ]
        self._handles: list[Any] = []

    @contextmanager
    def blending(self) -> Iterator[Ramp]:
        """While inside, training passes are blended."""
        try:
            self._hook()
            yield self
        finally:
            self._remove()

    def at(self, step: int) -> None:
        """Set alpha for a step, counted from 0."""
        if step >= self.steps:
            self._remove()
            return
        if not self._handles:  # the run went back to a checkpoint inside the ramp
            torch.compiler.reset()  # what was compiled in the meantime knows of no hooks
            self._hook()
        self.alpha.fill_(step / self.steps)

    def _hook(self) -> None:
        self._handles = [_blend(new, old, self.alpha) for new, old in self._pairs]

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _original(teacher: nn.Module, decision: Decision) -> list[nn.Module]:
    site = decision.site
    if site.kind == "attention":
        raise TrainingError(
            f"ramp is set, but {site.name} was an attention; only convolutions are blended. Set "
            f"ramp=0."
        )
    paths = (site.name, *(site.neighbours.tail if decision.tail == "drop" else ()))
    try:
        modules = [teacher.get_submodule(path) for path in paths]
    except AttributeError as error:
        raise TrainingError(
            f"ramp is set, but the teacher does not fit: {error}. Give the model as it was before "
            f"the conversion, or ramp=0."
        ) from None
    if not isinstance(modules[0], Convolution):
        raise TrainingError(
            f"ramp is set, but the teacher's {site.name} is a {type(modules[0]).__name__}, not the "
            f"convolution that was replaced. Give the original, or ramp=0."
        )
    return modules


def _blend(new: nn.Module, original: list[nn.Module], alpha: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        old = inputs[0]
        for part in original:
            old = part.forward(old)  # hooks on the teacher are for what the teacher sees
        return torch.lerp(old.to(output.dtype), output, alpha.to(output.dtype))

    return new.register_forward_hook(hook)
