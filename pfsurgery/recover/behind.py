"""The layers that take the product of replaced sites: which ones they are, and their refit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from pfsurgery.attention import layout_of
from pfsurgery.graph import GraphView
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.plan import Decision
from pfsurgery.recover.front import Front
from pfsurgery.recover.refit import LayerAim, Refit, layer_aim, original_rows, refit_layer
from pfsurgery.rewrite import Composite


def aim_behind(
    student: nn.Module, original: nn.Module, decision: Decision, seen: GraphView
) -> LayerAim | Refit:
    """What the layer that reads a replaced site should give; a `Refit` with a reason without one.

    Args:
        student: The edited network.
        original: The original.
        decision: What stands at the site now.
        seen: The graph view of the original.

    Raises:
        RecordMismatchError: The layer is not in the original.
    """
    name = _layer_behind(student, decision)
    if name is None:
        return Refit(decision.site.name, None, reason=_why_none(decision))
    twin = _twin(original, decision, name)
    own = isinstance(student.get_submodule(decision.site.name), Composite)
    dropped = decision.site.neighbours.tail if own and decision.tail == "drop" else ()
    return layer_aim(student, original, decision.site.name, name, twin, seen, dropped)


def refit_behind(
    front: Front, original: nn.Module, aims: Sequence[LayerAim | Refit]
) -> Iterator[Refit]:
    """Refit, in place and one by one, the layers that read what was replaced.

    Args:
        front: The edited network, and the images.
        original: The original, in eval mode.
        aims: From `aim_behind`, in the order of execution.
    """
    rows = original_rows(original, fitted_aims(aims), front.batches)
    for aim in aims:
        started = time.perf_counter()
        if isinstance(aim, LayerAim):
            aim = refit_layer(front, original, aim, next(rows))
        yield replace(aim, seconds=time.perf_counter() - started)


def fitted_aims(aims: Sequence[LayerAim | Refit]) -> list[LayerAim]:
    """Those that have a layer to refit."""
    return [aim for aim in aims if isinstance(aim, LayerAim)]


def _twin(original: nn.Module, decision: Decision, name: str) -> str:
    """Path of the layer of the original whose outputs the layer `name` should give."""
    layout = layout_of(original.get_submodule(decision.site.name))
    return (
        name.removesuffix(".pointwise") if layout is None else f"{decision.site.name}.{layout.proj}"
    )


def _why_none(decision: Decision) -> str:
    if decision.site.kind != "attention":
        return "no pointwise layer reads this site"
    if decision.site.calls > 1:
        return "it is called more than once"
    return "the original never calls its output layer as a module"


def _layer_behind(student: nn.Module, decision: Decision) -> str | None:
    site = decision.site
    if site.kind == "attention":
        called = site.calls == 1 and not site.module.endswith("MultiheadAttention")
        return f"{site.name}.proj" if called else None
    module = student.get_submodule(site.name)
    if isinstance(module, Composite) and decision.pointwise:
        return f"{site.name}.pointwise" if site.geometry.groups == 1 else None
    after = site.neighbours.pointwise_after if site.calls == 1 else None
    fitted = after is not None and isinstance(student.get_submodule(after), Bottleneck)
    return None if fitted else after
