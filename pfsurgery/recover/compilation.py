"""Models under `torch.compile`, as a run is told."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from pfsurgery.errors import UnknownNameError, closest
from pfsurgery.recover.config import FinetuneConfig


def check_backend(config: FinetuneConfig) -> None:
    """Raise an UnknownNameError where `torch.compile` has no backend of that name."""
    if config.compile == "no":
        return
    from torch._dynamo import list_backends

    names = list_backends(exclude_tags=())
    if config.compile not in names:
        raise UnknownNameError(
            f"torch.compile has no backend {config.compile!r}. {closest(config.compile, names)}"
        )


def compiled(model: nn.Module, config: FinetuneConfig) -> nn.Module:
    """The model as its steps call it."""
    if config.compile == "no":
        return model
    return cast(nn.Module, torch.compile(model, backend=config.compile))
