"""Where an unconverted model comes from, so that a saved conversion can be rebuilt from it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from pfsurgery.errors import RecordMismatchError, UnknownNameError, closest
from pfsurgery.example import reads_image

_ATTRIBUTE = "_pfsurgery_base"
_LOADING = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("weights", "weights_backbone"),
}
# What a configuration may be overlaid with: how images are prepared, no place of weights.
_OVERLAID = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes"}


@dataclass(frozen=True, slots=True)
class Base:
    """A library's model by name.

    Attributes:
        library: `"timm"` or `"torchvision"`.
        name: The model's name there.
        kwargs: Keyword arguments of its factory, JSON-ready.
        tag: Which of its trained weights, where timm has several; empty for the library's choice.
    """

    library: Literal["timm", "torchvision"]
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    tag: str = ""

    @property
    def weights(self) -> str:
        """The name that the library knows the trained weights by."""
        return f"{self.name}.{self.tag}" if self.tag else self.name

    def build(self) -> nn.Module:
        """The model with fresh weights.

        Raises:
            UnknownNameError: The library has no model of that name.
            RecordMismatchError: The library is unknown, or refuses the arguments; or these would
                make it read other files or fetch weights.
        """
        for key, value in self.kwargs.items():
            prepares = key == "pretrained_cfg_overlay" and isinstance(value, dict)
            if key in _LOADING and not (prepares and value.keys() <= _OVERLAID):
                raise RecordMismatchError(
                    f"{key!r} is no argument for the base of a saved model: it would load weights "
                    f"from elsewhere. Pass base= with the model itself."
                )
        if self.library == "timm":
            return _build_timm(self)
        if self.library == "torchvision":
            return _build_torchvision(self)
        raise RecordMismatchError(f"No library {self.library!r}; pass base= with the model itself.")

    def to_dict(self) -> dict[str, Any]:
        """The base as JSON-ready values."""
        values = {"library": self.library, "name": self.name, "kwargs": self.kwargs}
        return values | ({"tag": self.tag} if self.tag else {})


def _build_timm(base: Base) -> nn.Module:
    import timm

    import pfsurgery.zoo  # noqa: F401 (registers the paper's models)

    if not timm.is_model(base.name):
        folder = f"There is no folder {base.name!r}, and " if "/" in base.name else ""
        raise UnknownNameError(
            f"{folder}timm {timm.__version__} has no model {base.name!r}. "
            f"{closest(base.name, timm.list_models())}"
        )
    try:
        model: nn.Module = timm.create_model(base.name, pretrained=False, **base.kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise RecordMismatchError(
            f"timm cannot build {base.name} with {base.kwargs}: {error}"
        ) from None
    return model


def _build_torchvision(base: Base) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models()
    if base.name not in known:
        raise UnknownNameError(
            f"torchvision has no model {base.name!r}. {closest(base.name, known)}"
        )
    try:
        builder = torchvision.models.get_model_builder(base.name)
        whole = "weights_backbone" in inspect.signature(builder).parameters
        kwargs = {"weights_backbone": None, **base.kwargs} if whole else base.kwargs
        model: nn.Module = torchvision.models.get_model(base.name, weights=None, **kwargs)
    except (TypeError, ValueError) as error:
        raise RecordMismatchError(
            f"torchvision cannot build {base.name} with {base.kwargs}: {error}"
        ) from None
    return model


def set_base(model: nn.Module, base: Base) -> None:
    """Note on `model` where it comes from; deep copies and conversions keep the note."""
    model.__dict__[_ATTRIBUTE] = base


def base_of(model: nn.Module) -> Base | None:
    """Where `model` comes from, as noted by `set_base` or as timm's configuration states it."""
    noted = model.__dict__.get(_ATTRIBUTE)
    if isinstance(noted, Base):
        now = _timm_kwargs(model) if noted.library == "timm" else {}
        return replace(noted, kwargs={**noted.kwargs, **now})
    if type(model).__name__.startswith("Feature"):
        return None  # timm's feature extractors keep a part of the model that the name stands for
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not (name := config.get("architecture")):
        return None
    return Base("timm", name, _timm_kwargs(model), config.get("tag") or "")


def _timm_kwargs(model: nn.Module) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != 3 and reads_image(first):
        kwargs["in_chans"] = first.in_channels
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    if "img_size" in inspect.signature(type(model).__init__).parameters:
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if size is not None:
            kwargs["img_size"] = list(size)
    if isinstance(pool, str):
        kwargs["global_pool"] = pool
    return kwargs
