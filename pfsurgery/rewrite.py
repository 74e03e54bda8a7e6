"""Apply a plan to a model: the only place where a submodule is replaced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pfsurgery.errors import RecordMismatchError, UnsupportedSiteError
from pfsurgery.modules import get_module, set_module
from pfsurgery.ops import get_op
from pfsurgery.ops.bottleneck import fitted_module
from pfsurgery.plan import Decision
from pfsurgery.sites import Convolution, geometry_of

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)

_CLASSES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

Undo = list[tuple[str, nn.Module]]


class Composite(nn.Sequential):
    """An op with what stands around it: `op`, then `pointwise` or `conv`."""


def apply_plan(model: nn.Module, decisions: Iterable[Decision]) -> Undo:
    """Replace what `decisions` say, in `model` itself.

    Everything is built and checked first, so that a plan which does not fit changes nothing.

    Returns:
        The modules that were replaced, by path; `undo` puts them back.

    Raises:
        RecordMismatchError: The plan is of another model.
        UnsupportedSiteError: A built module does not give the site's output shape.
    """
    changes: list[tuple[str, nn.Module]] = []
    for decision in decisions:
        if not decision.replaced:
            continue
        conv = _convolution_at(model, decision)
        replacement = _build(decision, conv)
        _check_shape(decision, replacement)
        _inherit(replacement, conv)
        changes += [(name, replacement) for name in decision.site.names]
        if decision.tail == "drop":
            for name in decision.site.neighbours.tail:
                old = get_module(model, name)
                dropped = nn.Identity().train(old.training)
                changes += [(path, dropped) for path in _paths_of(model, old)]
    undo_list = [(name, get_module(model, name)) for name, _ in changes]
    for name, module in changes:
        set_module(model, name, module)
    return undo_list


def undo(model: nn.Module, replaced: Undo) -> None:
    """Put back what `apply_plan` replaced."""
    for name, module in replaced:
        set_module(model, name, module)


def _paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules(remove_duplicate=False) if m is module]


def _convolution_at(model: nn.Module, decision: Decision) -> Convolution:
    site = decision.site
    modules = [get_module(model, name) for name in site.names]
    conv = modules[0]
    if not isinstance(conv, Convolution):
        raise RecordMismatchError(
            f"{site.name} should be a convolution but is a {type(conv).__name__}; "
            f"was the model converted already?"
        )
    if any(module is not conv for module in modules):
        raise RecordMismatchError(
            f"The plan says that {' and '.join(site.names)} are one module; here they are not."
        )
    if geometry_of(conv) != site.geometry:
        raise RecordMismatchError(
            f"{site.name} is {geometry_of(conv)}, but the plan was made for {site.geometry}."
        )
    return conv


def _build(decision: Decision, conv: Convolution) -> nn.Module:
    if decision.structure is not None:
        fitted = fitted_module(decision.site.geometry, decision.structure)
        return fitted.to(conv.weight.device, conv.weight.dtype)
    op = get_op(decision.op)
    module = op.build(decision.site).to(conv.weight.device)
    if op.keeps_convolution:
        return Composite(OrderedDict(op=module, conv=_at_stride_one(conv)))
    if decision.pointwise:
        return Composite(OrderedDict(op=module, pointwise=_pointwise(conv)))
    return module


def _at_stride_one(conv: Convolution) -> Convolution:
    geometry = geometry_of(conv)
    with torch.device("meta"):
        moved: Convolution = _CLASSES[geometry.dims](
            conv.in_channels,
            conv.out_channels,
            geometry.kernel_size,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
    moved.weight = conv.weight
    moved.bias = conv.bias
    return moved


def _pointwise(conv: Convolution) -> Convolution:
    """A 1x1 convolution that does to a constant image what `conv` does: its taps summed."""
    with torch.device("meta"):
        pointwise: Convolution = _CLASSES[len(conv.kernel_size)](
            conv.in_channels,
            conv.out_channels,
            1,
            groups=conv.groups,
            bias=conv.bias is not None,
        )
    with torch.no_grad():
        pointwise.weight = nn.Parameter(
            conv.weight.sum(dim=tuple(range(2, conv.weight.ndim)), keepdim=True),
            requires_grad=conv.weight.requires_grad,
        )
        if conv.bias is not None:
            pointwise.bias = nn.Parameter(conv.bias.clone(), requires_grad=conv.bias.requires_grad)
    return pointwise


def _inherit(replacement: nn.Module, conv: Convolution) -> None:
    """Take over train flag and hooks, and the geometry, which a model's own code may read."""
    replacement.train(conv.training)
    for name in _GEOMETRY:
        if not hasattr(replacement, name):
            setattr(replacement, name, getattr(conv, name))
    for hooks in _HOOKS:
        setattr(replacement, hooks, getattr(conv, hooks))


def _check_shape(decision: Decision, replacement: nn.Module) -> None:
    site = decision.site
    source = torch.empty(site.input_shape, device="meta")
    with torch.no_grad():
        made = _on_meta(replacement)(source).shape
    if tuple(made) != site.output_shape:
        raise UnsupportedSiteError(
            f"{decision.label} at {site.name} gives {tuple(made)} where the convolution gives "
            f"{site.output_shape}. Keep the site, or choose another op."
        )


def _on_meta(module: nn.Module) -> nn.Module:
    from pfsurgery.graph import shadow_of

    return shadow_of(module, lambda tensor: torch.empty_like(tensor, device="meta"))
