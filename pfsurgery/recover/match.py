"""Matching what the teacher gives at chosen places: its blocks, its stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import TrainingError
from pfsurgery.recover.blocks import changed_blocks


class Match:
    """How far the student's outputs at some places are from the teacher's: normalised errors.

    For outputs s and t of one module, `sum((s - t)**2) / sum(t**2)` over the batch; the loss is the
    mean over all places. It is 0 where they agree and 1 where the student gives zeros.

    Args:
        student: A converted model.
        teacher: The model as it was before.
        outputs: Paths of the modules whose outputs are to match.
        setting: What asked for it, for errors.

    Raises:
        TrainingError: The teacher lacks one of the modules.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, outputs: Sequence[str], setting: str
    ) -> None:
        self.student, self.teacher, self.outputs = student, teacher, outputs
        self.setting = setting
        paths = {path for path, _ in teacher.named_modules()}
        for path in self.outputs:
            if path not in paths:
                raise TrainingError(
                    f"{setting} is set, but the teacher has no module {path!r}. Give the model as "
                    f"it was before the conversion, or {setting}=0."
                )
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    @contextmanager
    def watching(self) -> Iterator[Match]:
        """While inside, forward passes of both models are seen."""
        handles = []
        try:
            for model, seen in zip((self.student, self.teacher), self._seen, strict=True):
                for path in self.outputs:
                    handles.append(self._watch(model.get_submodule(path), path, seen))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forget(self) -> None:
        """Let go of what was seen."""
        for seen in self._seen:
            seen.clear()

    def _watch(self, module: nn.Module, path: str, seen: dict[str, Tensor]) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TrainingError(
                    f"{path!r} gives a {type(output).__name__}, not a tensor that could be "
                    f"matched. Set {self.setting}=0."
                )
            seen[path] = output

        return module.register_forward_hook(keep)

    def loss(self) -> Tensor:
        """The mean over the places, of the last forward passes; a scalar in float32.

        Raises:
            TrainingError: Outputs differ in shape.
        """
        students, teachers = self._seen
        errors = []
        for path in self.outputs:
            student, teacher = students[path].float(), teachers[path].float()
            if student.shape != teacher.shape:
                raise TrainingError(
                    f"The outputs of {path!r} differ in shape: {tuple(student.shape)}, but the "
                    f"teacher's {tuple(teacher.shape)}. Set {self.setting}=0."
                )
            errors.append((student - teacher).square().sum() / (teacher.square().sum() + 1e-12))
        self.forget()
        return torch.stack(errors).mean()


def match_blocks(student: nn.Module, teacher: nn.Module) -> Match:
    """Matches the blocks in which sites were replaced.

    Raises:
        TrainingError: The student has none, or the teacher lacks one of them.
    """
    outputs = [block.output for block in changed_blocks(student)]
    if not outputs:
        raise TrainingError(
            "match_weight is set, but the model has no replaced site to match. Give a model "
            "that pfsurgery.convert made, or match_weight=0."
        )
    return Match(student, teacher, outputs, "match_weight")


def match_stages(student: nn.Module, teacher: nn.Module) -> Match:
    """Matches the ends of the stages, as timm's models name them.

    Raises:
        TrainingError: The student names none, or the teacher lacks one of them.
    """
    info = getattr(student, "feature_info", None)
    named = [entry["module"] for entry in getattr(info, "info", info) or ()]
    paths = {path for path, _ in student.named_modules()}
    outputs = [path for path in dict.fromkeys(named) if path and path in paths]
    if not outputs:
        raise TrainingError(
            f"stage_weight is set, but {type(student).__name__} does not name its stages as timm's "
            f"models do, in feature_info. Use match_weight, or stage_weight=0."
        )
    return Match(student, teacher, outputs, "stage_weight")
