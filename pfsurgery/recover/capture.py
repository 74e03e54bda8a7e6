"""What flows into and out of modules while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Side = Literal["input", "output"]


class _Done(Exception):
    """All that was asked for has been seen; the rest of the forward pass is not needed."""


@torch.no_grad()
def capture(
    model: nn.Module, images: Tensor, wanted: Mapping[str, tuple[str, Side]], calls: int = 1
) -> dict[str, Tensor]:
    """Run `model` until the wanted tensors were seen.

    Args:
        model: The model, in eval mode.
        images: One batch (N, C, H, W).
        wanted: For each key the path of a module and the side of it. Tensors are copied, since
            what follows may change them in place.
        calls: How often each module is called; calls are concatenated along the batch.
    """
    seen: dict[str, list[Tensor]] = {key: [] for key in wanted}

    def keep(key: str, tensor: Tensor) -> None:
        seen[key].append(tensor.detach().clone())
        if all(len(tensors) == calls for tensors in seen.values()):
            raise _Done

    handles = []
    for key, (path, side) in wanted.items():
        module = model.get_submodule(path)
        if side == "input":
            handles.append(
                module.register_forward_pre_hook(lambda _, args, key=key: keep(key, args[0]))
            )
        else:
            handles.append(module.register_forward_hook(lambda _, __, out, key=key: keep(key, out)))
    try:
        model(images)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.cat(tensors) for key, tensors in seen.items() if tensors}


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """What the model returns for all batches, the first tensor of a structured output."""
    made = [model(batch) for batch in batches]
    return torch.cat([m if isinstance(m, Tensor) else _first_tensor(m) for m in made])


def _first_tensor(structured: object) -> Tensor:
    from torch.utils._pytree import tree_leaves

    return next(leaf for leaf in tree_leaves(structured) if isinstance(leaf, Tensor))
