"""Converted models on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from pfsurgery.card import CARD
from pfsurgery.checkpoint import CONFIG, HUB, WEIGHTS
from pfsurgery.errors import RecordMismatchError, SurgeryError
from pfsurgery.files import write_atomically

_FILES = (CONFIG, WEIGHTS, CARD)


def push(
    directory: str | Path,
    name: str,
    *,
    private: bool = False,
    message: str = "Upload converted model",
    cache: str | Path | None = None,
) -> str:
    """Upload a saved model, so that `pfsurgery.load("hf-hub:USER/NAME")` loads it.

    The token is the one that `hf auth login` stored, or `HF_TOKEN`.

    Args:
        directory: What `pfsurgery.save` wrote; a `README.md` in it goes along.
        name: `USER/NAME`, with or without `hf-hub:` before it. Made if it is missing.
        private: Whether only its owner sees a repository that is made.
        message: Of the commit.
        cache: Write to this local cache of the hub in place of the hub. Whoever points
            `HF_HUB_CACHE` to it can load the model by its name, without a connection.

    Returns:
        Where it is now.

    Raises:
        RecordMismatchError: `directory` holds no saved model.
        SurgeryError: The name is malformed, the hub refuses or cannot be reached, or the cache
            cannot be written.
    """
    folder, name = Path(directory), name.removeprefix(HUB)
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            raise RecordMismatchError(
                f"{folder} has no {needed}. Give a folder that pfsurgery.save wrote."
            )
    _check_name(name)
    if cache is not None:
        return str(_into_cache(folder, name, Path(cache)))
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=list(_FILES),
            commit_message=message,
        )
    except Exception as error:  # of the hub, of its client's transport, of the system
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SurgeryError(
            f"The hub did not take {name}: {reason} Log in with hf auth login, and check the "
            f"connection."
        ) from None
    return f"https://huggingface.co/{name}"


def _check_name(name: str) -> None:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise SurgeryError(f"{name!r} is no name of a model on the hub: give USER/NAME.")


def _into_cache(folder: Path, name: str, cache: Path) -> Path:
    """Lay the files out as the hub's own client does after a download."""
    found = [folder / file for file in _FILES if (folder / file).is_file()]
    commit = hashlib.sha1(b"".join(path.read_bytes() for path in found)).hexdigest()
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    try:
        snapshot.mkdir(parents=True, exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        for path in found:
            shutil.copyfile(path, snapshot / path.name)
        write_atomically(root / "refs" / "main", commit.encode())
    except OSError as error:
        raise SurgeryError(f"The cache {cache} cannot be written: {error.strerror}.") from None
    return snapshot
