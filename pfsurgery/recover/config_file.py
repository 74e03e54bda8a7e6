"""Settings from a YAML file, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pfsurgery.errors import TrainingError, closest
from pfsurgery.files import write_atomically
from pfsurgery.recover.config import FinetuneConfig


def read_config(path: str | Path | None, overrides: Mapping[str, Any]) -> FinetuneConfig:
    """The settings in a YAML file, with some of them overridden.

    Args:
        path: A file of `name: value` lines, or None for the defaults.
        overrides: Settings that go before the file's; those that are None are passed over.

    Raises:
        TrainingError: The file cannot be read, names an unknown setting, or a value is wrong.
    """
    settings = {} if path is None else _read(Path(path))
    settings.update({name: value for name, value in overrides.items() if value is not None})
    return FinetuneConfig(**settings)


def write_config(config: FinetuneConfig, path: Path) -> None:
    """Write all settings as YAML that `read_config` reads.

    Raises:
        TrainingError: `path` cannot be written.
    """
    import yaml

    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror}.") from None


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The settings {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"The settings {path} are not YAML: {reason}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise TrainingError(f"The settings {path} must be lines of name: value.")
    types = get_type_hints(FinetuneConfig)
    for name in content:
        if name not in types:
            raise TrainingError(
                f"{path}: there is no setting {name!r}. {closest(str(name), types)}"
            )
    return {name: _typed(name, value, types[name], path) for name, value in content.items()}


def _typed(name: str, value: Any, wanted: Any, path: Path) -> Any:
    """`value` as the type that a setting has; YAML reads `1e-3` as text and `no` as False."""
    allowed = get_args(wanted) or (wanted,)
    if value is False and bool not in allowed:
        value = "no"
    if float in allowed and not isinstance(value, bool):
        try:
            number = value if value is None else float(value)
            if number is None or not math.isnan(number):
                return number
        except (TypeError, ValueError):
            pass
    plain = tuple(kind for kind in allowed if isinstance(kind, type))
    fits = isinstance(value, plain) and (bool in plain or not isinstance(value, bool))
    if fits or (isinstance(value, str) and value in allowed):
        return value
    raise TrainingError(f"{path}: {name}={value!r} is not of the right kind.")
