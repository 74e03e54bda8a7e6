"""The graph view: one recorded forward pass as a `torch.fx.Graph`.

`torch.fx.symbolic_trace` gives up on control flow, and with leaf modules it hides what is inside
them. So the model is run instead, on tensors without storage, and each module call and tensor
function becomes a node. That works wherever the model runs, sees every call with its shapes, and
never touches the caller's model: what runs is a shadow that shares its structure, not its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pfsurgery.shadow import on_shadow
from pfsurgery.sites import convolves

_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}
# The same in exported graphs; `aten.convolution` where they are decomposed.
_EXPORTED = {
    *("conv1d", "conv2d", "conv3d", "convolution"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}


@dataclass(frozen=True, slots=True)
class Orphan:
    """A call of `conv2d` or one of its kin that no convolution module made.

    Attributes:
        owner: Path of the module whose code made it.
        function: Name of the function.
        weight_shape: (outputs, inputs / groups, kernel height, kernel width), the first two the
            other way round of a transposed one.
        input_shape: Shape of what it read.
        output_shape: Shape of what it made.
    """

    owner: str
    function: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One call of a module that is not a leaf.

    Attributes:
        source: The node that made its first tensor, None where that is not known.
        in_shape: Shape of its first tensor.
        out_shape: Shape of the first tensor that it returned.
        others: The further tensors that it was given: names of keyword arguments, else places.
        position: How many nodes the graph had when it returned.
    """

    source: fx.Node | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    others: tuple[str, ...]
    position: int


