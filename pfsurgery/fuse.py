"""What `optimize` makes faster beside the fitted sites: by the fused kernel, or packed weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from pfsurgery.fold import is_seen_between
from pfsurgery.graph import GraphView
from pfsurgery.kernels.fused import KERNELS
from pfsurgery.measure.latency import latency
from pfsurgery.modules import get_module, is_pointwise, is_watched, replace_everywhere
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.packed import packed
from pfsurgery.residual import LastReLU, adds, is_plain_call, reader, site_of
from pfsurgery.rewrite import inherit
from pfsurgery.sites import Geometry, geometry_of
from pfsurgery.structure import Run, Structure

_SMALL = 1 << 16  # numbers; what is over in a few microseconds is timed more often
_OWN = vars(nn.Conv2d(1, 1, 1)).keys()  # attributes of every convolution
_GAIN = 0.95  # of a convolution's time; a kernel that saves less is not worth having

Behind = Literal["nothing", "relu", "addition"]
Form = Literal["stock", "packed", "kernel"]


def take_in_activations(seen: GraphView, model: nn.Module) -> None:
    """Move each ReLU that alone reads a bottleneck into it."""
    for node in seen.graph.nodes:
        if node.op != "call_module":
            continue
        bottleneck = get_module(model, site_of(node, model))
        if isinstance(bottleneck, Bottleneck) and not is_watched(bottleneck):
            relu = _relu_after(node, seen, model)
            if relu is not None:
                _take_in(relu, bottleneck, model)


def _take_in(relu: nn.Module, bottleneck: Bottleneck, model: nn.Module) -> None:
    bottleneck.relu = True
    replace_everywhere(model, relu, nn.Identity())


def _relu_after(node: fx.Node, seen: GraphView, model: nn.Module) -> nn.Module | None:
    """The ReLU that reads what `node` makes, with nothing between; both are called once."""
    relu = reader(node, model)
    if relu is None or not is_plain_call(relu, nn.ReLU, model):
        return None
    path = str(relu.target)
    once = seen.calls(str(node.target)) == seen.calls(path) == 1
    if not once or not _is_all_reached(path.rpartition(".")[0], seen):
        return None
    return None if is_seen_between(site_of(node, model), path, model) else get_module(model, path)


def _is_all_reached(path: str, seen: GraphView) -> bool:
    """Whether every layer in a module ran: one that did not may be run in place of another."""
    return all(
        seen.calls(name) or name in seen.passes
        for name, module in seen.modules.items()
        if (not path or name.startswith(f"{path}.")) and [*module.parameters(recurse=False)]
    )


def speed_up_convolutions(seen: GraphView, model: nn.Module) -> None:
    """Put a faster convolution in the place of each, as timed now: packed, or the kernel's.

    The kernel computes pointwise ones. The ReLU behind one is timed too, as the kernel takes it in.
    With those at the end of a residual block the addition and the ReLU behind that are, as
    `take_in_additions` leaves them to the kernel.
    """
    fastest: dict[tuple[Geometry, torch.dtype, bool, tuple[int, ...], Behind], Form] = {}
    for node in _convolutions(seen, model):
        conv = get_module(model, str(node.target))
        assert isinstance(conv, nn.Conv2d)
        shape = tuple(node.meta["in_shape"])
        relu, follows = _relu_after(node, seen, model), reader(node, model)
        behind: Behind = "nothing" if relu is None else "relu"
        if follows is not None and adds(follows):
            behind = "addition"
        fits = is_pointwise(conv) and not _has_more(conv)
        key = (geometry_of(conv), conv.weight.dtype, fits, shape, behind)
        if key not in fastest:
            fastest[key] = _fastest_form(conv, fits, shape, behind)
        if fastest[key] == "packed":
            replace_everywhere(model, conv, packed(conv, shape))
        elif fastest[key] == "kernel":
            made = _as_bottleneck(conv)
            inherit(made, conv)
            replace_everywhere(model, conv, made)
            if relu is not None:
                _take_in(relu, made, model)


def _fastest_form(conv: nn.Conv2d, fits: bool, shape: tuple[int, ...], behind: Behind) -> Form:
    """What computes a convolution, and what is behind it, fastest; the kernel if it `fits`."""
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(shape).to(conv.weight.dtype, memory_format=torch.channels_last)
    form: Form = "stock"
    best, other = conv, packed(conv, shape)
    if other.is_packed and _agree(other, conv, x) and _is_faster(other, conv, x):
        form, best = "packed", other
    if not fits:
        return form
    made = _as_bottleneck(conv)
    after: nn.Module = made
    before: nn.Module = best
    if behind == "relu":
        made.relu = True
        before = nn.Sequential(best, nn.ReLU(inplace=True))
    elif behind == "addition":
        made.summed = made.raised = True
        with torch.no_grad():
            shortcut = conv(x)
        after, before = _BlocksEnd(made, shortcut), _BlocksEnd(best, shortcut)
    return "kernel" if _is_faster(after, before, x) else form


def _has_more(conv: nn.Conv2d) -> bool:
    """Whether a convolution carries what a bottleneck in its place would not."""
    own = vars(conv).keys() <= _OWN and not conv._modules and not conv._buffers
    return not own or not conv._parameters.keys() <= {"weight", "bias"}


def _agree(fast: nn.Module, conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether oneDNN computes what torch does: on some narrow inputs it does not."""
    with torch.no_grad():
        made, wanted = fast(x).float(), conv(x).float()
    close = torch.finfo(x.dtype).eps ** 0.5 * wanted.abs().max()
    return bool(((made - wanted).abs() <= close).all())


