"""Parameters, multiply-adds, element operations and activations of one forward pass.

fvcore's tracer finds the operators; the handles that count them are ours. Each operator goes into
one of two columns:

* **MACs**: multiply-adds of convolutions, linear layers and matrix products (attention included).
  One multiplication with its addition is one MAC; biases come free.
* **Element operations**: everything that works element by element.

| operator | element operations |
|---|---|
| max-pool, window of k elements | k - 1 comparisons per output |
| average pool, window of k elements | k - 1 additions and a multiplication per output |
| sums, means, maxima | 1 per input |
| addition, multiplication, comparison, activation function | 1 per output |
| padding, roll, concatenation, gather: data that is moved | 1 per output |
| norm with stored statistics, norm with its own | 2, 5 per output |
| softmax | 4 per output |
| linear, cubic interpolation in d dimensions | 2 * 2^d - 1, 2 * 4^d - 1 per output |

Windows are counted as if they never met the border. Views (reshape, slice, transpose), casts and
operations on single numbers count zero.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pfsurgery.errors import ShapeError, SurgeryError
from pfsurgery.example import Example, example_inputs
from pfsurgery.measure.state import explained, undisturbed

Value = torch._C.Value
Handle = Callable[[list[Value], list[Value]], "Counter[str]"]


@dataclass(frozen=True, slots=True)
class Count:
    """What one forward pass of a model holds and does, for the whole example batch.

    Attributes:
        parameters: Number of parameters; one that several modules share counts once.
        macs: Multiply-adds of convolutions, linear layers and matrix products.
        element_ops: Comparisons, additions, multiplications, activations and moves of single
            elements: pooling, padding, norms and all else that is not in `macs`.
        activations: Output elements of the operators in `macs`.
        uncounted: Operators that are in no column, with the number of their calls.
    """

    parameters: int
    macs: int
    element_ops: int
    activations: int
    uncounted: Mapping[str, int]


def count(model: nn.Module, example: Example | None = None) -> Count:
    """Count parameters, MACs, element operations and activations of one forward pass.

    The model runs once, in eval mode; its train flags, its buffers and torch's random state are
    restored.

    Args:
        model: Any model that TorchScript can trace, with real weights: on the meta device nothing
            can be traced.
        example: A tensor (N, C, H, W) or a tuple of arguments; by default one image of the
            model's own input size. Counts are for the whole batch.

    Raises:
        ShapeError: The model does not run on the example, or returns no tensor.
        SurgeryError: The model runs but cannot be traced.
    """
    model = getattr(model, "_orig_mod", model)
    args = example_inputs(model, example)
    with undisturbed(model), _quiet():
        from fvcore.nn.jit_analysis import JitModelAnalysis

        flat = _Flat(model, args)
        analysis = (
            JitModelAnalysis(flat, flat.tensors)
            .set_op_handle(**_handles())
            .unsupported_ops_warnings(False)
            .uncalled_modules_warnings(False)
            .tracer_warnings("none")
        )
        try:
            found: Counter[str] = analysis.by_operator()
        except (SurgeryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            with explained(model, args):
                model(*args)
            raise SurgeryError(
                f"{type(model).__name__} runs on the example, but its operators cannot be counted "
                f"because TorchScript cannot trace it: {error}"
            ) from error
        uncounted = Counter[str](analysis.unsupported_ops())
    totals = {"macs", "element_ops", "activations"}
    uncounted.update({name: calls for name, calls in found.items() if name not in totals})
    return Count(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=int(found["macs"]),
        element_ops=int(found["element_ops"]),
        activations=int(found["activations"]),
        uncounted=dict(sorted(uncounted.items())),
    )


class _Flat(nn.Module):
    """The model as the tracer wants it: tensors in, a tuple of tensors out.

    It registers the model's parameters but not the model, so that fvcore hangs no hooks on it.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        super().__init__()
        self._model = (model,)
        self._leaves, self._spec = tree_flatten(args)
        self.tensors = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))
        for index, parameter in enumerate(model.parameters()):
            self.register_parameter(f"parameter{index}", parameter)
        for index, buffer in enumerate(model.buffers()):
            self.register_buffer(f"buffer{index}", buffer)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        (model,) = self._model
        output = model(*tree_unflatten(leaves, self._spec))
        found = tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if not found:
            raise ShapeError(
                f"{type(model).__name__} returned {type(output).__name__}, in which no tensor was "
                "found; wrap it so that it returns a tensor, or a tuple, list or dict of tensors."
            )
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No deprecation warnings of TorchScript, and no fused attention that hides its products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


