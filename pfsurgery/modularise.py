"""Rewrite a GraphModule's functional convolutions as modules, so that surgery can replace them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from pfsurgery.modules import set_module
from pfsurgery.sites import CONVOLUTIONS

_FUNCTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.ops.aten.conv1d.default, torch.ops.aten.conv1d.padding),
    *(torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding),
    *(torch.ops.aten.conv3d.default, torch.ops.aten.conv3d.padding),
}
_DECOMPOSED = torch.ops.aten.convolution.default


def modularise(
    model: nn.Module, *, inplace: bool = False, only: Collection[str] | None = None
) -> nn.Module:
    """`model` itself, or, for a GraphModule that calls `conv2d` on attributes, one that does not.

    Each `conv2d(x, self.<path>.weight, ...)` node becomes a call of an `nn.Conv2d` at `<path>` that
    holds the same parameters, so state-dict names stay. A weight that does not stand alone in a
    module of its own, `self.<name>`, moves into one at `<name>_conv`. This serves `torch.fx` graphs
    and the modules that `torch.export` makes.

    Args:
        model: Any module; one that is not a GraphModule is returned as it is.
        inplace: Change `model` itself; by default a GraphModule in need of it is copied in
            structure, sharing its parameters.
        only: Paths of the modules to make; by default all.
    """
    if not isinstance(model, fx.GraphModule) or not _functional_nodes(model, only):
        return model
    if not inplace:
        tensors = [*model.parameters(), *model.buffers()]
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for path, nodes in _functional_nodes(model, only).items():
        _to_module(model, path, nodes)
    model.graph.lint()
    model.recompile()
    return model


def _functional_nodes(
    model: fx.GraphModule, only: Collection[str] | None
) -> dict[str, list[fx.Node]]:
    """The nodes that can become calls of one module, by its path."""
    by_weight: dict[str, list[fx.Node]] = defaultdict(list)
    for node in model.graph.nodes:
        if _convolves(node):
            weight = _parameter(model, _arguments(node)["weight"])
            if weight is not None:
                by_weight[weight].append(node)
    found = {
        _path(model, weight, nodes[0]): nodes
        for weight, nodes in by_weight.items()
        if _is_one_module(model, weight, nodes)
    }
    return {path: nodes for path, nodes in found.items() if only is None or path in only}


def _convolves(node: fx.Node) -> bool:
    plain = node.target is _DECOMPOSED and node.args[6] is False  # not transposed
    return node.op == "call_function" and (plain or node.target in _FUNCTIONS)


def _parameter(model: fx.GraphModule, source: Any) -> str | None:
    """Name of the parameter that an argument of a node is, None where it is something else."""
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    owner, _, name = str(source.target).rpartition(".")
    return str(source.target) if name in model.get_submodule(owner)._parameters else None


def _is_one_module(model: fx.GraphModule, weight: str, nodes: list[fx.Node]) -> bool:
    """Whether the nodes do the same, with parameters alone, and nobody else reads the weight."""
    settings = []
    for node in nodes:
        arguments = _arguments(node)
        bias = arguments["bias"]
        if bias is not None and _parameter(model, bias) is None:
            return False
        del arguments["input"], arguments["weight"]
        settings.append({**arguments, "bias": str(bias.target) if bias is not None else None})
    return all(setting == settings[0] for setting in settings) and all(
        reader in nodes for reader in _readers(model, weight)
    )


def _readers(model: fx.GraphModule, parameter: str) -> list[fx.Node]:
    return [
        node
        for node in model.graph.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr" and source.target == parameter
    ]


def _path(model: fx.GraphModule, weight: str, node: fx.Node) -> str:
    owner, _, name = weight.rpartition(".")
    module = model.get_submodule(owner)
    held = {*module._parameters, *module._buffers, *module._modules}
    bias = _arguments(node)["bias"]
    fits = bias is None or bias.target == f"{owner}.bias"
    alone = owner and name == "weight" and held <= {"weight", "bias"} and fits
    return owner if alone else f"{weight}_conv"


def _arguments(node: fx.Node) -> dict[str, Any]:
    names: tuple[str, ...]
    if node.target is _DECOMPOSED:
        names = ("input", "weight", "bias", "stride", "padding", "dilation")
        return {**dict(zip(names, node.args, strict=False)), "groups": node.args[8]}
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _to_module(model: fx.GraphModule, path: str, nodes: list[fx.Node]) -> None:
    arguments = _arguments(nodes[0])
    parameters = {
        name: str(arguments[name].target)
        for name in ("weight", "bias")
        if arguments[name] is not None
    }
    weight = model.get_parameter(parameters["weight"])
    conv = CONVOLUTIONS[weight.ndim - 2](
        weight.shape[1] * arguments["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=_argument(arguments["stride"]),
        padding=_argument(arguments["padding"]),
        dilation=_argument(arguments["dilation"]),
        groups=arguments["groups"],
        bias="bias" in parameters,
        device="meta",
    )
    for name, parameter in parameters.items():
        setattr(conv, name, model.get_parameter(parameter))
    conv.train(model.training)
    for node in nodes:
        _call(model, node, path)
    for parameter in parameters.values():
        if not _readers(model, parameter):
            owner, _, name = parameter.rpartition(".")
            del model.get_submodule(owner)._parameters[name]
    if path == parameters["weight"].rpartition(".")[0]:
        set_module(model, path, conv)
    else:
        model.add_submodule(path, conv)


def _call(model: fx.GraphModule, node: fx.Node, path: str) -> None:
    arguments = _arguments(node)
    with model.graph.inserting_before(node):
        call = model.graph.create_node("call_module", path, (arguments["input"],))
        call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)
    for source in (arguments["weight"], arguments["bias"]):
        if isinstance(source, fx.Node) and not source.users:
            model.graph.erase_node(source)


def _argument(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
