"""A copy of a model made ready for inference: norms folded, in the memory format that is faster."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pfsurgery.example import Example, example_inputs
from pfsurgery.fuse import speed_up_on_gpu, speed_up_pointwise, take_in_activations
from pfsurgery.graph import GraphView, view
from pfsurgery.measure.latency import MemoryFormat, first_tensor, in_format, latency
from pfsurgery.modules import get_module, is_pointwise, is_watched, set_module
from pfsurgery.ops.blur import Blur
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.ops.pool import AvgPool, MaxPool
from pfsurgery.record import forget

# Their windows hold the convolution's weights and bias as they are.
_PLAIN = ("torch.nn.modules.conv.Conv2d", "timm.layers.conv2d_same.Conv2dSame")


def optimize(
    model: nn.Module,
    example: Example | None = None,
    *,
    memory_format: MemoryFormat | Literal["fastest"] = "fastest",
) -> nn.Module:
    """A copy of `model` for inference, in eval mode, that computes the same faster.

    Batch norm is folded into the convolution in front of it, also through a pool or a blur between
    them where that is exact, or else into a pointwise convolution right behind. Weights so small
    that they are denormal become 0: processors take a slow path for them. Fitted bottlenecks keep
    their weights packed for the fused kernel and take in the ReLU behind them; in channels_last
    that kernel also runs the pointwise convolutions that it is seen to run faster. On a GPU one
    Triton kernel runs the bottlenecks that it is seen to run faster. Later changes of the weights
    are not noticed, names in the state dict differ, and the copy carries no record: save the model
    that it was made from.

    Args:
        model: The model; it is left as it was.
        example: A tensor (N, C, H, W) or a tuple of arguments that the copy is meant for; by
            default one image of the model's own input size.
        memory_format: Layout of the copy's weights, which its activations follow. By default both
            are timed on the example.

    Raises:
        ShapeError: The model does not run on the example.
        SurgeryError: `memory_format` is unknown.
    """
    args = example_inputs(model, example)
    seen = view(model, args)
    folded = copy.deepcopy(model).eval()
    forget(folded)
    for node, norm in _norms(seen, folded):
        _fold(node, norm, seen, folded)
    take_in_activations(seen, folded)
    for module in folded.modules():
        if isinstance(module, Bottleneck):
            module.freeze()
    if memory_format == "fastest":
        memory_format = _fastest(folded, args)
    made = in_format(folded, (), memory_format)[0]
    if memory_format == "channels_last":
        speed_up_pointwise(seen, made)
    if first_tensor(args).is_cuda:
        speed_up_on_gpu(made, args)
    return made


def _fastest(model: nn.Module, args: tuple[Any, ...]) -> MemoryFormat:
    formats: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    if first_tensor(args).dim() != 4:
        return "contiguous"
    copies: dict[str, nn.Module] = {name: in_format(model, (), name)[0] for name in formats}
    times = latency(copies, args, repeats=5, warmup=2)
    return min(formats, key=lambda name: times[name].median_ms)


def _norms(seen: GraphView, model: nn.Module) -> Iterator[tuple[fx.Node, nn.BatchNorm2d]]:
    """Batch norms with statistics of their own that are called once."""
    for node in seen.graph.nodes:
        if node.op != "call_module" or seen.calls(str(node.target)) != 1:
            continue
        norm = get_module(model, str(node.target))
        if (
            isinstance(norm, nn.BatchNorm2d)
            and norm.running_var is not None
            and not is_watched(norm)
        ):
            yield node, norm


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
    set_module(model, path, folded)
    set_module(model, str(node.target), _activation(norm) or nn.Identity())


def _convolution_before(
    node: fx.Node, norm: nn.BatchNorm2d, seen: GraphView, model: nn.Module
) -> str | None:
    """The convolution whose output reaches `norm` and nothing else, on a way that it may cross."""
    while len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node.op != "call_module" or len(node.users) != 1:
            return None
        path = str(node.target)
        module = get_module(model, path)
        if _takes_a_norm(path, module, seen):
            assert isinstance(module, nn.Conv2d)
            return path if module.out_channels == norm.num_features else None
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
    return path if is_pointwise(conv) else None


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
