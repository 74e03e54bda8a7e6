"""Batch norms folded into the convolutions beside them, for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pfsurgery.example import Example, example_inputs
from pfsurgery.graph import GraphView, view
from pfsurgery.modules import (
    get_module,
    is_pointwise,
    is_watched,
    parents_of,
    replace_everywhere,
)
from pfsurgery.ops.blur import Blur
from pfsurgery.ops.pool import AvgPool, MaxPool

_WITH_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"
# Their windows hold the convolution's weights and bias as they are.
_PLAIN = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")


def with_folded_norms(model: nn.Module, example: Example | None = None) -> nn.Module:
    """A copy of `model` in eval mode with its norms folded; all other weights are shared.

    What forward hooks see stays the same, and the copy calls them too.

    Args:
        model: The model; it is left as it was.
        example: What it runs on, as for `pfsurgery.optimize`.

    Raises:
        ShapeError: The model does not run on the example.
    """
    seen = view(model, example_inputs(model, example))
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    folded = copy.deepcopy(model, shared).eval()
    fold_norms(seen, folded)
    return folded


def fold_norms(seen: GraphView, model: nn.Module) -> None:
    """Move batch norms into convolutions in front of them or right behind, where that is exact.

    Convolutions that take one are replaced, so that weights which `model` shares stay.

    Args:
        seen: The view of a model of this structure.
        model: Changed in place; in eval mode.
    """
    for node, norm in _norms(seen, model):
        _fold(node, norm, seen, model)


def _norms(seen: GraphView, model: nn.Module) -> Iterator[tuple[fx.Node, nn.BatchNorm2d]]:
    """Batch norms with statistics of their own that are called once.

    Not those beside one that was not reached: in other circumstances that might be called instead.
    """
    elsewhere = {
        path.rpartition(".")[0]
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not seen.calls(path)
    }
    for node in seen.graph.nodes:
        if node.op != "call_module" or seen.calls(path := str(node.target)) != 1:
            continue
        norm = get_module(model, path)
        if (
            isinstance(norm, nn.BatchNorm2d)
            and computes_as_known(norm)
            and norm.running_var is not None
            and not is_watched(norm)
            and path not in seen.foreign_reads
            and path.rpartition(".")[0] not in elsewhere
        ):
            yield node, norm


def computes_as_known(norm: _BatchNorm) -> bool:
    """Whether it computes what torch's batch norm does, or timm's with an activation."""
    kind = f"{type(norm).__module__}.{type(norm).__qualname__}"
    return kind == _WITH_ACTIVATION or type(norm).forward is nn.BatchNorm2d.forward


def _fold(node: fx.Node, norm: nn.BatchNorm2d, seen: GraphView, model: nn.Module) -> None:
    """Move `norm` into a neighbour, if one can take it."""
    before = _convolution_before(node, norm, seen, model)
    after = None if before or _activation(norm) else _pointwise_after(node, seen, model)
    path = before or after
    if path is None:
        return
    conv = get_module(model, path)
    assert isinstance(conv, nn.Conv2d)
    folded = fuse_conv_bn_eval(conv, norm) if before else _with_norm_before(conv, norm)
    with torch.no_grad():
        for weight in folded.parameters():
            weight[weight.abs() < torch.finfo(weight.dtype).tiny] = 0
    for old, new in ((conv, folded), (norm, _activation(norm) or nn.Identity())):
        replace_everywhere(model, old, new)


def _convolution_before(
    node: fx.Node, norm: nn.BatchNorm2d, seen: GraphView, model: nn.Module
) -> str | None:
    """The convolution whose output reaches `norm` and nothing else, on a way that it may cross."""
    norm_path = str(node.target)
    while len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node.op != "call_module" or len(node.users) != 1:
            return None
        path = str(node.target)
        module = get_module(model, path)
        if _takes_a_norm(path, module, seen):
            assert isinstance(module, nn.Conv2d)
            fits = module.out_channels == norm.num_features
            return path if fits and not is_seen_between(path, norm_path, model) else None
        if not _commutes(module, norm) or is_watched(module):
            return None
    return None


def _pointwise_after(node: fx.Node, seen: GraphView, model: nn.Module) -> str | None:
    """The pointwise convolution that alone reads what `node` makes."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.op != "call_module" or len(user.args) != 1:
        return None
    path = str(user.target)
    conv = get_module(model, path)
    if not _takes_a_norm(path, conv, seen) or not isinstance(conv, nn.Conv2d):
        return None
    fits = is_pointwise(conv) and not is_seen_between(str(node.target), path, model)
    return path if fits else None


def is_seen_between(first: str, second: str, model: nn.Module) -> bool:
    """Whether a module around one of two, but not both, is watched: it sees what lies between."""
    around = set(parents_of(first)) ^ set(parents_of(second))
    return any(is_watched(get_module(model, path)) for path in around)


def _takes_a_norm(path: str, module: nn.Module, seen: GraphView) -> bool:
    """Whether `module` is a convolution whose weights are its own affair."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return (
        kind in _PLAIN
        and seen.calls(path) == 1
        and path not in seen.foreign_reads
        and not is_watched(module)
        and not hasattr(module, "parametrizations")
    )


def _commutes(module: nn.Module, norm: nn.BatchNorm2d) -> bool:
    """Whether a scale and an offset for each channel may as well come before `module`."""
    if isinstance(module, nn.Identity | AvgPool | Blur):
        return True
    rising = norm.weight is None or bool((norm.weight > 0).all())
    return isinstance(module, MaxPool) and module.window.padding_mode == "zeros" and rising


def _with_norm_before(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A pointwise convolution of what `norm` makes, as one of what it reads."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    offset: Tensor = -norm.running_mean * scale
    offset = offset if norm.bias is None else offset + norm.bias
    made = copy.deepcopy(conv)
    bias = (conv.weight[:, :, 0, 0] * offset).sum(1)
    with torch.no_grad():
        made.weight.copy_(conv.weight * scale[:, None, None])
        made.bias = nn.Parameter((bias if conv.bias is None else bias + conv.bias).detach())
    return made


def _activation(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What timm's norms with an activation do behind the norm."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) and not isinstance(act, nn.Identity) else None
