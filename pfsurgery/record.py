"""What was done to a model, kept on the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.plan import Decision, Plan

_ATTRIBUTE = "_pfsurgery_record"


@dataclass(frozen=True, slots=True)
class Record:
    """The conversions of one model.

    Attributes:
        plans: The plans that were carried out, first to last.
    """

    plans: tuple[Plan, ...]

    @property
    def replaced(self) -> tuple[Decision, ...]:
        """What all plans replaced."""
        return tuple(decision for plan in self.plans for decision in plan.replaced)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values; sites that were kept are left out."""
        plans = []
        for plan in self.plans:
            plans.append(Plan(plan.policy, plan.replaced).to_dict())
        return {"plans": plans}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """The record that `to_dict` wrote."""
        return cls(tuple(Plan.from_dict(plan) for plan in values["plans"]))


def record(model: nn.Module) -> Record:
    """What was done to `model`.

    Raises:
        RecordMismatchError: It was not converted by pfsurgery.
    """
    found = _read(model)
    if found is None:
        raise RecordMismatchError(
            f"{type(model).__name__} carries no record: it was not made by pfsurgery.convert, "
            f"or is a copy that pfsurgery.optimize made for inference (save the model before)."
        )
    return found


def has_record(model: nn.Module) -> bool:
    """Whether `model` itself was converted."""
    return _read(model) is not None


def remember(model: nn.Module, plan: Plan) -> None:
    """Add `plan` to the record on `model`."""
    before = _read(model)
    now = Record((*(before.plans if before else ()), plan))
    model.__dict__[_ATTRIBUTE] = now
    if isinstance(model, fx.GraphModule):
        model.meta[_ATTRIBUTE] = now  # a GraphModule's deep copy keeps its meta alone


def remember_instead(model: nn.Module, plans: Iterable[Plan]) -> None:
    """Make `plans` the record on `model`, in place of what is there."""
    forget(model)
    for plan in plans:
        remember(model, plan)


def forget(model: nn.Module) -> None:
    """Take the record off `model`."""
    model.__dict__.pop(_ATTRIBUTE, None)
    getattr(model, "meta", {}).pop(_ATTRIBUTE, None)


def _read(model: nn.Module) -> Record | None:
    found = model.__dict__.get(_ATTRIBUTE) or getattr(model, "meta", {}).get(_ATTRIBUTE)
    return found if isinstance(found, Record) else None
