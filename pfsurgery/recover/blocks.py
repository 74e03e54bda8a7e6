"""The blocks in which sites were replaced, and matching what the teacher's blocks give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import TrainingError
from pfsurgery.plan import Decision
from pfsurgery.record import has_record, record


@dataclass(frozen=True, slots=True)
class Block:
    """A residual branch in which sites were replaced, or such a site with norm and activation.

    Attributes:
        output: Path of the module whose output is the block's.
        modules: Paths of the modules that make it up; what is below them belongs to it too.
        sites: What was replaced in it.
    """

    output: str
    modules: tuple[str, ...]
    sites: tuple[Decision, ...]


def changed_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of a converted model in which sites were replaced; none for other models."""
    if not has_record(model):
        return ()
    paths = {path for path, _ in model.named_modules()}
    found: dict[str, Block] = {}
    for plan in record(model).plans:
        for decision in plan.replaced:
            site = decision.site
            branch = site.neighbours.branch
            own = tuple(path for path in (*site.names, *site.neighbours.tail) if path in paths)
            modules = (branch,) if branch and branch in paths else own
            if not modules:
                continue
            output = modules[-1]
            before = found[output].sites if output in found else ()
            found[output] = Block(output, modules, (*before, decision))
    return tuple(found.values())


def changed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters in `changed_blocks`."""
    inside = {path for block in changed_blocks(model) for path in block.modules}
    return {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(f"{path}.") for path in inside)
    }


class BlockMatch:
    """How far the student's changed blocks are from the teacher's: normalised squared errors.

    For outputs s and t of one block, `sum((s - t)**2) / sum(t**2)` over the batch; the loss is the
    mean over all blocks. It is 0 where they agree and 1 where the student gives zeros.

    Args:
        student: A converted model.
        teacher: The model as it was before.

    Raises:
        TrainingError: The student has no changed block, or the teacher lacks one of them.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = student, teacher
        self.outputs = [block.output for block in changed_blocks(student)]
        if not self.outputs:
            raise TrainingError(
                "match_weight is set, but the model has no replaced site to match. Give a model "
                "that pfsurgery.convert made, or match_weight=0."
            )
        paths = {path for path, _ in teacher.named_modules()}
        for path in self.outputs:
            if path not in paths:
                raise TrainingError(
                    f"match_weight is set, but the teacher has no module {path!r}. Give the model "
                    f"as it was before the conversion, or match_weight=0."
                )
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    @contextmanager
    def watching(self) -> Iterator[BlockMatch]:
        """While inside, forward passes of both models are seen."""
        handles = []
        try:
            for model, seen in zip((self.student, self.teacher), self._seen, strict=True):
                for path in self.outputs:
                    handles.append(_watch(model.get_submodule(path), path, seen))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forget(self) -> None:
        """Let go of what was seen."""
        for seen in self._seen:
            seen.clear()

    def loss(self) -> Tensor:
        """The mean over the blocks, of the last forward passes; a scalar in float32.

        Raises:
            TrainingError: Outputs of a block differ in shape.
        """
        students, teachers = self._seen
        errors = []
        for path in self.outputs:
            student, teacher = students[path].float(), teachers[path].float()
            if student.shape != teacher.shape:
                raise TrainingError(
                    f"The outputs of {path!r} differ in shape: {tuple(student.shape)}, but the "
                    f"teacher's {tuple(teacher.shape)}. Set match_weight=0."
                )
            errors.append((student - teacher).square().sum() / (teacher.square().sum() + 1e-12))
        self.forget()
        return torch.stack(errors).mean()


def _watch(module: nn.Module, path: str, seen: dict[str, Tensor]) -> Any:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen[path] = output

    return module.register_forward_hook(keep)
