"""Apply a plan to a model: the only place where a submodule is replaced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn

from pfsurgery.attention import layout_of, projections
from pfsurgery.errors import RecordMismatchError, UnsupportedSiteError
from pfsurgery.modules import get_module, paths_of, set_module
from pfsurgery.ops import get_op
from pfsurgery.ops.bottleneck import fitted_module
from pfsurgery.ops.eff_attention import EffAttention
from pfsurgery.plan import Decision
from pfsurgery.shadow import HOOKS, on_meta
from pfsurgery.sites import CONVOLUTIONS, AttentionGeometry, Convolution, geometry_of
from pfsurgery.weights import applied_weight

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

_HEADS = (
    *("dim", "num_heads", "head_dim", "attn_dim", "window_size", "window_area", "embed_dim"),
    *("num_attention_heads", "batch_first"),
)

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
        old = _module_at(model, decision)
        new = replacement(decision, old)
        _check_shape(decision, new)
        inherit(new, old)
        changes += [(name, new) for name in decision.site.names]
        if decision.tail == "drop":
            for name in decision.site.neighbours.tail:
                old = get_module(model, name)
                dropped = nn.Identity().train(old.training)
                changes += [(path, dropped) for path in paths_of(model, old)]
    undo_list = [(name, get_module(model, name)) for name, _ in changes]
    for name, module in changes:
        set_module(model, name, module)
    return undo_list


def undo(model: nn.Module, replaced: Undo) -> None:
    """Put back what `apply_plan` replaced."""
    for name, module in replaced:
        set_module(model, name, module)


def _module_at(model: nn.Module, decision: Decision) -> nn.Module:
    site = decision.site
    modules = [get_module(model, name) for name in site.names]
    old, attends = modules[0], site.kind == "attention"
    if not (layout_of(old) is not None if attends else isinstance(old, Convolution)):
        raise RecordMismatchError(
            f"{site.name} should be {'an attention' if attends else 'a convolution'} but is a "
            f"{type(old).__name__}; was the model converted already?"
        )
    if any(module is not old for module in modules):
        raise RecordMismatchError(
            f"The plan says that {' and '.join(site.names)} are one module; here they are not."
        )
    if isinstance(site.geometry, AttentionGeometry):
        width, channels = projections(old)[0].shape
        found = f"an attention of {channels} channels with {width} of query, key and value"
        fits = (width, channels) == (site.geometry.width, site.geometry.in_channels)
    else:
        found = str(geometry_of(old))
        fits = geometry_of(old) == site.geometry
    if not fits:
        raise RecordMismatchError(
            f"{site.name} is {found}, but the plan was made for {site.geometry}."
        )
    return old


def replacement(decision: Decision, old: nn.Module) -> nn.Module:
    """What `decision` puts in the place of `old`, a convolution or an attention."""
    if isinstance(old, Convolution):
        return _in_place_of_convolution(decision, old)
    return _in_place_of_attention(decision, old)


def _in_place_of_attention(decision: Decision, old: nn.Module) -> nn.Module:
    made = get_op(decision.op).build(decision.site)
    weight, bias, output = projections(old)
    if not isinstance(made, EffAttention):
        return made.to(weight.device, weight.dtype)
    layout = layout_of(old)
    made.returns_pair = layout is not None and layout.pair
    made.proj_drop = getattr(old, "proj_drop", made.proj_drop)
    made.to(weight.device, weight.dtype).copy_from(weight, bias, output)
    for parameter in made.parameters():
        parameter.requires_grad_(output.weight.requires_grad)
    return made


def _in_place_of_convolution(decision: Decision, conv: Convolution) -> nn.Module:
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
        moved: Convolution = CONVOLUTIONS[geometry.dims](
            conv.in_channels,
            conv.out_channels,
            geometry.kernel_size,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
    weight = applied_weight(conv)
    moved.weight = (
        conv.weight
        if weight is conv.weight
        else nn.Parameter(weight.detach(), requires_grad=conv.weight.requires_grad)
    )
    moved.bias = conv.bias
    return moved


def _pointwise(conv: Convolution) -> Convolution:
    """A 1x1 convolution that does to a constant image what `conv` does: its taps summed."""
    with torch.device("meta"):
        pointwise: Convolution = CONVOLUTIONS[len(conv.kernel_size)](
            conv.in_channels,
            conv.out_channels,
            1,
            groups=conv.groups,
            bias=conv.bias is not None,
        )
    with torch.no_grad():
        pointwise.weight = nn.Parameter(
            applied_weight(conv).sum(dim=tuple(range(2, conv.weight.ndim)), keepdim=True),
            requires_grad=conv.weight.requires_grad,
        )
        if conv.bias is not None:
            pointwise.bias = nn.Parameter(conv.bias.clone(), requires_grad=conv.bias.requires_grad)
    return pointwise


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Take over train flag and hooks, and the geometry, which a model's own code may read."""
    new.train(old.training)
    for name in _GEOMETRY if isinstance(old, Convolution) else _HEADS:
        if not hasattr(new, name) and hasattr(old, name):
            setattr(new, name, getattr(old, name))
    for hooks in (*HOOKS, "_is_full_backward_hook"):
        setattr(new, hooks, getattr(old, hooks))


def _check_shape(decision: Decision, new: nn.Module) -> None:
    site = decision.site
    dtype = next((p.dtype for p in new.parameters() if p.is_floating_point()), None)
    source = torch.empty(site.input_shape, device="meta", dtype=dtype)
    with torch.no_grad():
        made = on_meta(new)(source)
    shape = tuple((made[0] if isinstance(made, tuple) else made).shape)
    if shape != site.output_shape:
        raise UnsupportedSiteError(
            f"{decision.label} at {site.name} gives {shape} where the original gives "
            f"{site.output_shape}. Keep the site, or choose another op."
        )
