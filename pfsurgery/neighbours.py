"""What stands around a convolution, read from the graph view."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pfsurgery.graph import GraphView, is_norm
from pfsurgery.sites import Convolution, Neighbours, convolves, geometry_of

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
_ADDITIONS |= {operator.add, operator.iadd}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__}
_PRODUCTS |= {operator.mul, operator.imul}
_ACTIVATIONS = {
    *(F.relu, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.softplus, F.hardswish),
    *(F.hardsigmoid, F.hardtanh, F.leaky_relu, F.prelu, F.relu_, F.leaky_relu_, F.elu_),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.square),
    *(Tensor.relu, Tensor.relu_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.clamp),
}
_NORM_FUNCTIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm}
_WINDOW_POOLS: set[Any] = {F.max_pool1d, F.max_pool2d, F.max_pool3d}
_WINDOW_POOLS |= {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
# Functions that keep a pixel's channels apart from other channels, wherever the axes go.
_CHANNELWISE = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pad, F.interpolate),
    *_WINDOW_POOLS,
    *(torch.permute, torch.transpose, torch.clone, torch.roll),
    *(Tensor.permute, Tensor.transpose, Tensor.contiguous, Tensor.clone, Tensor.to, Tensor.float),
}
_VIEWS = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.type_as, torch.flatten, Tensor.flatten}
_GLOBAL_POOLS = {torch.mean, Tensor.mean, torch.amax, Tensor.amax, torch.sum, Tensor.sum}
_GLOBAL_POOLS |= {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
_GLOBAL_POOLS |= {F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d}
_PRODUCTS_OF_MATRICES = {
    *(F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(torch.einsum, Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention),
}
_AXIS_MOVES = {torch.permute, torch.transpose, Tensor.permute, Tensor.transpose}
_CHANNELWISE_MODULES = (
    "Identity",
    "Drop",
    "LayerScale",
    "BlurPool",
    "MaxPool",
    "AvgPool",
    "Upsample",
    "ZeroPad",
)


def _is(node: fx.Node, functions: AbstractSet[Any]) -> bool:
    """Whether `node` calls one of `functions`, or in an exported graph the operator so named."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target.overloadpacket.__name__
        return any(getattr(function, "__name__", "") == name for function in functions)
    return node.target in functions


def neighbours_of(nodes: list[fx.Node], seen: GraphView, counts: dict[str, int]) -> Neighbours:
    """Neighbours of a module that `nodes` call; `counts` says how often each module is called."""
    around = [_around(node, seen) for node in nodes]
    norm, activation, before, after, branch, merge = (
        _agreed(values) for values in zip(*around, strict=True)
    )
    inside = f"{norm}."
    tail = tuple(
        name
        for name in (norm, activation)
        if name and not name.startswith(inside) and counts.get(name, 0) == len(nodes)
    )
    return Neighbours(
        norm=norm,
        activation=activation,
        pointwise_before=before,
        pointwise_after=after,
        branch=branch,
        tail=tail,
        tail_parameters=sum(p.numel() for name in tail for p in seen.modules[name].parameters()),
        merge=merge if merge is None or counts[merge] == len(nodes) else None,
    )


def neighbours_of_module(path: str, seen: GraphView) -> Neighbours:
    """Neighbours of any leaf module, for instance a pointwise convolution."""
    counts = Counter(str(node.target) for node in seen.graph.nodes if node.op == "call_module")
    nodes = _calls_of(path, seen)
    return neighbours_of(nodes, seen, counts) if nodes else Neighbours()


def _calls_of(path: str, seen: GraphView) -> list[fx.Node]:
    return [n for n in seen.graph.nodes if n.op == "call_module" and n.target == path]


def is_rectified(path: str, norm: str | None, merge: str | None, seen: GraphView) -> bool:
    """Whether a ReLU, and nothing else, reads what becomes of a layer's output.

    That is its output, behind the norm that is known, or the sum of this and a shortcut.

    Args:
        path: Path of the layer, a leaf.
        norm: Path of the norm that is known, None without one; behind another it is not known which
            outputs are negative.
        merge: Path of the module that is known to read the sum, None without one.
        seen: The graph view of its network.
    """
    nodes = _calls_of(path, seen)
    return bool(nodes) and all(_meets_relu(node, norm, merge is not None, seen) for node in nodes)


def _meets_relu(node: fx.Node, norm: str | None, added: bool, seen: GraphView) -> bool:
    """Whether `node`'s output meets a ReLU behind `norm`, and an addition exactly where `added`."""
    norms = sums = 0
    while len(node.users) == 1:
        (user,) = node.users
        if _is_relu(user, seen):
            return sums == added
        if _is_norm(user, seen) and not sums:
            if _owner(user) != norm:
                return False
            inner = _inner_activation(user, seen)
            if inner is not None:
                return type(inner) is nn.ReLU and not added
            norms += 1
        elif _is(user, _ADDITIONS) and len(user.args) == 2:
            sums += 1
        elif not _is_drop(user, seen):
            return False
        if norms > 1 or sums > 1:
            return False
        node = user
    return False


