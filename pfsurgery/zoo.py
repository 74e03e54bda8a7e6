"""The networks of Han et al., "Learning Features with Parameter-Free Layers" (ICLR 2022).

Each is a timm model, converted. Importing this module registers them with timm:

    import pfsurgery.zoo
    model = timm.create_model("resnet50_hybrid.pf")

Weights are random; `load_paper_checkpoint` takes those that the paper's authors released.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn

from pfsurgery.base import Base, set_base
from pfsurgery.convert import convert
from pfsurgery.errors import RecordMismatchError, SurgeryError, closest
from pfsurgery.ops.eff_attention import EffAttention

__all__ = [
    "load_paper_checkpoint",
    "paper_state_dict",
    "pit_base_max",
    "pit_small_max",
    "pit_tiny_max",
    "resnet50_hybrid",
    "resnet50_max",
    "vit_base_max",
    "vit_small_max",
    "vit_tiny_max",
]

_TAG = "pf"
_IMAGES = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "license": "apache-2.0",
}
_RESNET = {**_IMAGES, "pool_size": (7, 7), "first_conv": "conv1", "classifier": "fc"}
_VIT = {**_IMAGES, "first_conv": "patch_embed.proj", "classifier": "head", "crop_pct": 0.9}
_PIT = {**_IMAGES, "first_conv": "patch_embed.conv", "classifier": "head", "crop_pct": 0.9}
_PIT["fixed_input_size"] = _VIT["fixed_input_size"] = True

# Read by timm's `register_model`.
default_cfgs = generate_default_cfgs(
    {
        f"resnet50_max.{_TAG}": _RESNET,
        f"resnet50_hybrid.{_TAG}": _RESNET,
        **{f"vit_{size}_max.{_TAG}": _VIT for size in ("tiny", "small", "base")},
        **{f"pit_{size}_max.{_TAG}": _PIT for size in ("tiny", "small", "base")},
        **{f"pit_{size}_gap.{_TAG}": _PIT for size in ("tiny", "small", "base")},
    }
)


class _NoToken(nn.Module):
    """What PiT's layer for class tokens is without any: (N, 0, C) to (N, 0, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.new_zeros(len(tokens), 0, self.width)

    def extra_repr(self) -> str:
        return str(self.width)


