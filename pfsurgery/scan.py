"""Find the sites of a model: spatial convolutions and self-attentions, with what is around them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from math import prod

from torch import fx, nn
from torch.nn.parameter import is_lazy

from pfsurgery.attention import attention_sites
from pfsurgery.errors import NoSitesError, ShapeError, SurgeryError, WrappedModelError
from pfsurgery.example import Example, example_inputs, images_in
from pfsurgery.graph import GraphView, Orphan, view
from pfsurgery.modularise import modularise
from pfsurgery.neighbours import feeds_output, neighbours_of, reads_input
from pfsurgery.sites import (
    Convolution,
    Geometry,
    Site,
    class_name,
    convolves,
    geometry_of,
    is_known_convolution,
    is_quantised,
)

_CONDITIONAL = "timm.layers.cond_conv2d.CondConv2d"
_WRAPPERS = {
    "DistributedDataParallel": "Convert the inner model, `model.module`, and wrap it again.",
    "DataParallel": "Convert the inner model, `model.module`, and wrap it again.",
    "FullyShardedDataParallel": "Convert the model before it is sharded.",
    "FSDPModule": "Convert the model before it is sharded.",
    "OptimizedModule": "Convert the inner model, `model._orig_mod`, and compile it again.",
}


def scan(
    model: nn.Module,
    example: Example | None = None,
    *,
    pointwise: bool = False,
    attention: bool = False,
) -> tuple[Site, ...]:
    """Find every spatial convolution of `model`, and more if asked, in the order of execution.

    The model itself is neither run nor changed: a shadow of it, without weights, runs once.

    Args:
        model: Any `nn.Module`, or a `torch.fx.GraphModule`.
        example: A tensor (N, C, H, W) or a tuple of arguments; see `example_inputs`.
        pointwise: Find the ungrouped 1x1 convolutions too.
        attention: Find the self-attentions too.

    Raises:
        WrappedModelError: The model is wrapped by DDP, FSDP or `torch.compile`.
        ShapeError: The model cannot run on the example.
        NoSitesError: It has no spatial convolution, nor attention where that was asked for.
    """
    refuse_wrapped(model)
    args = example_inputs(model, example)
    seen = view(modularise(model), args)
    sites = _sites_of(seen, is_convolution if pointwise else is_spatial)
    attending = attention_sites(seen) if attention else []
    if not sites and not attending:
        also = " or self-attention" if attention else ""
        raise NoSitesError(
            f"{type(model).__name__} has no spatial convolution (kernel larger than one pixel)"
            f"{also} that a forward pass reaches: there is nothing to convert."
        )
    found = _in_order(_with_depth(sites) if sites else (), attending, seen)
    return tuple(replace(site, images=images_in(args)) for site in found)


def _in_order(
    convolutions: tuple[Site, ...], attending: list[tuple[int, Site]], seen: GraphView
) -> tuple[Site, ...]:
    """All sites in the order of execution; functional convolutions, of unknown place, last."""
    if not attending:
        return convolutions
    places: dict[str, int] = {}
    for place, node in enumerate(seen.graph.nodes):
        places.setdefault(str(node.target), place)
    last = len(seen.graph.nodes)
    placed = [(places.get(site.name, last), site) for site in convolutions] + attending
    return tuple(site for _, site in sorted(placed, key=lambda item: item[0]))


def refuse_wrapped(model: nn.Module) -> None:
    """Raise a WrappedModelError for a model inside DDP, FSDP or `torch.compile`.

    And a SurgeryError for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise SurgeryError(
            f"Give a model, not a {type(model).__name__}; timm.create_model makes one from a name."
        )
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise WrappedModelError(
                    f"{path or 'The model'} is wrapped by {cls.__name__}. "
                    f"{_WRAPPERS[cls.__name__]} "
                    f"Order: convert, then optimiser, EMA, DDP, compile."
                )
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ShapeError(
                f"{path or 'The model'} is lazy and has no shapes yet: run the model on one batch "
                f"before converting it."
            )


