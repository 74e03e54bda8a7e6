"""Peak memory of one forward pass."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pfsurgery.example import Example, example_inputs
from pfsurgery.measure.latency import first_tensor
from pfsurgery.measure.state import explained, undisturbed


@dataclass(frozen=True, slots=True)
class Memory:
    """What a forward pass without gradients holds at its worst moment.

    Attributes:
        activation_bytes: Most bytes that were alive at once beside the parameters, buffers and
            inputs. On a GPU this has the kernels' workspaces in it, on a CPU it has not.
        parameter_bytes: Bytes of parameters and buffers; what modules share counts once.
    """

    activation_bytes: int
    parameter_bytes: int


def peak_memory(model: nn.Module, example: Example | None = None) -> Memory:
    """Peak memory, in bytes, of one forward pass in eval mode without gradients.

    On a GPU: the rise of `torch.cuda.max_memory_allocated`, whose statistics are reset. Elsewhere:
    the storages of all tensors that operators return are followed until they are freed. This does
    not see memory that a kernel takes and gives back inside one operator (such as the reordered
    weights and columns of a convolution), nor what the allocator keeps.

    Args:
        model: The model; train flags, buffers and torch's random state are restored.
        example: A tensor (N, C, H, W) or a tuple of arguments; by default one image of the
            model's own input size.

    Raises:
        ShapeError: The model does not run on the example.
    """
    args = example_inputs(model, example)
    device = first_tensor(args).device
    with undisturbed(model), explained(model, args):
        peak = _cuda_peak(model, args, device) if device.type == "cuda" else _peak(model, args)
    return Memory(
        activation_bytes=peak,
        parameter_bytes=sum(
            t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
        ),
    )


def _cuda_peak(model: nn.Module, args: tuple[Any, ...], device: torch.device) -> int:
    model(*args)  # the first pass also allocates what libraries keep for good
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    model(*args)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - held)


def _peak(model: nn.Module, args: tuple[Any, ...]) -> int:
    known = [*tree_leaves(args), *model.parameters(), *model.buffers()]
    live = _LiveStorages([t for t in known if isinstance(t, Tensor)])
    with live:
        model(*args)
    return live.peak


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the storages that operators return, until each is freed.

    Attributes:
        peak: Most bytes alive at once.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive = 0
        self._sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self._alive)
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._alive += self._sizes[key]
            weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)