class GapPiT(PoolingVisionTransformer):  # type: ignore[misc]
    """timm's PiT without a class token: the classifier reads the mean of all tokens.

    Arguments are those of timm's class. `global_pool` is "token", as there, for the mean, or "".
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        none = torch.empty(1, 0, self.cls_token.shape[2])
        self.num_tokens = 0
        del self.cls_token
        self.register_buffer("cls_token", none, persistent=False)
        for stage in self.transformers:
            if stage.pool is not None:
                stage.pool.fc = _NoToken(stage.pool.fc.out_features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to tokens (N, L, C'), normed."""
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        x, _ = self.transformers((x, self.cls_token.expand(len(x), -1, -1)))
        return self.norm(x.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (N, L, C) to logits (N, classes)."""
        x = self.head_drop(x.mean(1) if self.global_pool else x)
        return x if pre_logits else self.head(x)


def _gap_pit(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: Any) -> nn.Module:
    from timm.models import build_model_with_cfg

    _refuse_weights(variant, pretrained)
    features = {"feature_cls": "hook", "out_indices": kwargs.pop("out_indices", (0, 1, 2))}
    model: nn.Module = build_model_with_cfg(
        GapPiT, variant, False, feature_cfg=features, **{**sizes, **kwargs}
    )
    return model


def pit_tiny_gap(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PiT-Ti with a mean over tokens in place of the class token; for `pit_tiny_max`."""
    sizes = {"base_dims": (32, 32, 32), "depth": (2, 6, 4), "heads": (2, 4, 8)}
    return _gap_pit("pit_tiny_gap", pretrained, sizes, kwargs)


def pit_small_gap(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PiT-S with a mean over tokens in place of the class token; for `pit_small_max`."""
    sizes = {"base_dims": (48, 48, 48), "depth": (2, 6, 4), "heads": (3, 6, 12)}
    return _gap_pit("pit_small_gap", pretrained, sizes, kwargs)


def pit_base_gap(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PiT-B with a mean over tokens in place of the class token; for `pit_base_max`."""
    sizes = {
        "patch_size": 14,
        "stride": 7,
        "base_dims": (64, 64, 64),
        "depth": (3, 6, 4),
        "heads": (4, 8, 16),
    }
    return _gap_pit("pit_base_gap", pretrained, sizes, kwargs)


def resnet50_max(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with a max-pool in place of every 3x3 convolution (14.2 M parameters)."""
    return _converted("resnet50_max", "resnet50", "eff_max", pretrained, kwargs)


def resnet50_hybrid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with a max-pool in place of every 3x3 convolution of stride 1 (17.3 M parameters).

    The three of stride 2 stay, behind a 2x2 average pool that takes over their stride.
    """
    return _converted("resnet50_hybrid", "resnet50", "eff_hybrid", pretrained, kwargs)


def vit_tiny_max(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Ti/16 without a class token, every second attention an efficient layer (6.2 M)."""
    return _vit_max("vit_tiny_max", "vit_tiny_patch16_224", pretrained, kwargs)


def vit_small_max(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 without a class token, every second attention an efficient layer (23.8 M)."""
    return _vit_max("vit_small_max", "vit_small_patch16_224", pretrained, kwargs)


def vit_base_max(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 without a class token, every second attention an efficient layer (93.6 M)."""
    return _vit_max("vit_base_max", "vit_base_patch16_224", pretrained, kwargs)


def pit_tiny_max(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PiT-Ti without a class token, every second attention of a stage efficient (5.2 M)."""
    return _converted("pit_tiny_max", "pit_tiny_gap", "eff_transformer", pretrained, kwargs)


def pit_small_max(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PiT-S without a class token, every second attention of a stage efficient (25.1 M)."""
    return _converted("pit_small_max", "pit_small_gap", "eff_transformer", pretrained, kwargs)


def pit_base_max(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PiT-B without a class token, every second attention of a stage efficient (79.0 M)."""
    return _converted("pit_base_max", "pit_base_gap", "eff_transformer", pretrained, kwargs)


for _make in (
    *(resnet50_max, resnet50_hybrid, vit_tiny_max, vit_small_max, vit_base_max),
    *(pit_tiny_gap, pit_small_gap, pit_base_gap, pit_tiny_max, pit_small_max, pit_base_max),
):
    register_model(_make)


def _vit_max(variant: str, base: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    own = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return _converted(variant, base, "eff_transformer", pretrained, {**own, **kwargs})


def _refuse_weights(variant: str, pretrained: bool) -> None:
    if pretrained:
        raise SurgeryError(
            f"There are no weights of {variant} to download: make it without pretrained=True, and "
            f"load a file of the paper's authors with pfsurgery.zoo.load_paper_checkpoint."
        )


def _converted(
    variant: str, base: str, policy: str, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    _refuse_weights(variant, pretrained)
    for given in ("pretrained_cfg", "cache_dir"):
        kwargs.pop(given, None)
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    config = replace(default_cfgs[variant].cfgs[_TAG], **overlay)
    if config.fixed_input_size:
        kwargs.setdefault("img_size", config.input_size[1:])
    model: nn.Module = timm.create_model(base, pretrained_cfg=config, **kwargs)
    size = kwargs.get("img_size", config.input_size[1:])
    height, width = (size, size) if isinstance(size, int) else size
    example = torch.zeros(1, kwargs.get("in_chans", config.input_size[0]), height, width)
    converted = convert(model, policy, example=example)
    for module in converted.modules():
        if isinstance(module, EffAttention):
            _initialise(module, like_vit=base.startswith("vit"))
    settings = getattr(converted, "pretrained_cfg", None)
    if isinstance(settings, dict):
        settings.update(architecture=variant, tag=_TAG)
    set_base(converted, Base("timm", base, kwargs))
    return converted


def _initialise(layer: EffAttention, *, like_vit: bool) -> None:
    """Fresh weights, to be trained from scratch: nothing learned was there to be copied."""
    for linear in (layer.qkv, layer.proj):
        linear.reset_parameters()
        if like_vit:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)


# The paper's names for ours, by class of model; the first pattern that a name begins with counts.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "ResNet": (
        (r"conv1\.", r"conv1.0."),
        (r"bn1\.", r"conv1.1."),
        (r"(layer\d\.\d)\.conv1\.", r"\1.reduction_block.0."),
        (r"(layer\d\.\d)\.bn1\.", r"\1.reduction_block.1."),
        (r"(layer\d\.\d)\.conv2\.conv\.", r"\1.conv_block.1.0."),
        (r"(layer\d\.\d)\.bn2\.", r"\1.conv_block.1.1."),
        (r"(layer\d\.\d)\.conv3\.", r"\1.expansion_block.0."),
        (r"(layer\d\.\d)\.bn3\.", r"\1.expansion_block.1."),
    ),
    "VisionTransformer": (),
    "GapPiT": (
        (r"transformers\.1\.pool\.conv\.", "pools.0.conv."),
        (r"transformers\.2\.pool\.conv\.", "pools.1.conv."),
    ),
}


def load_paper_checkpoint(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict with the names of the paper's released code into a model of this zoo.

    Args:
        model: What `resnet50_max`, `vit_small_max` or another function here made.
        state_dict: The checkpoint, as `torch.load(path, weights_only=True)` gives it, without a
            wrapper around or a prefix before the names.

    Raises:
        RecordMismatchError: A key does not fit, and is named; the model is unchanged.
    """
    theirs = _paper_names(model)
    wanted = {theirs[key]: (key, tensor) for key, tensor in model.state_dict().items()}
    name = type(model).__name__
    for key, tensor in state_dict.items():
        if key not in wanted:
            raise RecordMismatchError(
                f"The checkpoint has a key {key!r}, for which this {name} has no place. "
                f"{closest(key, wanted)}"
            )
        shape, given = tuple(wanted[key][1].shape), tuple(getattr(tensor, "shape", ("no tensor",)))
        if given != shape:
            raise RecordMismatchError(
                f"{key!r} has shape {given} in the checkpoint, but this {name} needs {shape}."
            )
    for key in wanted:
        if key not in state_dict:
            raise RecordMismatchError(
                f"The checkpoint has no key {key!r}, which this {name} needs. "
                f"{closest(key, state_dict)}"
            )
    model.load_state_dict({wanted[key][0]: tensor for key, tensor in state_dict.items()})


def paper_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model of this zoo, with the names of the paper's released code.

    Raises:
        RecordMismatchError: The paper has no such model.
    """
    names = _paper_names(model)
    return {names[key]: tensor for key, tensor in model.state_dict().items()}


def _paper_names(model: nn.Module) -> dict[str, str]:
    renames = _RENAMES.get(type(model).__name__)
    if renames is None:
        raise RecordMismatchError(
            f"The paper has no {type(model).__name__}: make a model with pfsurgery.zoo, without "
            f"features_only."
        )
    return {key: _paper_name(key, renames) for key in model.state_dict()}


def _paper_name(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", replacement, key)
    return key
