"""Open a model by name or directory, with or without trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pfsurgery.base import Base, base_of, set_base
from pfsurgery.checkpoint import HUB, load
from pfsurgery.errors import RecordMismatchError, SurgeryError, UnknownNameError
from pfsurgery.record import has_record


def open_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model in eval mode, ready to be converted or compared.

    Args:
        name: A directory that `save` wrote, `hf-hub:USER/NAME`, the name of a timm model,
            or `torchvision/` and the name of a torchvision model.
        pretrained: Take the library's trained weights, from the hub or its local cache.
        checkpoint: File with weights instead (`.safetensors`, or `.pth` read without unpickling
            code).
        num_classes: Number of outputs, where it differs from the library's default.
        kwargs: Further arguments of the library's factory.

    Raises:
        UnknownNameError: The library has no such model; the message lists the closest names. Or
            a model and a folder both have that name.
        RecordMismatchError: The directory or checkpoint does not fit; the message names it.
        SurgeryError: The hub cannot be reached.
    """
    if name.startswith(HUB) or _is_folder(name):
        if checkpoint is not None or num_classes is not None or kwargs:
            raise SurgeryError(
                f"{name} is a saved model with weights and arguments of its own: leave out "
                f"checkpoint, num_classes and model arguments."
            )
        return load(name)
    name = name.removeprefix("timm/")
    library, _, rest = name.rpartition("/")
    base = Base(
        "torchvision" if library == "torchvision" else "timm",
        rest if library == "torchvision" else name,
        {**({"num_classes": num_classes} if num_classes else {}), **(kwargs or {})},
    )
    return _opened(base, pretrained, checkpoint)


def _is_folder(name: str) -> bool:
    """Whether a folder is meant.

    Raises:
        UnknownNameError: A model of timm's has the same name.
    """
    if not name or not Path(name).is_dir():
        return False
    import timm

    if timm.is_model(name):
        raise UnknownNameError(
            f"{name} is a model of timm's, and a folder here: write timm/{name} for the one, "
            f"./{name} for the other."
        )
    return True


def open_original(
    converted: nn.Module, *, pretrained: bool = True, checkpoint: str | Path | None = None
) -> nn.Module:
    """The model that `converted` was made from, with trained weights, in eval mode.

    Args:
        converted: A model that was loaded by name or directory.
        pretrained: Take the library's trained weights, from the hub or its local cache.
        checkpoint: File with the original's weights instead.

    Raises:
        RecordMismatchError: It is not known where the model comes from, or the checkpoint does not
            fit.
        SurgeryError: There are no trained weights with the model's number of classes; or the hub
            cannot be reached.
    """
    base = base_of(converted)
    if base is None:
        raise RecordMismatchError(
            "The model does not say what it was converted from; pass the original in Python: "
            "pfsurgery.reconstruct(model, original, images)."
        )
    if checkpoint is None and not (pretrained and _hub_fits(base)):
        raise SurgeryError(
            f"The original {base.name} is needed with the weights that were converted: pass "
            f"--checkpoint FILE (checkpoint= in Python)."
        )
    return _opened(base, pretrained, checkpoint)


def _hub_fits(base: Base) -> bool:
    """Whether the library's weights have the classes asked for, so that no layer stays random."""
    classes = base.kwargs.get("num_classes")
    if base.library != "timm" or classes is None:
        return True
    import timm

    config = timm.get_pretrained_cfg(base.weights)
    return config is not None and bool(config.num_classes == classes)


def _opened(base: Base, pretrained: bool, checkpoint: str | Path | None) -> nn.Module:
    model = _pretrained(base) if pretrained and checkpoint is None else base.build()
    if checkpoint is not None:
        _load_checkpoint(model, Path(checkpoint))
    if not has_record(model):  # one of the paper's models says itself what it was made from
        set_base(model, base)
    return model.eval()


def _pretrained(base: Base) -> nn.Module:
    base.build()  # names and arguments are checked before the network is asked
    try:
        if base.library == "timm":
            import timm

            model: nn.Module = timm.create_model(base.weights, pretrained=True, **base.kwargs)
        else:
            import torchvision

            model = torchvision.models.get_model(base.name, weights="DEFAULT", **base.kwargs)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise SurgeryError(
            f"The trained weights of {base.weights} cannot be had ({type(error).__name__}: "
            f"{reason[0] if reason else 'no details'}). Without a connection to the hub, pass "
            f"--checkpoint FILE (checkpoint= in Python), or --no-pretrained for random weights."
        ) from None
    return model


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    from timm.models import load_checkpoint

    if not path.is_file():
        raise RecordMismatchError(f"There is no checkpoint {path}.")
    try:
        load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = " ".join(lines[1:3] if len(lines) > 1 else lines)
        raise RecordMismatchError(
            f"{path} does not fit {type(model).__name__} or is no checkpoint: {shown[:400]}"
        ) from None
