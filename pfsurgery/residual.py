"""Additions behind fitted bottlenecks, as residual blocks end, left to the fused kernel.

An addition stands in the code of a block, so the block is given other code: its forward is traced
with the modules in it as leaves, and what reads the bottleneck becomes a part of its call. All
modules stay what they are: a block that loses its new forward computes the same.
"""

from __future__ import annotations

import inspect
import operator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pfsurgery.graph import GraphView
from pfsurgery.modules import get_module, is_watched, parents_of, paths_of
from pfsurgery.ops.bottleneck import Bottleneck

_IN_PLACE = (operator.iadd, "add_")
_ADDITIONS = (operator.add, torch.add, "add", *_IN_PLACE)
_CLOSE = 0.5  # root of the rounding error that two ways of computing may differ by
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


def take_in_additions(seen: GraphView, model: nn.Module) -> None:
    """Let blocks hand what is added to a bottleneck's output, and a ReLU behind, to its kernel.

    Args:
        seen: The view of a model of this structure.
        model: Changed in place; in eval mode.
    """
    free = [
        path
        for path, module in model.named_modules()
        if isinstance(module, Bottleneck) and _is_free(path, module, seen, model)
    ]
    for owner in dict.fromkeys(node.meta["owner"] for node in seen.graph.nodes if adds(node)):
        start = f"{owner}." if owner else ""
        inside = {path.removeprefix(start) for path in free if path.startswith(start)}
        around = {start + parent for path in inside for parent in parents_of(path)}
        entered = {path for path in around if not is_watched(get_module(model, path))}
        code = [node for node in seen.graph.nodes if node.meta.get("owner") in {owner, *entered}]
        if inside and not any(_writes_over(node, model) for node in code):
            relative = {path.removeprefix(start) for path in entered}
            _rewrite(get_module(model, owner), inside, relative, _input_shape(owner, seen))


def adds(node: fx.Node) -> bool:
    """Whether a node of a graph view adds tensors."""
    return node.op == "call_function" and _name(node) in ("add", "add_")


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "")


def _writes_over(node: fx.Node, model: nn.Module) -> bool:
    """Whether a function writes where something else may read: `fx` takes `x += y` for `x + y`.

    What a bottleneck has made is read by nothing else.
    """
    name = _name(node)
    if node.op != "call_function" or not (name.endswith("_") or name.startswith("__i")):
        return False
    written = node.args[0]
    while _is_module(written, nn.Identity, model):
        assert isinstance(written, fx.Node)
        written = written.args[0]
    assert isinstance(written, fx.Node)
    path = str(written.target).removesuffix(".expand")
    fresh = written.op == "call_module" and isinstance(get_module(model, path), Bottleneck)
    return not (name == "add_" and fresh)


def _is_free(path: str, bottleneck: Bottleneck, seen: GraphView, model: nn.Module) -> bool:
    """Whether a bottleneck may be called otherwise: once, by one name, seen by nobody."""
    calls = [seen.calls(name) for name in (path, f"{path}.expand") if name in seen.modules]
    once = sum(calls) == 1 and len(paths_of(model, bottleneck)) == 1
    return once and not is_watched(bottleneck) and not bottleneck.relu


def _input_shape(block: str, seen: GraphView) -> tuple[int, ...]:
    if not block:
        first: tuple[int, ...] = next(iter(seen.graph.nodes)).meta["shape"]
        return first
    return seen.passes[block][0].in_shape


def _rewrite(
    block: nn.Module, bottlenecks: set[str], entered: set[str], shape: tuple[int, ...]
) -> None:
    """Give `block` a forward that hands over what is added to the bottlenecks at these paths."""
    graph = _traced(block, entered)
    if graph is None:
        return
    for node in list(graph.nodes):
        if _is_module(node, nn.Identity, block):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    found = [n for n in graph.nodes if n.op == "call_module" and n.target in bottlenecks]
    taken = [_take_in(node, graph, block) for node in found]
    if any(taken):
        forward = MethodType(type(fx.GraphModule(block, graph)).forward, block)
        if _computes_the_same(forward, block, shape):
            vars(block)["forward"] = forward


