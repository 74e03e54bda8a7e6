"""Reading what a run left, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
