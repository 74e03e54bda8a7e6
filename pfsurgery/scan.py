"""Find the sites of a model: spatial convolutions and self-attentions, with what is around them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from math import prod

from torch import fx, nn
from torch.nn.parameter import is_lazy

from pfsurgery.attention import attention_sites
from pfsurgery.errors import NoSitesError, ShapeError, WrappedModelError
from pfsurgery.example import Example, example_inputs
from pfsurgery.graph import GraphView, view
from pfsurgery.modularise import modularise
from pfsurgery.neighbours import feeds_output, neighbours_of, reads_input
from pfsurgery.sites import Geometry, Site, class_name, geometry_of, is_known_convolution

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
    seen = view(modularise(model), example_inputs(model, example))
    sites = _sites_of(seen, is_convolution if pointwise else is_spatial)
    attending = attention_sites(seen) if attention else []
    if not sites and not attending:
        also = " or self-attention" if attention else ""
        raise NoSitesError(
            f"{type(model).__name__} has no spatial convolution (kernel larger than one pixel)"
            f"{also} that a forward pass reaches: there is nothing to convert."
        )
    return _in_order(_with_depth(sites) if sites else (), attending, seen)


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
    """Raise a WrappedModelError for a model inside DDP, FSDP or `torch.compile`."""
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
    """Whether `module` is a 2-D convolution with a kernel larger than one pixel."""
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1


def is_convolution(module: nn.Module) -> bool:
    """Whether `module` is a 2-D convolution that is spatial, or 1x1 and ungrouped."""
    return isinstance(module, nn.Conv2d) and (max(module.kernel_size) > 1 or module.groups == 1)


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
    geometry = geometry_of(conv)  # type: ignore[arg-type]
    shape = nodes[0].meta["shape"]
    return Site(
        name=name,
        names=names,
        module=class_name(conv),
        geometry=geometry,
        input_shape=nodes[0].meta["in_shape"],
        output_shape=shape,
        calls=len(nodes),
        positions=sum(_positions(node.meta["shape"]) for node in nodes),
        neighbours=neighbours_of(nodes, seen, counts),
        stem=any(reads_input(node, seen) for node in nodes),
        output=any(feeds_output(node, seen) for node in nodes),
        blocked=_why_blocked(name, conv, seen),
    )


def _positions(shape: tuple[int, ...]) -> int:
    return prod(shape[:-3]) * shape[-2] * shape[-1]


def _why_blocked(name: str, conv: nn.Module, seen: GraphView) -> str | None:
    if hasattr(conv, "parametrizations") or any(
        hasattr(conv, old) for old in ("weight_g", "weight_orig")
    ):
        return "its weight is parametrised; remove the parametrisation before converting"
    if not is_known_convolution(conv):
        return (
            f"{class_name(conv)} is a subclass of Conv2d that may do more than convolve; "
            f"declare it with pfsurgery.register_convolution if it does not"
        )
    if name in seen.foreign_reads:
        return f"its weight is also read by the code of {seen.foreign_reads[name]}"
    for path, module in seen.modules.items():
        if module is not conv and any(p is conv.weight for p in module._parameters.values()):
            return f"its weight is shared with {path}"
    return None


def _functional_sites(seen: GraphView) -> list[Site]:
    """Sites for `F.conv2d` calls that no `nn.Conv2d` makes; they can only be kept."""
    found: dict[str, Site] = {}
    for owner, weight, source, output in seen.orphans:
        module = seen.modules[owner]
        name = f"{owner or 'model'}:conv2d"
        positions = _positions(output)
        if name in found:
            site = found[name]
            found[name] = replace(site, calls=site.calls + 1, positions=site.positions + positions)
            continue
        fixed = next(module.parameters(), None) is None
        why = "filters without parameters" if fixed else "a functional convolution"
        found[name] = Site(
            name=name,
            names=(name,),
            module=class_name(module),
            geometry=Geometry(
                in_channels=source[-3],
                out_channels=weight[0],
                kernel_size=(weight[2], weight[3]),
                groups=max(source[-3] // weight[1], 1),
            ),
            input_shape=source,
            output_shape=output,
            positions=positions,
            blocked=f"{why} inside {class_name(module)}: no module to replace",
        )
    return list(found.values())


def _with_depth(sites: list[Site]) -> tuple[Site, ...]:
    """Fill in `stage` and `depth`, which need all sites; stems do not count as a stage."""
    body = [site for site in sites if not site.stem] or sites
    areas = sorted({_area(site) for site in body}, reverse=True)
    tops: list[int] = []
    for area in areas:
        if not tops or area * 2 <= tops[-1]:
            tops.append(area)
    ranks = {site.name: rank for rank, site in enumerate(body)}
    placed = []
    for site in sites:
        stage = max((s for s, top in enumerate(tops) if _area(site) <= top), default=0)
        by_order = ranks.get(site.name, 0) / len(body)
        depth = stage / len(tops) if len(tops) > 1 else by_order
        placed.append(replace(site, stage=stage, depth=0.0 if site.stem else round(depth, 4)))
    return tuple(placed)


def _area(site: Site) -> int:
    return site.output_shape[-2] * site.output_shape[-1]