class _BlocksEnd(nn.Module):
    """How a residual block ends: a convolution, the addition of the shortcut, a ReLU."""

    def __init__(self, conv: nn.Module, shortcut: Tensor) -> None:
        super().__init__()
        self.conv, self.shortcut, self.relu = conv, shortcut, LastReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        made += self.shortcut
        raised: Tensor = self.relu(made)
        return raised


def speed_up_on_gpu(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Let one Triton kernel run the bottlenecks that it runs faster, as timed now on these inputs.

    Args:
        model: The model on a GPU, in the layout that it is to have; changed in place.
        args: What it is called with.
    """
    read: dict[Bottleneck, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, inputs: read.update({module: inputs[0].detach().clone()})
        )
        for module in model.modules()
        if isinstance(module, Bottleneck) and module.fits_gpu_kernel
    ]
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    for module, x in read.items():
        if x.is_cuda:
            fused = copy.deepcopy(module)
            fused.on_gpu = True
            module.on_gpu = _is_faster(fused, module, x)


def _is_faster(after: nn.Module, before: nn.Module, x: Tensor) -> bool:
    repeats = 9 if x.numel() > _SMALL else 45
    taken = latency({"before": before, "after": after}, x, repeats=repeats, warmup=2)
    return taken["after"].median_ms < _GAIN * taken["before"].median_ms


def _convolutions(seen: GraphView, model: nn.Module) -> Iterator[fx.Node]:
    """Calls of convolutions on the CPU that are called once."""
    for node in seen.graph.nodes:
        if node.op != "call_module" or seen.calls(path := str(node.target)) != 1:
            continue
        conv = get_module(model, path)
        if type(conv) is not nn.Conv2d:
            continue
        inside = isinstance(get_module(model, path.rpartition(".")[0]), Bottleneck)
        computed = conv.weight.dtype in KERNELS and conv.weight.device.type == "cpu"
        fits = computed and len(node.meta["in_shape"]) == 4
        free = not is_watched(conv) and path not in seen.foreign_reads
        if free and fits and not inside:
            yield node


def _as_bottleneck(conv: nn.Conv2d) -> Bottleneck:
    """A pointwise convolution as a bottleneck whose columns are the channels as they are."""
    run = Run("tap", 0, 0, 1, 1, tuple(range(conv.in_channels)))
    with torch.random.fork_rng(devices=[]):
        made = Bottleneck(geometry_of(conv), Structure("columns", None, (run,), None, 0.0)).eval()
    with torch.no_grad():
        made.expand.weight = conv.weight
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        made.expand.bias = nn.Parameter(bias.detach())
    made.to(memory_format=torch.channels_last).freeze()
    return made
