"""The logs of a run: JSON lines of everything, a table of the epochs, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pfsurgery.errors import SurgeryError, TrainingError
from pfsurgery.files import write_atomically
from pfsurgery.recover.config import EpochRecord

LOG = "log.jsonl"
EPOCHS = "epochs.csv"
BOARD = "tensorboard"


def json_lines(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that appends a record as one JSON line to the file `path`, or does nothing.

    Raises:
        TrainingError: (the returned function) The line cannot be written.
    """

    def write(record: dict[str, Any]) -> None:
        if path is None:
            return
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(f"Could not write to the log {path}: {error}.") from error

    return write


def cut_log(path: Path, step: int) -> None:
    """Remove the records of steps after `step`, which a continued run writes again.

    What a killed write left of a line goes too.

    Raises:
        TrainingError: The log cannot be written.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record.get("step", 0) <= step:
                kept.append(line + "\n")
    try:
        write_atomically(path, "".join(kept).encode())
    except OSError as error:
        raise TrainingError(f"Could not write to the log {path}: {error}.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; what a killed run left of its last line is passed over.

    Raises:
        SurgeryError: It is missing, or another line is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SurgeryError(f"{path} cannot be read: {error}.") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise SurgeryError(f"{path}, line {number}, is not JSON: {error}.") from None
    return records


def write_epochs(path: Path, history: Iterable[EpochRecord]) -> None:
    """Write one row an epoch as CSV: epoch, step, loss, lr, images_per_s, top1, top5, val_loss.

    Raises:
        TrainingError: `path` cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("epoch", "step", "loss", "lr", "images_per_s", "top1", "top5", "val_loss"))
    for entry in history:
        val = (
            ("", "", "") if entry.val is None else (entry.val.top1, entry.val.top5, entry.val.loss)
        )
        table.writerow(
            (entry.epoch, entry.step, entry.loss, entry.lr, round(entry.images_per_s, 1), *val)
        )
    try:
        write_atomically(path, text.getvalue().encode())
    except OSError as error:
        raise TrainingError(f"Could not write {path}: {error}.") from error


def board(folder: Path | None, step: int) -> Callable[[dict[str, Any]], None]:
    """A function that shows records of the log in TensorBoard, or does nothing without it.

    Args:
        folder: Where its events go; None for none.
        step: The step from which a run is continued; later events of the earlier one are hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda record: None
    if folder is None:
        return lambda record: None
    writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            for name in ("loss", "lr", "images_per_s"):
                writer.add_scalar(f"train/{name}", record[name], record["step"])
        elif record["kind"] == "epoch" and record["val"] is not None:
            for name in ("top1", "top5", "loss"):
                writer.add_scalar(f"val/{name}", record["val"][name], record["step"])
            writer.flush()
        elif record["kind"] == "end":
            writer.close()

    return write
