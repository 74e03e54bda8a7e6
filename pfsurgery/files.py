"""Files that are at all times the old or the new one, whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from pfsurgery.errors import SurgeryError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash, a kill or a full disk leaves either the old or the new one.

    The content goes to a temporary file next to `path`, is flushed to the disk, and takes the place
    of the old file in one step; the folder is flushed too, so that a power failure cannot undo it.

    Raises:
        OSError: It cannot be written; what stood at `path` before is intact.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """`write_atomically` for files of one folder that belong together.

    All are on the disk before the first takes its place, so that nothing but a kill between two
    renames can leave an old one beside a new one.

    Raises:
        OSError: One cannot be written; what stood there before is intact.
    """
    ready: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            # tempfile would make it readable for its owner alone, whatever the umask says.
            ready[path] = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            with ready[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, written in ready.items():
            written.replace(path)
    except BaseException:
        for written in ready.values():
            written.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in contents}:
        _flush_folder(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file in this way, in a folder that is made if it is missing.

    Raises:
        SurgeryError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise SurgeryError(f"{path} cannot be written: {error.strerror}.") from None


def remove_remains(folder: Path, pattern: str) -> None:
    """Remove temporary files of writes of `pattern` that were killed."""
    for remains in folder.glob(f".{pattern}.*"):
        remains.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse it
        pass
    finally:
        os.close(handle)
