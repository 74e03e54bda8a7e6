"""Checkpoints of a run: all that it takes to go on as if nothing had happened.

Order, augmentation and dropout draw from seeds that are functions of the step (see
`pfsurgery.recover.order`), and the learning rate is one too, so that neither random states nor the
schedule have a state of their own to be stored.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pfsurgery.errors import TrainingError
from pfsurgery.files import remove_remains, write_atomically
from pfsurgery.recover.config import EpochRecord, FinetuneConfig
from pfsurgery.recover.evaluate import Accuracy
from pfsurgery.recover.logs import LOG, read_lines

FOLDER = "checkpoints"
_FORMAT = 1
_NAME = re.compile(r"step-(\d+)-of-(\d+)\.pt")


@dataclass(slots=True)
class Position:
    """Where a run is.

    Attributes:
        step: Optimiser steps taken.
        epoch: The current epoch, from 1.
        batch: Batches of it that were used.
        loss_sum: Of its steps.
        losses: How many those are.
        lr: Learning rate of the last step.
        lr_factor: Of the planned learning rate; halved by each roll-back.
        roll_backs: How many there were.
        lowest: Lowest loss of a line of the log.
        history: Of the epochs that ended.
        best: Highest accuracy of these.
        teacher: Accuracy of the teacher.
        seconds: Wall-clock time up to the checkpoint, without what was lost by an interruption.
    """

    step: int = 0
    epoch: int = 1
    batch: int = 0
    loss_sum: float = 0.0
    losses: int = 0
    lr: float = 0.0
    lr_factor: float = 1.0
    roll_backs: int = 0
    lowest: float | None = None
    history: list[EpochRecord] = field(default_factory=list)
    best: Accuracy | None = None
    teacher: Accuracy | None = None
    seconds: float = 0.0

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.batch, self.loss_sum, self.losses = self.epoch + 1, 0, 0.0, 0

    def to_dict(self) -> dict[str, Any]:
        """The position as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Position:
        """The position that `to_dict` wrote."""
        history = [
            EpochRecord(**{**entry, "val": _accuracy(entry["val"])}) for entry in values["history"]
        ]
        accuracies = {name: _accuracy(values[name]) for name in ("best", "teacher")}
        return cls(**{**values, "history": history, **accuracies})


def _accuracy(values: Mapping[str, Any] | None) -> Accuracy | None:
    return None if values is None else Accuracy(**values)


def write_snapshot(folder: Path, content: Mapping[str, Any], *, step: int, total: int) -> Path:
    """Write a checkpoint; `content` holds tensors and plain values only.

    Raises:
        TrainingError: It cannot be written; earlier checkpoints are intact.
    """
    path = folder / FOLDER / f"step-{step:08d}-of-{total:08d}.pt"
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **content}, buffer)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        earlier = newest(folder)
        kept = f"the earlier checkpoint {earlier} is intact" if earlier else "there is none yet"
        raise TrainingError(
            f"The checkpoint {path} could not be written: {error.strerror or error}; {kept}. "
            f"Make room, then continue with --resume (resume=True in Python)."
        ) from None
    return path


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what is left of killed writes."""
    remove_remains(folder / FOLDER, "step-*")
    for path in _all(folder)[:-keep]:
        path.unlink(missing_ok=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in the run's folder."""
    found = _all(folder)
    return found[-1] if found else None


def unfinished(folder: Path) -> bool:
    """Whether the newest checkpoint is before the last step, or the log does not say it ended."""
    path = newest(folder)
    match = _NAME.fullmatch(path.name) if path else None
    if match is None:
        return False
    log = folder / LOG
    last = read_lines(log)[-1:] if log.exists() else []
    return int(match[1]) < int(match[2]) or not any(record.get("kind") == "end" for record in last)


def remove_all(folder: Path) -> None:
    """Remove the checkpoints of an earlier run."""
    for path in _all(folder):
        path.unlink(missing_ok=True)


def read_snapshot(path: Path) -> dict[str, Any]:
    """What `write_snapshot` wrote, on the CPU. Runs no code from the file.

    Raises:
        TrainingError: It cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        form = content["format"]
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"The checkpoint {path} cannot be read: {reason}. Remove it to go on from the one "
            f"before it."
        ) from None
    if form != _FORMAT:
        raise TrainingError(f"{path} has format {form!r}; this version reads {_FORMAT}.")
    return content


def check_same(config: FinetuneConfig, processes: int, saved: Mapping[str, Any]) -> None:
    """A run is continued with the settings that it began with.

    Raises:
        TrainingError: Some differ; the message names each.
    """
    now = {**asdict(config), "number of processes": processes}
    then = {**saved["config"], "number of processes": saved["processes"]}
    names = [f.name for f in fields(config)] + ["number of processes"]
    differing = [
        f"{name} (then {then.get(name)!r}, now {now[name]!r})"
        for name in names
        if name not in then or then[name] != now[name]
    ]
    if differing:
        raise TrainingError(
            f"The run cannot be continued with other settings than it began with: "
            f"{', '.join(differing)}. Give the same, or start anew in another folder."
        )


def _all(folder: Path) -> list[Path]:
    found = [path for path in (folder / FOLDER).glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))
