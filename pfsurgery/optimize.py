"""A copy of a model made ready for inference: norms folded, in the memory format that is faster."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from pfsurgery.errors import ShapeError, SurgeryError
from pfsurgery.example import Example, example_inputs
from pfsurgery.fold import fold_norms
from pfsurgery.fuse import speed_up_convolutions, speed_up_on_gpu, take_in_activations
from pfsurgery.graph import GraphView, view
from pfsurgery.measure.latency import MemoryFormat, first_tensor, in_format, latency
from pfsurgery.modules import copied
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.record import forget
from pfsurgery.residual import take_in_additions
from pfsurgery.scan import refuse_wrapped


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
    their weights packed for the fused kernel and take in the ReLU behind them, or the addition and
    the ReLU that end a residual block. In channels_last on a CPU that kernel also runs the
    pointwise convolutions, with the ReLU behind them, that it is seen to run faster, and other
    convolutions have their weights packed for oneDNN where that is. On a GPU one Triton kernel runs
    the bottlenecks that it is seen to run faster. Bottlenecks do not notice later changes of the
    weights, and what the example does not reach is not looked at; where a model chooses among norms
    of one module, none of these is folded. Names in the state dict differ, and the copy carries no
    record: save the model that it was made from.

    Args:
        model: The model; it is left as it was.
        example: A tensor (N, C, H, W) or a tuple of arguments that the copy is meant for; by
            default one image of the model's own input size.
        memory_format: Layout of the copy's weights, which its activations follow. By default both
            are timed on the example; a model that does not run in channels_last stays contiguous.

    Raises:
        ShapeError: The model does not run on the example.
        SurgeryError: `memory_format` is unknown, or the model cannot be copied, or is wrapped by
            DDP, FSDP or `torch.compile`.
    """
    known = ("fastest", *get_args(MemoryFormat))
    if memory_format not in known:
        raise SurgeryError(
            f"memory_format is {memory_format!r}; it must be one of {', '.join(known)}."
        )
    refuse_wrapped(model)
    args = example_inputs(model, example)
    seen = view(model, args)
    folded = copied(model).eval()
    forget(folded)
    fold_norms(seen, folded)
    take_in_activations(seen, folded)
    for module in folded.modules():
        if isinstance(module, Bottleneck):
            module.freeze()
    if memory_format == "fastest":
        made = _fastest(seen, folded, args)
    else:
        made = _in_format(seen, folded, memory_format)
    if first_tensor(args).is_cuda:
        speed_up_on_gpu(made, args)
    return made


def _in_format(seen: GraphView, model: nn.Module, memory_format: MemoryFormat) -> nn.Module:
    """A copy of `model` in a memory format, with what is faster there."""
    made = in_format(model, (), memory_format)[0]
    if memory_format == "channels_last":
        speed_up_convolutions(seen, made)
    take_in_additions(seen, made)
    return made


def _fastest(seen: GraphView, model: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    if first_tensor(args).dim() != 4:
        return _in_format(seen, model, "contiguous")
    formats: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    copies: dict[str, nn.Module] = {name: _in_format(seen, model, name) for name in formats}
    try:
        times = latency(copies, args, repeats=5, warmup=2)
    except ShapeError:  # code that takes views of feature maps runs in one format only
        return copies["contiguous"]
    return copies[min(copies, key=lambda name: times[name].median_ms)]
