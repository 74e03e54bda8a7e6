"""A run that is continued must be the same run: its setting, and the model that it is about."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pfsurgery.digests import tensor_bytes
from pfsurgery.errors import TrainingError
from pfsurgery.run_folder import read_json, write_json

SETTING = "setting.json"


def check_same(path: Path, now: Mapping[str, Any], *, free: Collection[str] = ()) -> None:
    """Compare a setting with the one that a run began with, or note it where one begins.

    Args:
        path: File of the setting.
        now: The setting, JSON-ready.
        free: Fields that may change.

    Raises:
        TrainingError: Another field differs; the message names it and both values.
    """
    then = read_json(path) if path.exists() else now
    differing = [
        f"{name} (then {then.get(name)!r}, now {now.get(name)!r})"
        for name in dict.fromkeys((*now, *then))
        if then.get(name) != now.get(name) and name not in free
    ]
    if differing:
        raise TrainingError(
            f"{path.parent} holds a study of another setting; different are: "
            f"{', '.join(differing)}. Go on with the same setting, or choose another folder."
        )
    write_json(path, now)


def digest(model: nn.Module) -> str:
    """Of structure and weights, in 16 hexadecimal digits."""
    found = hashlib.sha256(str(model).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(tensor_bytes(value))
    return found.hexdigest()[:16]


def digest_of_images(batches: Iterable[Tensor]) -> str:
    """Of images (N, C, H, W), one batch each, in 16 hexadecimal digits."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(tensor_bytes(batch))
    return found.hexdigest()[:16]
