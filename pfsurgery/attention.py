"""Find the self-attentions of a model, and what is needed to put something in their place.

A class is known or it is not, as with convolutions: an attention whose class is unknown is a site
that is kept. Whether its tokens form a grid is read from the graph view, from the last feature map
that they were made of.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.graph import GraphView, Pass
from pfsurgery.neighbours import attends
from pfsurgery.sites import AttentionGeometry, Pair, Site, class_name

_MOST_PREFIX = 16  # class, distillation and register tokens; more are tokens of another kind


@dataclass(frozen=True, slots=True)
class Layout:
    """How an attention class is built and called. It reads and returns tokens (N, L, C).

    Attributes:
        qkv: Names of its linear layers for query, key and value: of one for all, or of three.
        proj: Name of its output layer.
        takes: Names of further tensors that it may be given: `mask`, an additive mask (windows, L,
            L) of windowed attention, is respected, others only concern weights that go.
        pair: It returns the tokens and the weights of attention, or None in their place.
    """

    qkv: tuple[str, ...] = ("qkv",)
    proj: str = "proj"
    takes: tuple[str, ...] = ()
    pair: bool = False


_QKV = ("q_proj", "k_proj", "v_proj")  # what timm's classes have where their `qkv` is None
_SEPARATE = Layout(_QKV, "o_proj", pair=True)
_TORCH = "torch.nn.modules.activation.MultiheadAttention"  # its three layers are one parameter
_KNOWN = {
    "timm.layers.attention.Attention": Layout(),
    "timm.layers.attention.AttentionRope": Layout(takes=("rope",)),
    "timm.models.vision_transformer.Attention": Layout(),
    "timm.models.eva.EvaAttention": Layout(takes=("rope",)),
    "timm.models.beit.Attention": Layout(takes=("shared_rel_pos_bias",)),
    "timm.models.vision_transformer_relpos.RelPosAttention": Layout(takes=("shared_rel_pos",)),
    "timm.models.swin_transformer.WindowAttention": Layout(takes=("mask",)),
    "timm.models.swin_transformer_v2.WindowAttention": Layout(takes=("mask",)),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": Layout(takes=("mask",)),
    "timm.models.davit.WindowAttention": Layout(),
    "transformers.models.vit.modeling_vit.ViTAttention": _SEPARATE,
    "transformers.models.deit.modeling_deit.DeiTAttention": _SEPARATE,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": _SEPARATE,
    _TORCH: Layout((), "out_proj", pair=True),
}


def register_attention(
    cls: type[nn.Module], *, qkv: tuple[str, ...] = ("qkv",), proj: str = "proj"
) -> None:
    """Declare that `cls` is a self-attention that may be replaced.

    Args:
        cls: The class. Its first argument are tokens (N, L, C), with class tokens in front, and it
            returns as many.
        qkv: Names of its linear layers for query, key and value: of one for all, or of three.
        proj: Name of its linear output layer.
    """
    _KNOWN[f"{cls.__module__}.{cls.__qualname__}"] = Layout(qkv, proj)


def layout_of(module: nn.Module) -> Layout | None:
    """How the exact class of `module` is built, None where it is not a known attention."""
    return _KNOWN.get(class_name(module))


@torch.no_grad()
def projections(module: nn.Module) -> tuple[Tensor, Tensor | None, nn.Linear]:
    """Weight (3C, C) and bias (3C,) of query, key and value, and the output layer.

    Raises:
        RecordMismatchError: The module is no attention of a known class.
    """
    layout = layout_of(module)
    settings: Any = module
    if layout is None:
        raise RecordMismatchError(
            f"{type(module).__name__} is no attention that can be replaced; was the model "
            f"converted already?"
        )
    if not layout.qkv:
        return settings.in_proj_weight, settings.in_proj_bias, settings.out_proj
    layers = [getattr(module, name) for name in _qkv(module, layout)]
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    if getattr(module, "q_bias", None) is not None:  # Swin v2 and BEiT add them outside the layer
        outside = [settings.q_bias, torch.zeros_like(settings.q_bias), settings.v_bias]
        return weight, torch.cat(outside), getattr(module, layout.proj)
    if all(bias is None for bias in biases):
        return weight, None, getattr(module, layout.proj)
    known = [
        layer.weight.new_zeros(len(layer.weight)) if bias is None else bias
        for layer, bias in zip(layers, biases, strict=True)
    ]
    return weight, torch.cat(known), getattr(module, layout.proj)


def _qkv(module: nn.Module, layout: Layout) -> tuple[str, ...]:
    """Names of the linear layers for query, key and value."""
    missing = any(getattr(module, name) is None for name in layout.qkv)
    return _QKV if missing else layout.qkv


def attention_sites(seen: GraphView) -> list[tuple[int, Site]]:
    """Every self-attention that ran, as a site, with its place in the order of execution."""
    names: dict[int, list[str]] = {}
    for path, module in seen.modules[""].named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    attending = [
        (place, node) for place, node in enumerate(seen.graph.nodes) if attends(node, seen)
    ]
    owners = {str(node.meta["owner"]) for _, node in attending}
    found = []
    for path, passes in seen.passes.items():
        if layout_of(seen.modules[path]) is not None or path in owners:
            aliases = tuple(names[id(seen.modules[path])])
            found.append((passes[0].position, _site(path, aliases, passes, seen)))
    loose = [(place, node) for place, node in attending if not node.meta["owner"]]
    if loose:
        found.append((loose[0][0], _loose_site([node for _, node in loose], seen)))
    return _numbered(sorted(found, key=lambda item: item[0]))


def _loose_site(nodes: list[fx.Node], seen: GraphView) -> Site:
    """A site for attentions in the model's own code, as in a graph; they can only be kept."""
    model, shape = seen.modules[""], nodes[0].meta["in_shape"]
    return Site(
        name="model:attention",
        names=("model:attention",),
        module=class_name(model),
        geometry=AttentionGeometry(shape[-1], shape[-1], (0, 0), width=3 * shape[-1]),
        input_shape=shape,
        output_shape=nodes[0].meta["shape"],
        calls=len(nodes),
        blocked=f"it is in {type(model).__name__}'s own code: there is no module to replace",
    )


