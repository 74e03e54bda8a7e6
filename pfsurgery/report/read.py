"""Reading what a run left, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pfsurgery.errors import SurgeryError

_LONGEST = 150  # characters of another library's message


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turns what goes wrong with a value of `path` into an error that names the file.

    Raises:
        SurgeryError: A value is missing or of the wrong form.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())[:_LONGEST]
        what = f"lacks {said}" if isinstance(error, KeyError) else f"has a wrong value: {said}"
        raise SurgeryError(f"{path} is damaged: it {what}. Do the run again.") from error


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
