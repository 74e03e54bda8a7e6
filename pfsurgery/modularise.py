"""Rewrite a GraphModule's functional convolutions as modules, so that surgery can replace them."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from pfsurgery.modules import set_module

_FUNCTIONAL = {torch.conv2d, nn.functional.conv2d}


def modularise(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """`model` itself, or, for a GraphModule that calls `conv2d` on attributes, one that does not.

    Each `conv2d(x, self.<path>.weight, ...)` node becomes a call of an `nn.Conv2d` at `<path>` that
    holds the same parameters, so state-dict names stay. This serves `torch.fx` graphs and the
    modules that `torch.export` makes.

    Args:
        model: Any module; one that is not a GraphModule is returned as it is.
        inplace: Change `model` itself; by default a GraphModule in need of it is copied in
            structure, sharing its parameters.
    """
    if not isinstance(model, fx.GraphModule) or not _functional_nodes(model):
        return model
    if not inplace:
        tensors = [*model.parameters(), *model.buffers()]
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for node in _functional_nodes(model):
        _to_module(model, node)
    model.graph.lint()
    model.recompile()
    return model


def _functional_nodes(model: fx.GraphModule) -> list[fx.Node]:
    """Nodes that can become module calls: those of one path agree, and nothing else lives there."""
    by_path: dict[str, list[fx.Node]] = defaultdict(list)
    for node in model.graph.nodes:
        path = _weight_path(node)
        if path is not None:
            by_path[path].append(node)
    return [
        n for path, nodes in by_path.items() if _is_one_module(model, path, nodes) for n in nodes
    ]


def _is_one_module(model: fx.GraphModule, path: str, nodes: list[fx.Node]) -> bool:
    owner = model.get_submodule(path)
    held = {*owner._parameters, *owner._buffers, *owner._modules}
    settings = [
        {key: value for key, value in _arguments(node).items() if key not in ("input", "weight")}
        for node in nodes
    ]
    targets = [
        {key: str(v.target) if isinstance(v, fx.Node) else v for key, v in setting.items()}
        for setting in settings
    ]
    bias = targets[0]["bias"]
    readers = [
        node
        for node in model.graph.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr" and source.target == f"{path}.weight"
    ]
    return (
        held <= {"weight", "bias"}
        and all(target == targets[0] for target in targets)
        and bias in (None, f"{path}.bias")
        and all(reader in nodes for reader in readers)
    )


def _weight_path(node: fx.Node) -> str | None:
    functional = node.target in _FUNCTIONAL or node.target is torch.ops.aten.conv2d.default
    if node.op != "call_function" or not functional:
        return None
    weight = _arguments(node)["weight"]
    path = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
    return path.removesuffix(".weight") if path.endswith(".weight") else None


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _to_module(model: fx.GraphModule, node: fx.Node) -> None:
    path = _weight_path(node)
    if path is None:
        return
    arguments = _arguments(node)
    if isinstance(model.get_submodule(path), nn.Conv2d):
        _call(model, node, path, arguments)
        return
    weight = model.get_parameter(f"{path}.weight")
    bias = arguments["bias"]
    conv = nn.Conv2d(
        weight.shape[1] * arguments["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride=_argument(arguments["stride"]),
        padding=_argument(arguments["padding"]),
        dilation=_argument(arguments["dilation"]),
        groups=arguments["groups"],
        bias=bias is not None,
        device="meta",
    )
    conv.weight = weight
    if isinstance(bias, fx.Node):
        conv.bias = model.get_parameter(str(bias.target))
    conv.train(model.training)
    set_module(model, path, conv)
    _call(model, node, path, arguments)


def _call(model: fx.GraphModule, node: fx.Node, path: str, arguments: dict[str, Any]) -> None:
    with model.graph.inserting_before(node):
        call = model.graph.call_module(path, (arguments["input"],))
        call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)
    for source in (arguments["weight"], arguments["bias"]):
        if isinstance(source, fx.Node) and not source.users:
            model.graph.erase_node(source)


def _argument(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
