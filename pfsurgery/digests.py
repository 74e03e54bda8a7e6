"""Digests of tensors, by which what was measured or asked before is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def tensor_bytes(tensor: Tensor) -> bytes:
    """The content of a tensor of any dtype and layout, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def digest(model: nn.Module) -> str:
    """Of structure and weights, in 16 hexadecimal digits."""
    found = hashlib.sha256(str(model).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(tensor_bytes(value))
    return found.hexdigest()[:16]


def digest_of_images(batches: Iterable[Tensor]) -> str:
    """Of images (N, C, H, W), one batch each, in 16 hexadecimal digits."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(tensor_bytes(batch))
    return found.hexdigest()[:16]
