"""The logs of a run: JSON lines of everything, a table of the epochs, TensorBoard, trackers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pfsurgery.errors import SurgeryError, TrainingError, UnknownNameError, closest
from pfsurgery.files import write_atomically
from pfsurgery.recover.config import EpochRecord, FinetuneConfig

LOG = "log.jsonl"
EPOCHS = "epochs.csv"
BOARD = "tensorboard"

Parsed = TypeVar("Parsed")


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
        SurgeryError: A line holds something else than a record.
        TrainingError: The log cannot be written.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        with suppress(json.JSONDecodeError):
            if _record(path, number, line).get("step", 0) <= step:
                kept.append(line + "\n")
    try:
        write_atomically(path, "".join(kept).encode())
    except OSError as error:
        raise TrainingError(f"Could not write to the log {path}: {error}.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; what a killed run left of its last line is passed over.

    Raises:
        SurgeryError: It is missing, or another line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SurgeryError(f"{path} cannot be read: {error}.") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_record(path, number, line))
        except ValueError as error:
            if number < len(lines):
                raise SurgeryError(f"{path}, line {number}, is not JSON: {error}.") from None
    return records


def parsed_lines(path: Path, parse: Callable[[dict[str, Any]], Parsed], what: str) -> list[Parsed]:
    """What `parse` makes of each record of `read_lines`; nothing where the file is not there yet.

    Raises:
        SurgeryError: It cannot be read, or a record is not `what`.
    """
    parsed = []
    for number, record in enumerate(read_lines(path) if path.exists() else (), 1):
        try:
            parsed.append(parse(record))
        except (KeyError, TypeError, ValueError):
            raise SurgeryError(f"{path}, line {number}, is not {what}; remove the line.") from None
    return parsed


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise SurgeryError(f"{path}, line {number}, is no record; remove the line: {line:.40}")
    return record


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


@contextmanager
def board(folder: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows records of the log in TensorBoard, or does nothing without it.

    Args:
        folder: Where its events go.
        step: The step from which a run is continued; later events of the earlier one are hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda record: None
        return
    writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(record: dict[str, Any]) -> None:
        for name, value in _scalars(record).items():
            writer.add_scalar(name, value, record["step"])
        if record["kind"] == "epoch":
            writer.flush()

    try:
        yield write
    finally:
        writer.close()


def check_tracker(config: FinetuneConfig) -> None:
    """Raise an error where Accelerate has no tracker of that name, or it is not installed."""
    name = config.tracker
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise UnknownNameError(
            f"Accelerate has no tracker {name!r}. {closest(name, list(LOGGER_TYPE_TO_CLASS))}"
        )
    if name not in map(str, get_available_trackers()):
        raise TrainingError(f"The tracker {name} is not installed: pip install {name}")


def tracker(accelerator: Any, config: FinetuneConfig) -> Callable[[dict[str, Any]], None]:
    """A function that tells records of the log to the tracker that `accelerator` was made with."""
    if config.tracker is None:
        return lambda record: None
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    accelerator.init_trackers("pfsurgery", config=settings)  # not every tracker takes None

    def write(record: dict[str, Any]) -> None:
        scalars = _scalars(record)
        if scalars:
            accelerator.log(scalars, step=record["step"])

    return write


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    if record["kind"] == "step":
        return {f"train/{name}": record[name] for name in ("loss", "lr", "images_per_s")}
    if record["kind"] == "epoch" and record["val"] is not None:
        return {f"val/{name}": record["val"][name] for name in ("top1", "top5", "loss")}
    return {}