# Element operations by operator, its name without `aten::`. The in-place forms (`add_`) follow.
_PER_OUTPUT = {
    """
    abs add bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min cos div elu eq
    erf exp floor floor_divide fmod ge gelu gt hardsigmoid hardswish hardtanh le leaky_relu log
    log_sigmoid logical_and logical_not logical_or lt maximum minimum mish mul ne neg pow prelu
    reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin softplus sqrt
    square sub tanh threshold where
    """: 1,
    """
    cat channel_shuffle clone col2im constant_pad_nd copy embedding flip gather im2col index
    index_add index_copy index_put index_select masked_fill pad pixel_shuffle pixel_unshuffle
    reflection_pad1d reflection_pad2d repeat repeat_interleave replication_pad1d
    replication_pad2d roll scatter scatter_add stack take_along_dim tril triu
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    """: 1,
    "addcdiv addcmul glu": 2,
    "lerp upsample_linear1d": 3,
    "log_softmax softmax": 4,
    "group_norm instance_norm layer_norm rms_norm": 5,
    "upsample_bilinear2d": 7,
    "upsample_trilinear3d": 15,
    "upsample_bicubic2d": 31,
}
_PER_INPUT = {
    "all amax amin any argmax argmin cumsum max mean min prod sum": 1,
    "frobenius_norm linalg_vector_norm norm": 2,
    "std std_mean var var_mean": 3,
}
# Views and the like that fvcore does not know to be free.
_FREE = """
    alpha_dropout as_strided diagonal dropout_ expand_as feature_dropout linspace meshgrid movedim
    ones_like reshape_as squeeze_ swapaxes tensor_split unflatten unfold view_as
"""


def _handles() -> dict[str, Handle | None]:
    """Handles by operator; `None` where fvcore should know that there is nothing to count."""
    handles: dict[str, Handle] = {
        "_convolution": _convolution,
        "_convolution_mode": _convolution,
        "linear": _linear,
        "mm": _product,
        "mv": _product,
        "bmm": _product,
        "dot": _product,
        "matmul": _product,
        "addmm": _added_product,
        "addmv": _added_product,
        "baddbmm": _added_product,
        "einsum": _einsum,
        "scaled_dot_product_attention": _attention,
        "batch_norm": _batch_norm,
    }
    for dims in (1, 2, 3):
        handles[f"max_pool{dims}d"] = _window_pool(-1)
        handles[f"max_pool{dims}d_with_indices"] = _window_pool(-1)
        handles[f"avg_pool{dims}d"] = _window_pool(0)
        handles[f"adaptive_max_pool{dims}d"] = _adaptive_pool(dims, -1)
        handles[f"adaptive_avg_pool{dims}d"] = _adaptive_pool(dims, 0)
    for names, each in _PER_OUTPUT.items():
        for name in names.split():
            handles[name] = handles[f"{name}_"] = _per_output(each)
    for names, each in _PER_INPUT.items():
        handles.update(dict.fromkeys(names.split(), _per_input(each)))
    counted = {f"aten::{name}": _or_uncounted(f"aten::{name}", h) for name, h in handles.items()}
    return {**counted, **{f"aten::{name}": None for name in _FREE.split()}}


class _UnknownShape(Exception):
    """The trace does not say how large a tensor is, or which constant was passed."""