def _computes_the_same(forward: MethodType, block: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a forward makes what `block` makes of random numbers.

    Code may take another way for what is no tensor, and the trace does not tell.
    """
    weight = next(block.parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    close = _CLOSE * torch.finfo(weight.dtype).eps ** 0.5
    with torch.no_grad():
        wanted, made = block(x.clone()), forward(x)
    if not isinstance(wanted, Tensor) or not isinstance(made, Tensor):
        return False
    size = float(wanted.abs().max())
    return wanted.shape == made.shape and torch.allclose(
        made, wanted, rtol=0, atol=close * size, equal_nan=True
    )


class _Tracer(fx.Tracer):
    """Enters the modules at some paths, and plain sequences; all others are leaves."""

    def __init__(self, entered: set[str]) -> None:
        super().__init__()
        self._entered = entered

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_sequence = type(m) is nn.Sequential and not is_watched(m)
        return not is_sequence and module_qualified_name not in self._entered


def _traced(block: nn.Module, entered: set[str]) -> fx.Graph | None:
    """The forward of `block`, and of the modules at some paths, as a graph; None if it cannot be.

    A second input that is left out most of the time would be traced as given, and a tensor made
    without an input, as random ones are, would be a constant.
    """
    if len(inspect.signature(block.forward).parameters) != 1 or "forward" in vars(block):
        return None
    before = {path: dict(vars(get_module(block, path))) for path in ("", *entered)}
    try:
        graph = _Tracer(entered).trace(block)
    except Exception:  # a model's code may raise anything when it is given what is no tensor
        graph = None
    for path, attributes in before.items():
        if _differ(found := vars(get_module(block, path)), attributes):
            found.clear()
            found.update(attributes)
            graph = None
    if graph is None or any(
        n.op == "get_attr" and "_constant" in str(n.target) for n in graph.nodes
    ):
        return None
    return graph


def _differ(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return some.keys() != others.keys() or any(some[key] is not others[key] for key in some)


def _take_in(bottleneck: fx.Node, graph: fx.Graph, block: nn.Module) -> bool:
    """Whether an addition reads `bottleneck`; it becomes a part of the call then."""
    addition = _only_user(bottleneck)
    added = None if addition is None else _other_summand(addition, bottleneck)
    if addition is None or added is None or not _may_wait(bottleneck, addition, block):
        return False
    taken, relu = [bottleneck, addition], _only_user(addition)
    if relu is not None and (_is_module(relu, nn.ReLU, block) or _calls(relu, _RELUS, arguments=1)):
        taken.append(relu)
    with graph.inserting_before(addition):
        arguments = (bottleneck.args[0], added)
        made = graph.call_module(str(bottleneck.target), arguments, {"relu": len(taken) == 3})
    taken[-1].replace_all_uses_with(made)
    for node in reversed(taken):
        graph.erase_node(node)
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_module(node: Any, kind: type[nn.Module], block: nn.Module) -> bool:
    """Whether a node is the call, with one argument, of a module of this very class."""
    if (
        not isinstance(node, fx.Node)
        or node.op != "call_module"
        or len(node.all_input_nodes) != 1
        or len(node.args) != 1
    ):
        return False
    module = get_module(block, str(node.target))
    return type(module) is kind and not is_watched(module)


def _calls(node: fx.Node, functions: tuple[Any, ...], arguments: int) -> bool:
    """Whether a node calls a function or method with so many nodes and nothing else."""
    plain = all(isinstance(argument, fx.Node) for argument in node.args) and not node.kwargs
    known = node.op in ("call_function", "call_method") and node.target in functions
    return known and plain and len(node.args) == arguments


def _other_summand(addition: fx.Node, summand: fx.Node) -> fx.Node | None:
    """What is added to `summand`; None where nothing is, or where the sum is written elsewhere."""
    if not _calls(addition, _ADDITIONS, arguments=2):
        return None
    first, second = addition.args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    if first is second or (second is summand and addition.target in _IN_PLACE):
        return None
    return second if first is summand else first


def _may_wait(bottleneck: fx.Node, addition: fx.Node, block: nn.Module) -> bool:
    """Whether nothing that runs up to the addition can change what the bottleneck reads."""
    return bottleneck.next is addition or _is_alone(bottleneck.args[0], block)


def _is_alone(node: Any, block: nn.Module) -> bool:
    """Whether one node alone reads the memory of `node`, which a module with weights has made."""
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1:
        if next(get_module(block, str(node.target)).parameters(), None) is not None:
            return True
        node = node.args[0] if len(node.args) == 1 else None
    return False
