"""What can go wrong, as exceptions for people: what was asked, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SurgeryError(Exception):
    """Base of all errors that pfsurgery raises on purpose."""


class UnknownNameError(SurgeryError):
    """An op, policy or model of that name does not exist."""


class NoSitesError(SurgeryError):
    """The model has no spatial convolution."""


class PatternError(SurgeryError):
    """A pattern is malformed or matches no site."""


class PolicyError(SurgeryError):
    """A policy, rule or plan is malformed."""


class UnsupportedSiteError(SurgeryError):
    """An op cannot take the place of the convolution at a site."""


class WrappedModelError(SurgeryError):
    """The model is wrapped by DDP, FSDP or `torch.compile`; surgery works on the inner model."""


class ShapeError(SurgeryError):
    """An input does not fit the model, or a converted model's outputs differ in shape."""


class RecordMismatchError(SurgeryError):
    """A saved directory, record or plan does not fit the model."""


class DataError(SurgeryError):
    """A data set is missing, empty, unreadable or does not fit the model."""


class TrainingError(SurgeryError):
    """Training cannot go on, for instance because the loss is not finite."""


class MissingExtraError(SurgeryError):
    """An optional library is not installed."""


class SurgeryWarning(UserWarning):
    """Base of all warnings that pfsurgery gives."""


class NoEffectWarning(SurgeryWarning):
    """A conversion changed nothing."""


class SlowWarning(SurgeryWarning):
    """What was asked for is slow on this machine."""


def closest(name: str, known: Iterable[str], most: int = 5) -> str:
    """Names in `known` that look like `name`, as the tail of an error message."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=most, cutoff=0.4)
    if found:
        return f"Closest: {', '.join(found)}."
    shown = ", ".join(names[:most])
    return f"There are {len(names)}: {shown}{', ...' if len(names) > most else '.'}"


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around imports of optional libraries: says which extra brings them.

    Args:
        extra: Name of the extra in pyproject.toml.
        what: What needs them, as the beginning of a sentence.

    Raises:
        MissingExtraError: One is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'{what} needs {error.name}, which is not installed: pip install "pfsurgery[{extra}]"'
        ) from None