def is_spatial(module: nn.Module) -> bool:
    """Whether `module` is a convolution with a kernel larger than one pixel."""
    return convolves(module) and max(geometry_of(module).kernel_size) > 1


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a convolution that is spatial, or 2-D, 1x1 and ungrouped."""
    return is_spatial(module) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _sites_of(seen: GraphView, wanted: Callable[[nn.Module], bool]) -> list[Site]:
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for node in seen.graph.nodes:
        if node.op == "call_module":
            counts[node.target] += 1
            if wanted(seen.modules[node.target]):
                calls[node.target].append(node)
    aliases: dict[int, list[str]] = defaultdict(list)
    for path, module in _all_named_modules(seen.modules[""]):
        aliases[id(module)].append(path)
    sites = [
        _site(name, nodes, tuple(aliases[id(seen.modules[name])]), seen, counts)
        for name, nodes in calls.items()
    ]
    return sites + _functional_sites(seen)


def _all_named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(root.named_modules(remove_duplicate=False))


def _site(
    name: str,
    nodes: list[fx.Node],
    names: tuple[str, ...],
    seen: GraphView,
    counts: dict[str, int],
) -> Site:
    conv = seen.modules[name]
    geometry = geometry_of(conv)
    counted = "in_shape" if geometry.transposed else "shape"
    return Site(
        name=name,
        names=names,
        module=class_name(conv),
        geometry=geometry,
        input_shape=nodes[0].meta["in_shape"],
        output_shape=nodes[0].meta["shape"],
        calls=len(nodes),
        positions=sum(_positions(node.meta[counted], geometry) for node in nodes),
        neighbours=neighbours_of(nodes, seen, counts),
        stem=any(reads_input(node, seen) for node in nodes),
        output=any(feeds_output(node, seen) for node in nodes),
        blocked=_why_blocked(name, conv, seen),
    )


def _positions(shape: tuple[int, ...], geometry: Geometry) -> int:
    return prod(shape[: -1 - geometry.dims]) * prod(shape[-geometry.dims :])


def _why_blocked(name: str, conv: nn.Module, seen: GraphView) -> str | None:
    if is_quantised(conv):
        return "it is quantised; convert the floating-point model, and quantise what comes out"
    geometry = geometry_of(conv)
    if not isinstance(conv, Convolution):
        if geometry.strided:
            return "it is transposed: it enlarges its input, which no pool or shift does"
        return (
            "it is transposed, though without a stride: write it as a convolution of the flipped "
            "kernel before converting"
        )
    if geometry.dims == 1 and geometry.in_channels == geometry.out_channels == 1:
        return "it has a single channel: a filter along a vector, as in channel attention"
    if hasattr(conv, "parametrizations") or any(
        hasattr(conv, old) for old in ("weight_g", "weight_orig")
    ):
        return "its weight is parametrised; remove the parametrisation before converting"
    if not is_known_convolution(conv):
        return (
            f"{class_name(conv)} is a subclass of Conv{geometry.dims}d that may do more than "
            f"convolve; declare it with pfsurgery.register_convolution if it does not"
        )
    if name in seen.foreign_reads:
        return f"its weight is also read by the code of {seen.foreign_reads[name]}"
    for path, module in seen.modules.items():
        if module is not conv and any(p is conv.weight for p in module._parameters.values()):
            return f"its weight is shared with {path}"
    return None


def _functional_sites(seen: GraphView) -> list[Site]:
    """Sites for `F.conv2d` calls that no convolution module makes; they can only be kept."""
    found: dict[str, Site] = {}
    for orphan in seen.orphans:
        module = seen.modules[orphan.owner]
        name = f"{orphan.owner or 'model'}:{orphan.function}"
        geometry = _geometry_of_call(orphan)
        counted = orphan.input_shape if geometry.transposed else orphan.output_shape
        positions = _positions(counted, geometry)
        if name in found:
            site = found[name]
            found[name] = replace(site, calls=site.calls + 1, positions=site.positions + positions)
            continue
        found[name] = Site(
            name=name,
            names=(name,),
            module=class_name(module),
            geometry=geometry,
            input_shape=orphan.input_shape,
            output_shape=orphan.output_shape,
            positions=positions,
            blocked=_why_no_module(module, orphan),
        )
    return list(found.values())


def _why_no_module(module: nn.Module, orphan: Orphan) -> str:
    inside = class_name(module)
    if next(module.parameters(), None) is None:
        return f"a fixed filter inside {inside}, without weights of its own"
    if inside == _CONDITIONAL:
        return f"the filters of {inside} are mixed anew for each image, by weights passed to it"
    if isinstance(module, fx.GraphModule):
        return f"{orphan.function} on what the graph computes, never trains or also reads elsewhere"
    return (
        f"a functional {orphan.function} in the code of {inside}: there is no module to replace; "
        f"in a graph there is: convert torch.export.export(model, (example,)).module()"
    )


def _geometry_of_call(orphan: Orphan) -> Geometry:
    """What a call's shapes tell; its stride and padding they do not."""
    _, second, *kernel_size = orphan.weight_shape
    ones = (1,) * len(kernel_size)
    channels = orphan.input_shape[-1 - len(kernel_size)]
    transposed = "transpose" in orphan.function
    groups = 1 if transposed else max(channels // second, 1)
    return Geometry(
        in_channels=channels,
        out_channels=orphan.output_shape[-1 - len(kernel_size)],
        kernel_size=tuple(kernel_size),
        stride=ones,
        padding=(0,) * len(kernel_size),
        dilation=ones,
        groups=groups,
        transposed=transposed,
    )


def _with_depth(sites: list[Site]) -> tuple[Site, ...]:
    """Fill in `stage` and `depth`, which need all sites; stems do not count as a stage.

    Sizes of unlike kinds cannot be compared: a 1-D convolution in an image model, such as a gate
    over channels, is in the stage that the site before it is in.
    """
    dims = sites[0].geometry.dims
    body = [site for site in sites if not site.stem and site.geometry.dims == dims] or sites
    areas = sorted({_area(site) for site in body}, reverse=True)
    tops: list[int] = []
    for area in areas:
        if not tops or area * 2 <= tops[-1]:
            tops.append(area)
    ranks = {site.name: rank for rank, site in enumerate(body)}
    placed: list[Site] = []
    rank = 0
    for site in sites:
        rank = ranks.get(site.name, rank)
        stage = max((s for s, top in enumerate(tops) if _area(site) <= top), default=0)
        if site.geometry.dims != dims:
            stage = placed[-1].stage
        by_order = rank / len(body)
        depth = stage / len(tops) if len(tops) > 1 else by_order
        placed.append(replace(site, stage=stage, depth=0.0 if site.stem else round(depth, 4)))
    return tuple(placed)


def _area(site: Site) -> int:
    return prod(site.output_shape[-site.geometry.dims :])