def _is_relu(node: fx.Node, seen: GraphView) -> bool:
    if node.op == "call_module":
        return type(seen.modules[str(node.target)]) is nn.ReLU
    return _is(node, _RELUS)


def _around(node: fx.Node, seen: GraphView) -> tuple[str | None, ...]:
    norm, activation = _tail(node, seen)
    module, shape = seen.modules[str(node.target)], node.meta["shape"]
    axis = -1 - (geometry_of(module).dims if convolves(module) else 2)
    channels = shape[axis] if len(shape) >= -axis else 0
    return (
        norm,
        activation,
        _pointwise_before(node, seen),
        _pointwise_after(node, channels, seen),
        _branch(node),
        _merge(node, seen),
    )


def _agreed(values: Iterable[str | None]) -> str | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def reads_input(node: fx.Node, seen: GraphView) -> bool:
    """Whether a path leads from the model's input to `node` through no layer with weights."""
    if not node.args:
        return True
    stack, visited = list(node.args), set()
    while stack:
        source = stack.pop()
        if not isinstance(source, fx.Node) or source in visited:
            continue
        visited.add(source)
        if _has_matrix(source, seen):
            continue
        if source.op == "placeholder" or (source.op == "call_module" and not source.args):
            return True  # a node whose sources are unknown may read the input
        stack.extend(source.args)
    return False


def feeds_output(node: fx.Node, seen: GraphView) -> bool:
    """Whether a path leads from `node` to the model's output through no layer that learns from it.

    Layers with weights, norms and global pooling end the search; reshaping, activations,
    upsampling and arithmetic do not.
    """
    stack, visited = list(node.users), set()
    while stack:
        user = stack.pop()
        if user.op == "output":
            return True
        ends = _has_matrix(user, seen) or _is_norm(user, seen) or _is_global_pool(user, seen)
        if user not in visited and not ends:
            visited.add(user)
            stack.extend(user.users)
    return False


def attends(node: fx.Node, seen: GraphView) -> bool:
    """Whether `node` is the heart of an attention.

    That is a call of PyTorch's own, or a softmax that is of something square or is multiplied with
    something, with nothing but views, casts or dropout between.
    """
    if node.op == "call_module":
        softmax = isinstance(seen.modules[str(node.target)], nn.Softmax)
    elif _is(node, {F.scaled_dot_product_attention, F.multi_head_attention_forward}):
        return True
    else:
        softmax = _is(node, {torch.softmax, F.softmax, Tensor.softmax})
    shape = node.meta["shape"]
    square = len(shape) > 2 and shape[-1] == shape[-2] > 1
    return softmax and (square or _feeds_product(node, seen))


def _feeds_product(node: fx.Node, seen: GraphView) -> bool:
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            return False
        if _is(user, _PRODUCTS_OF_MATRICES):
            return True
        if not (_is_channelwise(user, seen) or _is_drop(user, seen) or _is(user, _VIEWS)):
            return False
        node = user
    return any(_is(user, _PRODUCTS_OF_MATRICES) for user in node.users)


def _is_global_pool(node: fx.Node, seen: GraphView) -> bool:
    if node.op == "call_module":
        name = type(seen.modules[str(node.target)]).__name__
        return "Adaptive" in name or "GlobalPool" in name
    return _is(node, _GLOBAL_POOLS)


def _has_matrix(node: fx.Node, seen: GraphView) -> bool:
    if node.op == "call_module":
        module = seen.modules[str(node.target)]
        return not is_norm(module) and any(p.ndim > 1 for p in module.parameters())
    return _is(node, _PRODUCTS_OF_MATRICES)


def _tail(node: fx.Node, seen: GraphView) -> tuple[str | None, str | None]:
    """Norm and activation right behind `node`."""
    norm = activation = None
    while (user := _next(node)) is not None:
        if norm is None and activation is None and _is_norm(user, seen):
            norm = _owner(user)
            if isinstance(_inner_activation(user, seen), nn.Module):
                activation = f"{norm}.act"
        elif activation is None and _is_activation(user, seen):
            activation = _owner(user)
        elif not _is_channelwise(user, seen) or _is_pool(user, seen):
            break
        node = user
    return norm, activation