@dataclass
class GraphView:
    """What one forward pass did.

    Attributes:
        graph: Nodes in the order of execution. `call_module` nodes are leaves (a convolution, a
            norm, any module without children), `call_function` nodes the tensor functions between.
            A node's arguments are the nodes that it reads; its `meta` holds `owner` (path of the
            module that made the call), `shape` of the first tensor it returns, and `in_shape` of
            the first that it reads.
        modules: The shadow's modules by path. Tensors in it have no storage.
        orphans: Calls of convolution functions, with a kernel larger than one pixel, that no
            convolution module made.
        foreign_reads: Paths of convolutions and batch norms whose tensors another module's code
            reads, with the reader.
        passes: Calls of modules that are not leaves, by path.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    orphans: list[Orphan] = field(default_factory=list)
    foreign_reads: dict[str, str] = field(default_factory=dict)
    passes: dict[str, list[Pass]] = field(default_factory=dict)

    def calls(self, path: str) -> int:
        """How often the module at `path` is called, by any of its paths."""
        return self._calls.get(id(self.modules[path]), 0)

    @cached_property
    def _calls(self) -> Counter[int]:
        nodes = (node for node in self.graph.nodes if node.op == "call_module")
        return Counter(id(self.modules[str(node.target)]) for node in nodes)


def view(model: nn.Module, example: tuple[Any, ...]) -> GraphView:
    """Record one eval-mode forward pass of `model`, without running it on real data.

    Args:
        model: The model; it is left alone.
        example: Its positional arguments.

    Raises:
        ShapeError: The model cannot run on the example.
    """
    return on_shadow(model, example, _record)[0]


def tensors_in(value: Any, depth: int = 3) -> list[Tensor]:
    """All tensors in nested containers, dataclasses and plain objects."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += tensors_in(list(vars(leaf).values()), depth - 1)
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm, going by its class's name; `ConvNorm` blocks are not."""
    return "norm" in type(module).__name__.lower() and not any(
        isinstance(inner, nn.Linear) or convolves(inner) for inner in module.modules()
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of `module` is one node of the graph view."""
    return (
        isinstance(module, nn.Linear)
        or convolves(module)
        or is_norm(module)
        or next(module.children(), None) is None
    )


def _record(shadow: nn.Module, example: tuple[Any, ...]) -> GraphView:
    recorder = _Recorder(shadow)
    with recorder.hooked(shadow), recorder:
        for leaf in tree_leaves(example):
            if isinstance(leaf, Tensor):
                recorder.add("placeholder", "input", (), leaf)
        output = shadow(*example)
    recorder.add("output", "output", output, None)
    return recorder.view


# What a tensor is asked for without reading its values: a detector's anchors depend on sizes alone.
_OF_SHAPES = ("__get__", "size", "dim", "numel", "__len__")


def _tells_more_than_shape(function: Any) -> bool:
    return getattr(function, "__name__", "") not in _OF_SHAPES


def _convolution_name(function: Any) -> str | None:
    """`conv2d` and the like, if `function` convolves."""
    if isinstance(function, torch._ops.OpOverload):
        name = function.overloadpacket.__name__
        return name if function.namespace == "aten" and name in _EXPORTED else None
    return str(function.__name__) if function in _CONVOLUTIONS else None


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class _Recorder(TorchFunctionMode):
    """Turns module calls and tensor functions into nodes, and tensors into edges."""

    def __init__(self, shadow: nn.Module) -> None:
        super().__init__()
        modules = dict(shadow.named_modules())
        self.view = GraphView(fx.Graph(), modules)
        self._paths = {module: path for path, module in reversed(modules.items())}
        self._node_of = WeakIdKeyDictionary()
        self._stack: list[str] = [""]
        self._leaf: nn.Module | None = None
        self._leaf_reads = False
        self._weights = {
            id(tensor): path
            for path, module in modules.items()
            if convolves(module) or isinstance(module, _BatchNorm)
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }

    def add(self, op: str, target: Any, inputs: Any, output: Any) -> None:
        """Append a node that reads the tensors in `inputs` and makes those in `output`."""
        read, made = tensors_in(inputs), tensors_in(output)
        if target is Tensor.__setitem__:
            made = read[:1]
        sources = tuple(dict.fromkeys(self._node_of[t] for t in read if t in self._node_of))
        if op == "call_function" and (not made or not sources):
            return
        args: tuple[Any, ...] = (sources,) if op == "output" else sources
        node = self.view.graph.create_node(op, target, args)
        node.meta["owner"] = self._stack[-1]
        node.meta["shape"] = tuple(made[0].shape) if made else ()
        node.meta["in_shape"] = tuple(read[0].shape) if read else ()
        for tensor in made:
            self._node_of[tensor] = node

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = _convolution_name(func)
        if name is not None and (self._leaf is None or not convolves(self._leaf)):
            self._add_orphan(name, args, kwargs, output)
        if self._leaf is None:
            self.add("call_function", func, (args, kwargs), output)
            self._note_foreign_reads(args, kwargs)
        elif not self._leaf_reads and (_tells_more_than_shape(func) or tensors_in(output)):
            self._leaf_reads = self._any_has_a_node((args, kwargs))
        return output

    def _any_has_a_node(self, values: Any) -> bool:
        return any(tensor in self._node_of for tensor in tensors_in(values))

    def _add_orphan(
        self,
        function: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        source = args[0] if args else kwargs["input"]
        if max(weight.shape[2:]) > 1:
            shapes = (tuple(weight.shape), tuple(source.shape), tuple(output.shape))
            self.view.orphans.append(Orphan(self._stack[-1], function, *shapes))

    def _note_foreign_reads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for leaf in tree_leaves((args, kwargs)):
            path = self._weights.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if path is not None:
                self.view.foreign_reads.setdefault(path, self._stack[-1] or "the model itself")

    @contextmanager
    def hooked(self, shadow: nn.Module) -> Iterator[None]:
        """Follow which module runs, by hooks on the shadow."""
        handles = []
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=False)
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._stack.append(self._paths[module])
        if self._leaf is None and self._stack[-1] and is_leaf(module):
            self._leaf, self._leaf_reads = module, False

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        path = self._stack.pop()
        if self._leaf is module:
            self._leaf = None
            if self._leaf_reads or _has_weights(module) or self._any_has_a_node(output):
                self.add("call_module", path, (args, kwargs), output)
        elif self._leaf is None and path:
            self._add_pass(path, args, kwargs, output)

    def _add_pass(
        self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        tensors = [(name, t) for name, value in given.items() for t in tensors_in(value, 0)]
        made = tensors_in(output, 1)
        if not tensors or not made:
            return
        first = tensors[0][1]
        call = Pass(
            source=self._node_of.get(first),  # type: ignore[no-untyped-call]
            in_shape=tuple(first.shape),
            out_shape=tuple(made[0].shape),
            others=tuple(name for name, tensor in tensors if tensor is not first),
            position=len(self.view.graph.nodes),
        )
        self.view.passes.setdefault(path, []).append(call)
