"""Look up and set submodules by their dotted path, and ask what they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pfsurgery.errors import RecordMismatchError, SurgeryError, closest

Model = TypeVar("Model", bound=nn.Module)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # its submodules, hooks and the like


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`.

    Raises:
        RecordMismatchError: There is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules()]
        raise RecordMismatchError(
            f"{type(model).__name__} has no module {path!r}. {closest(path, known)}"
        ) from None


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, where a module already is.

    Raises:
        RecordMismatchError: There is no module at `path`.
    """
    old = get_module(model, path)
    parent_path, _, name = path.rpartition(".")
    for holder in model.modules():  # before `module` is one of them: it may hold what it replaces
        _replace_in_containers(holder, old, module)
    get_module(model, parent_path)._modules[name] = module


def set_at(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Put one module at several paths.

    Raises:
        RecordMismatchError: There is no module at one of them.
    """
    for path in paths:
        set_module(model, path, module)


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new`, in the mode of `old`, at all paths at which `model` holds `old`."""
    new.train(old.training)
    set_at(model, paths_of(model, old), new)


def paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    """All paths at which `model` holds `module`; more than one where it is shared."""
    return [path for path, m in model.named_modules(remove_duplicate=False) if m is module]


def parents_of(path: str) -> list[str]:
    """Paths of the modules around the one at `path`, the outermost first, without the model."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _replace_in_containers(holder: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module in plain lists and the like: some models run the layers in such a one."""
    for key, value in vars(holder).items():
        if key in _OF_EVERY_MODULE:
            continue
        if type(value) is list:
            value[:] = [new if item is old else item for item in value]
        elif type(value) is tuple and any(item is old for item in value):
            holder.__dict__[key] = tuple(new if item is old else item for item in value)
        elif type(value) is dict:
            value.update({name: new for name, item in value.items() if item is old})


def is_watched(module: nn.Module) -> bool:
    """Whether someone watches what `module` reads or makes, or the gradients, or runs in its place.

    That is by a hook, or by a `forward` that was put on this very object, as accelerate does.
    """
    return bool(
        "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution mixes the channels of single pixels, all with all."""
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def number_of_classes(model: nn.Module) -> int | None:
    """What the model says in `num_classes`, or the width of its last linear layer; None if neither.

    A model without a classifier, where timm says 0, has none.
    """
    told = getattr(model, "num_classes", None)
    if isinstance(told, int):
        return told or None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else None


def gpus_of(*models: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters; others need not be woken."""
    return sorted(
        {p.device.index for m in models for p in m.parameters() if p.device.type == "cuda"}
    )


def copied(model: Model) -> Model:
    """A deep copy.

    Raises:
        SurgeryError: It cannot be made.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise SurgeryError(
            f"{type(model).__name__} cannot be copied: {error} If a tensor's history is in the "
            f"way, run the model once under torch.no_grad() before; a policy of rules can convert "
            f"it in place, with convert_."
        ) from error


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """As `Module.to(memory_format=layout)`, which fails on kernels of three dimensions."""

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor

    model._apply(laid_out)  # type: ignore[no-untyped-call]
