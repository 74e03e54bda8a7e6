"""Shadows: copies of a model's structure that run without its weights or real data.

What a model does to shapes can be seen without its arithmetic. A shadow shares the structure of
the caller's model, its tensors have no storage where that is possible, and what is done to it never
reaches the model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pfsurgery.errors import ShapeError, SurgeryError
from pfsurgery.modules import gpus_of

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

_ACTIVATIONS = {
    *(nn.functional.relu, nn.functional.relu6, nn.functional.leaky_relu, nn.functional.elu),
    *(nn.functional.gelu, nn.functional.mish, nn.functional.softplus),
    *(nn.functional.hardswish, nn.functional.hardsigmoid),
}

Result = TypeVar("Result")

# Set by transformers on a model that has run: the hooks which collect its hidden states are in
# place. A shadow, whose hooks are gone, has to set them up again.
_HOOKED = "_output_capturing_hooks_installed"


def dry_run(
    model: nn.Module,
    example: tuple[Any, ...],
    edit: Callable[[nn.Module], object] = lambda shadow: None,
) -> tuple[Any, bool]:
    """What `model` would return, by one eval-mode forward pass without real data.

    Args:
        model: The model; it is left alone.
        example: Its positional arguments.
        edit: Changes the shadow before it runs, to see what a conversion would do.

    Returns:
        What it returns, with a (shape, dtype) in place of each tensor, and whether it had to run on
        real values, so that shapes may depend on them.

    Raises:
        SurgeryError: `edit` raised it.
        ShapeError: The model cannot run on the example.
    """

    def run(shadow: nn.Module, inputs: tuple[Any, ...]) -> Any:
        edit(shadow)
        return described(shadow(*inputs))

    return on_shadow(model, example, run)


def on_shadow(
    model: nn.Module,
    example: tuple[Any, ...],
    work: Callable[[nn.Module, tuple[Any, ...]], Result],
) -> tuple[Result, bool]:
    """What `work` does with a shadow of `model` and its inputs, and whether these were real.

    Tries tensors without storage first and the real ones last, for a model whose control flow
    depends on values.
    """
    failure: Exception | None = None
    gpus = gpus_of(model)
    for make in (_meta_shadow, _fake_shadow, _real_shadow):
        try:
            shadow, convert, context = make(model)
            with context, torch.no_grad(), torch.random.fork_rng(devices=gpus), ByShape():
                inputs = tree_map_only(Tensor, convert, example)
                return work(shadow, inputs), make is _real_shadow
        except SurgeryError:
            raise
        except Exception as error:
            failure = error
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    raise ShapeError(
        f"{type(model).__name__} cannot run on an example of shape {_listed(shapes)}: {failure} "
        f"Pass example= with an input that the model takes."
    ) from failure


def described(value: Any) -> Any:
    """`value` with a (shape, dtype) in place of each tensor, and objects by class and fields."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(described(item) for item in value)]
    if hasattr(value, "__dict__"):
        return [type(value).__name__, {key: described(item) for key, item in vars(value).items()}]
    return type(value).__name__


class ByShape(TorchFunctionMode):
    """Activations, norms and LSTMs of tensors without storage by shapes alone.

    PyTorch finds these shapes by Python code that takes a millisecond or more for each call.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
            return func(*args, **kwargs)
        if func in _ACTIVATIONS:
            return args[0] if kwargs.get("inplace") else torch.empty_like(args[0])
        if func is nn.functional.batch_norm:
            return torch.empty_like(args[0])
        if func is nn.functional.layer_norm:
            normalized = tuple(args[1])
            if tuple(args[0].shape[-len(normalized) :]) == normalized:
                return torch.empty_like(args[0], memory_format=torch.contiguous_format)
        if func == torch.lstm and isinstance(args[1], list | tuple):
            directions = 1 + args[7]
            shape = (*args[0].shape[:-1], directions * args[1][0].shape[-1])
            return args[0].new_empty(shape), *args[1]
        return func(*args, **kwargs)


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(str(shape) for shape in shapes) or "(no tensor)"


Shadow = tuple[nn.Module, Callable[[Tensor], Tensor], Any]


def on_meta(model: nn.Module) -> nn.Module:
    """The shadow without storage."""
    return shadow_of(model, _to_meta)


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _meta_shadow(model: nn.Module) -> Shadow:
    return on_meta(model), _to_meta, nullcontext()


def _fake_shadow(model: nn.Module) -> Shadow:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def convert(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor)

    return shadow_of(model, convert), convert, _quietly(mode)


@contextmanager
def _quietly(mode: Any) -> Iterator[None]:
    """Run in a fake-tensor mode that does not log the failures which `view` handles."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with mode:
            yield
    finally:
        log.setLevel(level)


def _real_shadow(model: nn.Module) -> Shadow:
    """Shares the parameters, which a forward pass does not change, and copies all else."""
    pointers = {parameter.data_ptr() for parameter in model.parameters()}

    def convert(tensor: Tensor) -> Tensor:
        return tensor if tensor.data_ptr() in pointers else tensor.clone()

    return shadow_of(model, convert), Tensor.clone, nullcontext()


def shadow_of(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of `model`'s structure in eval mode, without hooks, its tensors replaced by `convert`.

    The deep copy never reaches a tensor: all of them are in its memo beforehand.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_of(module):
            if id(tensor) in memo:
                continue
            converted = convert(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                converted = nn.Parameter(converted, requires_grad=False)
            memo[id(tensor)] = converted
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        for hooks in HOOKS:
            getattr(module, hooks, {}).clear()
        module.__dict__.pop(_HOOKED, None)
    return shadow.eval()


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for values in (module._parameters, module._buffers, module.__dict__):
        for value in values.values():
            if isinstance(value, Tensor):
                yield value
