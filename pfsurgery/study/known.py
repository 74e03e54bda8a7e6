"""What a search has measured, one JSON line each, so that one that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pfsurgery.recover.choices import Choices, Places
from pfsurgery.recover.logs import cut_log, json_lines, parsed_lines

LINES = "networks.jsonl"


class Known:
    """Measures what is not known yet, and writes it down.

    Args:
        folder: Run folder, where what a killed run left of a line is dropped; None remembers
            nothing beyond this object.

    Raises:
        SurgeryError: A line there is not what this class writes.
    """

    def __init__(self, folder: Path | None) -> None:
        path = None if folder is None else folder / LINES
        self._write = json_lines(path)
        self._values: dict[str, Any] = {}
        if path is not None and path.exists():
            cut_log(path, 0)  # drops what a killed write left of a line
            entries = parsed_lines(path, lambda line: _entry(**line), "a measured network")
            self._values = dict(entries)

    def measured(self, what: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What `measure` gave, now or in an earlier run; both are JSON-ready."""
        key = _key(what)
        if key not in self._values:
            self._values[key] = measure()
            self._write({"what": what, "value": self._values[key]})
        return self._values[key]


def named_options(choices: Choices, places: Places) -> dict[str, str]:
    """The option of each site in words, which stay the same where indices may not."""
    return {name: str(choices.options[name][place]) for name, place in places.items()}


def _entry(what: Mapping[str, Any], value: Any) -> tuple[str, Any]:
    return _key(what), value


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)