def _site(path: str, names: tuple[str, ...], passes: list[Pass], seen: GraphView) -> Site:
    module, first = seen.modules[path], passes[0]
    grid, prefix = _grid(first, seen) or ((0, 0), math.prod(first.in_shape[1:-1]))
    channels = first.in_shape[-1]
    why = _why_blocked(path, passes, seen)
    if why is None and not grid[0]:
        why = (
            f"its {prefix} tokens are not those of one feature map with class tokens in "
            f"front, so they form no grid to pool on"
        )
    return Site(
        name=path,
        names=names,
        module=class_name(module),
        geometry=AttentionGeometry(
            in_channels=channels,
            out_channels=first.out_shape[-1],
            kernel_size=grid,
            width=3 * channels if why else len(projections(module)[0]),
            heads=int(getattr(module, "num_heads", getattr(module, "num_attention_heads", 1))),
            grid=grid,
            prefix=prefix,
            weights=sum(p.numel() for p in module.parameters()),
        ),
        input_shape=first.in_shape,
        output_shape=first.out_shape,
        calls=len(passes),
        positions=sum(math.prod(call.in_shape[:-1]) for call in passes),
        blocked=why,
    )


def _grid(call: Pass, seen: GraphView) -> tuple[Pair, int] | None:
    """Rows and columns of the nearest feature map that the tokens come from, and what is more."""
    if call.source is None or len(call.in_shape) != 3:
        return None
    number, tokens, channels = call.in_shape
    queue, visited = deque([call.source]), {call.source}
    while queue:
        node: fx.Node = queue.popleft()
        shape = node.meta["shape"]
        if len(shape) == 4 and shape[0] == number:
            for rows, columns, width in ((*shape[2:], shape[1]), (*shape[1:3], shape[3])):
                prefix = tokens - rows * columns
                if width == channels and min(rows, columns) > 1 and 0 <= prefix <= _MOST_PREFIX:
                    return (rows, columns), prefix
        for source in node.all_input_nodes:
            if source not in visited:
                visited.add(source)
                queue.append(source)
    return None


def _why_blocked(path: str, passes: list[Pass], seen: GraphView) -> str | None:
    module, layout, first = seen.modules[path], layout_of(seen.modules[path]), passes[0]
    if layout is None:
        return (
            f"{class_name(module)} is an attention that may do more than attend among tokens; "
            f"declare it with pfsurgery.register_attention if it does not"
        )
    if layout.qkv == () and (why := _why_torch(module)):
        return why
    for name in (*_qkv(module, layout), layout.proj):
        layer = getattr(module, name)
        if not isinstance(layer, nn.Linear) or type(layer).__module__ != nn.Linear.__module__:
            return f"its {name} is a {class_name(layer)} in place of a linear layer"
    if any(hasattr(inner, "parametrizations") for inner in module.modules()):
        return "a weight of it is parametrised; remove the parametrisation before converting"
    weight, _, output = projections(module)
    if len(weight) != 3 * output.in_features:
        return f"it has {len(weight)} channels of query, key and value for {output.in_features}"
    if len(first.in_shape) != 3 or first.out_shape != first.in_shape:
        return f"it makes {first.out_shape} of {first.in_shape}, not tokens of tokens (N, L, C)"
    if any((call.in_shape, call.out_shape) != (first.in_shape, first.out_shape) for call in passes):
        return "it is called with different numbers of tokens"
    further = {name for call in passes for name in call.others} - set(layout.takes)
    if further:
        return f"it attends to, or is masked by, further tensors: {', '.join(sorted(further))}"
    own = {id(parameter) for parameter in module.parameters()}
    inside = set(module.modules())
    for other, outer in seen.modules.items():
        shared = any(id(parameter) in own for parameter in outer._parameters.values())
        if shared and outer not in inside:
            return f"a weight of it is shared with {other}"
    return None


def _why_torch(module: nn.Module) -> str | None:
    settings: Any = module
    if not settings.batch_first:
        return "its tokens come first and its batch second: it needs batch_first=True"
    if settings.in_proj_weight is None or settings.bias_k is not None or settings.add_zero_attn:
        return "it has keys of another width, or further keys"
    return None


def _numbered(found: list[tuple[int, Site]]) -> list[tuple[int, Site]]:
    """Fill in stage and depth of each site, and which of its stage it is."""
    numbered: list[tuple[int, Site]] = []
    stage = block = 0
    for rank, (position, site) in enumerate(found):
        if rank and site.geometry.in_channels != found[rank - 1][1].geometry.in_channels:
            stage, block = stage + 1, 0
        geometry: Any = replace(site.geometry, block=block)  # type: ignore[call-arg]
        depth = round(rank / len(found), 4)
        numbered.append((position, replace(site, geometry=geometry, stage=stage, depth=depth)))
        block += 1
    return numbered
