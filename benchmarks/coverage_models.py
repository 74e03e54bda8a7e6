"""The models of the coverage sweep: their names, and how each is built without weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import timm
import torch
import torchvision
from timm.models import _registry
from torch import nn

from pfsurgery.example import example_inputs

Built = tuple[nn.Module, tuple[Any, ...]]

# Ways to use a Hugging Face vision model, and the class that builds one from a configuration.
TASKS = {
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "SEMANTIC_SEGMENTATION": "AutoModelForSemanticSegmentation",
    "OBJECT_DETECTION": "AutoModelForObjectDetection",
    "UNIVERSAL_SEGMENTATION": "AutoModelForUniversalSegmentation",
    "DEPTH_ESTIMATION": "AutoModelForDepthEstimation",
    "BACKBONE": "AutoBackbone",
}
# Small, because these run on real values: which boxes survive decides what is computed.
DETECTION_SIZE = 128


class NotBuilt(Exception):
    """The model cannot be built here, for a reason that has nothing to do with pfsurgery."""


def catalogue() -> list[str]:
    """All models as library/name; first one of each family, for a run that is cut short."""
    names = _all_names()
    first = {family(name): name for name in reversed(names)}
    return sorted(names, key=lambda name: first[family(name)] != name)


def _all_names() -> list[str]:
    return [
        *(f"timm/{name}" for name in timm.list_models()),
        *(
            f"torchvision/{name}"
            for part in (torchvision.models, *_dense_parts())
            for name in torchvision.models.list_models(module=part)
        ),
        *(f"transformers/{task}/{name}" for task, name in _transformers()),
    ]


def _dense_parts() -> tuple[Any, ...]:
    return torchvision.models.segmentation, torchvision.models.detection


def _transformers() -> list[tuple[str, str]]:
    if find_spec("transformers") is None:
        return []
    from transformers.models.auto import modeling_auto

    return [
        (task.lower(), name)
        for task in TASKS
        for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    ]


def family(name: str) -> str:
    """The file that a timm or torchvision model stands in, the type of a Hugging Face one."""
    library, _, rest = name.partition("/")
    if library == "timm":
        return f"timm/{_registry._model_to_module[rest]}"
    if library == "torchvision":
        builder = torchvision.models.get_model_builder(rest)
        return f"torchvision/{builder.__module__.removeprefix('torchvision.models.')}"
    return f"transformers/{rest.partition('/')[2]}"


def build(name: str, device: str) -> Built:
    """The model in eval mode and the arguments of one forward pass, which it has not been run on.

    Args:
        name: Library/name, as in the catalogue.
        device: `meta` or `cpu`. Detectors are always built on the CPU.

    Raises:
        NotBuilt: The library cannot build it on this machine.
    """
    library, _, rest = name.partition("/")
    if library == "timm":
        return _built(lambda: timm.create_model(rest), device)
    if library == "transformers":
        return _build_transformers(*rest.split("/"), device)
    if rest in torchvision.models.list_models(module=torchvision.models.detection):
        size = {"min_size": DETECTION_SIZE, "max_size": DETECTION_SIZE}
        size = {} if "ssd" in rest else size
        detector = torchvision.models.get_model(rest, weights=None, weights_backbone=None, **size)
        return detector.eval(), ([torch.rand(3, DETECTION_SIZE, DETECTION_SIZE)],)
    extra: dict[str, Any] = {}
    if rest in torchvision.models.list_models(module=torchvision.models.segmentation):
        extra["weights_backbone"] = None
    if "inception" in rest or rest == "googlenet":
        extra["init_weights"] = False
    return _built(lambda: torchvision.models.get_model(rest, weights=None, **extra), device)


def _built(make: Callable[[], nn.Module], device: str) -> Built:
    with torch.device(device):
        model = make().eval()
        return model, example_inputs(model)


def _build_transformers(task: str, name: str, device: str) -> Built:
    import transformers

    builder = getattr(transformers, TASKS[task.upper()])
    try:
        config = transformers.CONFIG_MAPPING[name]()
    except Exception as error:
        raise NotBuilt(f"no default configuration: {short(error)}") from None
    config.architectures = []  # of which one is chosen where a task has several
    for part in (config, *vars(config).values()):
        if hasattr(part, "use_pretrained_backbone"):
            part.use_pretrained_backbone = False
    with torch.device(device):
        try:
            model = builder.from_config(config).eval()
        except Exception as error:
            raise NotBuilt(f"not built from its default configuration: {short(error)}") from None
        return model, (torch.zeros(1, *_image_shape(config)),)


def _image_shape(config: Any) -> tuple[int, int, int]:
    parts = [config, *(getattr(config, n, None) for n in ("vision_config", "backbone_config"))]
    size = next((s for p in parts if (s := getattr(p, "image_size", None))), 224)
    channels = next((c for p in parts if (c := getattr(p, "num_channels", None))), 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return channels, height, width


def short(error: Exception) -> str:
    """An error in one line, for the report."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:160]}"