def _inner_activation(norm: fx.Node, seen: GraphView) -> object | None:
    """The activation that a norm holds inside, as timm's do, None where that does nothing."""
    if norm.op != "call_module":
        return None
    inner = getattr(seen.modules[str(norm.target)], "act", None)
    return None if isinstance(inner, nn.Identity) else inner


def _next(node: fx.Node) -> fx.Node | None:
    """The one node that goes on with what `node` made: its only reader, or the gate's product."""
    users = list(node.users)
    if len(users) == 1:
        return users[0] if len(users[0].args) == 1 else None
    products = [user for user in users if _is(user, _PRODUCTS)]
    if len(products) == 1 and not any(_is(user, _ADDITIONS) for user in users):
        return products[0]
    return None


def _pointwise_after(node: fx.Node, channels: int, seen: GraphView) -> str | None:
    channels_last = False
    while (user := _next(node)) is not None:
        pointwise = _pointwise(user, seen)
        if pointwise is not None:
            mixes = channels_last or isinstance(pointwise, Convolution)
            return str(user.target) if mixes and _reads(pointwise) == channels else None
        channels_last = channels_last or _is(user, _AXIS_MOVES)
        gate = _is(user, _PRODUCTS)
        if not (gate or _passes(user, seen)):
            return None
        node = user
    return None


def _pointwise_before(node: fx.Node, seen: GraphView) -> str | None:
    while len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if _pointwise(node, seen) is not None:
            return str(node.target)
        if not _passes(node, seen):
            return None
    return None


def _passes(node: fx.Node, seen: GraphView) -> bool:
    return _is_norm(node, seen) or _is_activation(node, seen) or _is_channelwise(node, seen)


def _branch(node: fx.Node) -> str | None:
    """Owner of the first addition downstream that happens inside a module around `node`."""
    path = str(node.target)
    stack, visited = list(node.users), set()
    while stack:
        user = stack.pop(0)
        if user in visited or user.op == "output":
            continue
        visited.add(user)
        owner = user.meta["owner"]
        inside = owner and path.startswith(f"{owner}.")
        if _is(user, _ADDITIONS) and len(user.args) == 2 and inside:
            return str(owner)
        stack.extend(user.users)
        if len(visited) > 64:
            return None
    return None


def _merge(node: fx.Node, seen: GraphView) -> str | None:
    """The module that reads the sum of a shortcut and `node`'s output behind its norm alone."""
    while len(node.users) == 1:
        (user,) = node.users
        if _is(user, _ADDITIONS) and len(user.args) == 2:
            readers = [r for r in user.users if r.op == "call_module" and r.args[:1] == (user,)]
            return str(readers[0].target) if readers else None
        plain_norm = _is_norm(user, seen) and _inner_activation(user, seen) is None
        if not plain_norm and not _is_drop(user, seen):
            return None
        node = user
    return None


def _is_drop(node: fx.Node, seen: GraphView) -> bool:
    """Whether `node` does nothing in eval mode: identity, dropout, stochastic depth."""
    if node.op != "call_module":
        return _is(node, {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d})
    name = type(seen.modules[str(node.target)]).__name__
    return "Identity" in name or "Drop" in name


def _pointwise(node: fx.Node, seen: GraphView) -> Convolution | nn.Linear | None:
    """The module that `node` calls, if it is a linear layer or mixes the channels of each pixel."""
    module = seen.modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, Convolution) and module.groups == 1:
        padded = not isinstance(module.padding, str) and any(module.padding)
        return module if {*module.kernel_size, *module.stride} == {1} and not padded else None
    return None


def _reads(pointwise: Convolution | nn.Linear) -> int:
    return pointwise.in_features if isinstance(pointwise, nn.Linear) else pointwise.in_channels


def _owner(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else str(node.meta["owner"])


def _is_norm(node: fx.Node, seen: GraphView) -> bool:
    if node.op == "call_module":
        return is_norm(seen.modules[str(node.target)])
    return _is(node, _NORM_FUNCTIONS)


def _is_activation(node: fx.Node, seen: GraphView) -> bool:
    if node.op == "call_module":
        cls = type(seen.modules[str(node.target)])
        return "activation" in cls.__module__.lower() and "Attention" not in cls.__name__
    return _is(node, _ACTIVATIONS)


def _is_channelwise(node: fx.Node, seen: GraphView) -> bool:
    if node.op == "call_module":
        name = type(seen.modules[str(node.target)]).__name__
        return any(part in name for part in _CHANNELWISE_MODULES) and "Adaptive" not in name
    return _is(node, _CHANNELWISE) or (_is(node, _PRODUCTS) and len(node.args) == 1)


def _is_pool(node: fx.Node, seen: GraphView) -> bool:
    if node.op == "call_module":
        return "Pool" in type(seen.modules[str(node.target)]).__name__
    return _is(node, _WINDOW_POOLS)