def _or_uncounted(name: str, handle: Handle) -> Handle:
    def counted(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
        try:
            return handle(inputs, outputs)
        except _UnknownShape:
            return Counter({name: 1})

    return counted


def _shape(value: Value) -> list[int]:
    if not value.isCompleteTensor():
        raise _UnknownShape
    kind: Any = value.type()
    sizes: list[int] = kind.sizes()
    return sizes


def _size(value: Value) -> int:
    shape = _shape(value)
    return prod(shape) if shape else 0


def _ints(value: Value) -> list[int]:
    whole: Any = value.toIValue()
    found: list[Any] = (
        whole if isinstance(whole, list) else [v.toIValue() for v in value.node().inputs()]
    )
    if not found or not all(isinstance(number, int) for number in found):
        raise _UnknownShape
    return found


def _macs(outputs: list[Value], each: int) -> Counter[str]:
    size = prod(_shape(outputs[0]))
    return Counter(macs=size * each, activations=size)


def _convolution(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
    transposed = len(inputs) > 7 and bool(inputs[6].toIValue())
    each = prod(_shape(inputs[1])[1:])
    size = prod(_shape(outputs[0]))
    return Counter(macs=each * (_size(inputs[0]) if transposed else size), activations=size)


def _linear(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
    return _macs(outputs, _shape(inputs[1])[-1])


def _product(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
    return _macs(outputs, _shape(inputs[0])[-1])


def _added_product(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
    return _macs(outputs, _shape(inputs[1])[-1])


def _einsum(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
    """Operands are contracted from left to right, as torch does by default."""
    equation = str(inputs[0].toIValue()).replace(" ", "")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    left, arrow, right = equation.partition("->")
    operands = [
        _labels(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)
    ]
    extent: dict[str, int] = {}
    for labels, shape in zip(operands, shapes, strict=True):
        for label, size in zip(labels, shape, strict=True):
            extent[label] = max(size, extent.get(label, 1))
    if arrow:
        result = set(_labels(right, len(_shape(outputs[0]))))
    else:
        result = {label for label in extent if len(label) > 1 or left.count(label) == 1}
    if len(operands) == 1:
        return Counter(element_ops=prod(shapes[0]))
    macs, held = 0, set(operands[0])
    for index, labels in enumerate(operands[1:], start=2):
        met = held.union(labels)
        macs += prod(extent[label] for label in met)
        held = met & result.union(*operands[index:])
    return Counter(macs=macs, activations=prod(_shape(outputs[0])))


def _labels(term: str, rank: int) -> list[str]:
    """One label per axis; the axes of an ellipsis are `..1`, `..2`, from the last to the first."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"..{axis}" for axis in range(hidden, 0, -1)), *after]


def _attention(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
    query, key, value = (_shape(v) for v in inputs[:3])
    scores = prod(query[:-1]) * key[-2]
    return Counter(
        macs=scores * (query[-1] + value[-1]),
        element_ops=scores * 5,
        activations=prod(_shape(outputs[0])),
    )


def _batch_norm(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
    own_statistics = bool(inputs[5].toIValue())
    return Counter(element_ops=_size(outputs[0]) * (5 if own_statistics else 2))


def _per_output(each: int) -> Handle:
    return lambda inputs, outputs: Counter(element_ops=_size(outputs[0]) * each)


def _per_input(each: int) -> Handle:
    return lambda inputs, outputs: Counter(
        element_ops=max(_size(inputs[0]), _size(outputs[0])) * each
    )


def _window_pool(extra: int) -> Handle:
    def handle(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
        return Counter(element_ops=_size(outputs[0]) * (prod(_ints(inputs[1])) + extra))

    return handle


def _adaptive_pool(dims: int, extra: int) -> Handle:
    def handle(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
        given, made = _shape(inputs[0]), _shape(outputs[0])
        axes = zip(given[-dims:], made[-dims:], strict=True)
        reads = prod(
            sum(ceil((i + 1) * size / bins) - i * size // bins for i in range(bins))
            for size, bins in axes
        )
        return Counter(element_ops=prod(made[:-dims]) * reads + extra * prod(made))

    return handle
