"""Run folders: what a study, search or fine-tuning leaves behind, and what made it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from pfsurgery.base import base_of
from pfsurgery.errors import SurgeryError, TrainingError
from pfsurgery.files import write_text

RUN = "run.json"
SETTING = "setting.json"
MODEL_FOLDER = "model"  # in the folder of a fine-tuning
Kind = Literal["finetune", "sensitivity", "search", "layer", "nas", "robustness"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What made a run folder.

    Attributes:
        kind: What was done: it says which other files the folder holds.
        command: The command line that does it again; empty where it was called from Python.
        model: Name of the model that it is about; empty if it has none.
        device: Name of the processor or GPU.
        threads: Threads of torch on the CPU.
        versions: Versions of pfsurgery, torch and timm.
        started: When, as an ISO 8601 time in UTC.
    """

    kind: Kind
    command: str
    model: str
    device: str
    threads: int
    versions: dict[str, str]
    started: str


def note_run(folder: str | Path, kind: Kind, *, model: nn.Module | None = None) -> Origin:
    """Write `run.json` into a run folder, which is made if it is missing.

    Args:
        folder: The run folder.
        kind: What is done.
        model: The model that it is about, if it is about one.

    Raises:
        SurgeryError: It cannot be written.
    """
    import timm

    import pfsurgery
    from pfsurgery.measure.latency import device_name

    run = Origin(
        kind,
        _command(),
        "" if model is None else _name_of(model),
        device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        torch.get_num_threads(),
        {"pfsurgery": pfsurgery.__version__, "torch": torch.__version__, "timm": timm.__version__},
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    write_json(Path(folder) / RUN, asdict(run))
    return run


def read_run(folder: str | Path) -> Origin:
    """What made a run folder.

    Raises:
        SurgeryError: The folder holds no readable `run.json`.
    """
    values = read_json(Path(folder) / RUN)
    known = {field.name for field in fields(Origin)}
    if not isinstance(values, dict) or set(values) != known:
        raise SurgeryError(f"{Path(folder) / RUN} is not what pfsurgery writes into a run folder.")
    if values["kind"] not in get_args(Kind):
        raise SurgeryError(f"{Path(folder) / RUN} is of an unknown kind {values['kind']!r}.")
    return Origin(**values)


def write_json(path: Path, values: Any) -> None:
    """Write values as a JSON file, atomically; its folder is made if it is missing.

    Raises:
        SurgeryError: It cannot be written.
    """
    write_text(path, json.dumps(values, indent=1))


def read_json(path: Path) -> Any:
    """The values of a JSON file.

    Raises:
        SurgeryError: It is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SurgeryError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SurgeryError(f"{path} is not JSON: {error}.") from None


def _name_of(model: nn.Module) -> str:
    base = base_of(model)
    return type(model).__name__ if base is None else base.name


def _command() -> str:
    """The command line of this process, if it is pfsurgery's."""
    program = Path(sys.argv[0])
    module = Path(__file__).parent / "cli" / "__main__.py"  # python -m pfsurgery.cli
    ours = program.name == "pfsurgery" or program.resolve() == module.resolve()
    return shlex.join(["pfsurgery", *sys.argv[1:]]) if ours else ""


def check_same(path: Path, now: Mapping[str, Any], *, free: Collection[str] = ()) -> None:
    """Compare a setting with the one that a run began with, or note it where one begins.

    Args:
        path: File of the setting.
        now: The setting, JSON-ready.
        free: Fields that may change.

    Raises:
        TrainingError: Another field differs; the message names it and both values.
        SurgeryError: The file holds something else.
    """
    then = _read_setting(path) if path.exists() else now
    _refuse_other(path, then, now, [name for name in {**now, **then} if name not in free])
    write_json(path, now)


def refuse_other(path: Path, known: Mapping[str, Any]) -> None:
    """`check_same` for what is known of a setting before the rest is; nothing is written.

    Raises:
        TrainingError: A field differs.
        SurgeryError: The file holds something else.
    """
    if path.exists():
        _refuse_other(path, _read_setting(path), known, known)


def _read_setting(path: Path) -> dict[str, Any]:
    then = read_json(path)
    if not isinstance(then, dict):
        raise SurgeryError(f"{path} holds no setting of a run; choose another folder.")
    return then


def _refuse_other(
    path: Path, then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]
) -> None:
    differing = [
        f"{name} (then {then.get(name)!r}, now {now.get(name)!r})"
        for name in names
        if then.get(name) != now.get(name)
    ]
    if differing:
        raise TrainingError(
            f"{path.parent} holds a run of another setting; different are: "
            f"{', '.join(differing)}. Go on with the same setting, or choose another folder."
        )
