"""What flows into and out of modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pfsurgery.errors import UnsupportedSiteError

Side = Literal["input", "output"]


class _Done(Exception):
    """All that was asked for has been seen; the rest of the forward pass is not needed."""


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a call, which may be named."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


def on_input(module: nn.Module, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `take` with what each call of `module` reads."""
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: take(first_of(args, kwargs)), with_kwargs=True
    )


@torch.no_grad()
def run_watched(
    model: nn.Module, batches: Sequence[Tensor], hooks: Sequence[RemovableHandle]
) -> None:
    """Run `model` on batches (N, C, H, W) for hooks that take what they need, and remove these."""
    try:
        for batch in batches:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def capture(
    model: nn.Module,
    images: Tensor,
    wanted: Mapping[str, tuple[str, Side]],
    calls: Mapping[str, int] | None = None,
    take: Callable[[str, Tensor], Tensor] = lambda key, tensor: tensor,
) -> dict[str, Tensor]:
    """Run `model` until the wanted tensors were seen.

    Args:
        model: The model, in eval mode.
        images: One batch (N, C, H, W).
        wanted: For each key the path of a module and the side of it. Tensors are copied, since
            what follows may change them in place.
        calls: How often each module is called, once if not said; calls are concatenated along the
            batch.
        take: What to keep of a key's tensor; it is called as soon as the tensor was seen.

    Raises:
        UnsupportedSiteError: A module is called with images of several sizes.
    """
    calls = calls or dict.fromkeys(wanted, 1)
    seen: dict[str, list[Tensor]] = {key: [] for key in wanted}
    taken: dict[str, Tensor] = {}

    def keep(key: str, tensor: Tensor) -> None:
        if key in taken:
            return
        seen[key].append(tensor.detach().clone())
        if len(seen[key]) == calls[key]:
            parts = seen.pop(key)
            if len({part.shape[1:] for part in parts}) > 1:
                raise UnsupportedSiteError(
                    f"{wanted[key][0]} is called with images of several sizes, which cannot be "
                    f"fitted together: exclude it."
                )
            taken[key] = take(key, torch.cat(parts) if len(parts) > 1 else parts[0])
        if not seen:
            raise _Done

    handles = []
    for key, (path, side) in wanted.items():
        module = model.get_submodule(path)
        if side == "input":
            handles.append(on_input(module, partial(keep, key)))
        else:
            handles.append(module.register_forward_hook(lambda _, __, out, key=key: keep(key, out)))
    try:
        model(images)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return taken
