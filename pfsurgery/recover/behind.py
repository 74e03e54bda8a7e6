"""The layer that takes the product of a replaced site: which one it is, and its refit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pfsurgery.attention import layout_of
from pfsurgery.graph import GraphView
from pfsurgery.neighbours import neighbours_of_module
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.plan import Decision
from pfsurgery.recover.refit import Refit, refit_layer
from pfsurgery.rewrite import Composite


def refit_behind(
    student: nn.Module,
    original: nn.Module,
    decision: Decision,
    seen: GraphView,
    batches: Sequence[Tensor],
) -> Refit:
    """Refit, in place, the layer that reads what `decision` put into `student`.

    Args:
        student: The edited network, in eval mode.
        original: The original, in eval mode.
        decision: What stands at the site now.
        seen: The graph view of the original.
        batches: Images (N, C, H, W), one batch each.

    Raises:
        RecordMismatchError: The layer is not in the original.
    """
    name = _layer_behind(student, decision)
    if name is None:
        return Refit(decision.site.name, None, reason=_why_none(decision))
    twin = _twin(original, decision, name)
    around = neighbours_of_module(twin, seen)
    return refit_layer(student, original, decision.site.name, name, twin, around, batches)


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
