"""Save and load converted models: a directory of JSON and safetensors, never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.base import Base, base_of, set_base
from pfsurgery.errors import PolicyError, RecordMismatchError, SurgeryError, closest
from pfsurgery.example import IMAGE_FIELDS, image_config, set_image_config
from pfsurgery.files import write_together
from pfsurgery.modularise import modularise
from pfsurgery.record import Record, has_record, record, remember
from pfsurgery.rewrite import Undo, apply_plan, undo
from pfsurgery.run_folder import MODEL_FOLDER
from pfsurgery.shadow import on_meta
from pfsurgery.sites import class_name

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HUB = "hf-hub:"
_FORMAT = 1


def save(model: nn.Module, directory: str | Path, *, base: Base | None = None) -> Path:
    """Write a converted model to `directory`: `config.json` and `model.safetensors`.

    Args:
        model: A model that `convert` made.
        directory: Where to; made if it is missing, its two files overwritten.
        base: Where the unconverted model comes from. By default what timm's configuration on the
            model says; without either, or with arguments that JSON cannot hold, `load` will ask for
            the unconverted model.

    Raises:
        RecordMismatchError: The model was not made by `convert`.
        SurgeryError: The directory cannot be written, or the state dict holds what is no tensor.
    """
    from safetensors.torch import save as to_bytes

    done = record(model)
    for path, module in model.named_modules():
        if path and has_record(module):
            raise RecordMismatchError(
                f"{path} was converted on its own before the whole model was, and a saved "
                f"directory holds one record. Convert the whole model with include={path!r}."
            )
    state = _unshared(model.state_dict())
    weights = to_bytes(state, metadata={"format": "pt"})
    base = base or base_of(model)
    if base is not None and not _is_json(base.kwargs):
        base = None
    content: dict[str, Any] = {
        "format": _FORMAT,
        "base": base.to_dict() if base else None,
        "record": done.to_dict(),
        "images": image_config(model),
        "modules": _fingerprint(model),
        "versions": _versions(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    content["sha256"] = _digest(content)
    config: dict[str, Any] = {"pfsurgery": content}
    if base is not None and base.library == "timm":
        config = {
            "architecture": base.name,
            "num_classes": base.kwargs.get("num_classes"),
            **config,
        }
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(config, indent=2).encode()
        write_together({directory / WEIGHTS: weights, directory / CONFIG: settings})
    except OSError as error:
        raise SurgeryError(f"{directory} cannot be written: {error.strerror}.") from None
    return directory


def load(
    directory: str | Path,
    *,
    base: nn.Module | Callable[[], nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model that `save` wrote, in eval mode. Runs no code from the files.

    Args:
        directory: What `save` wrote, or `hf-hub:USER/NAME`, which is downloaded from the Hugging
            Face hub, or taken from its local cache.
        base: The unconverted model, or a function that makes it, for a model that neither timm nor
            torchvision can make by name. A given model is converted itself and its weights are
            overwritten.
        device: Where to put it.

    Raises:
        RecordMismatchError: A file is missing, truncated or changed, or a tensor does not fit; the
            message names the file or the key.
        UnknownNameError: The base model's library has no such model.
    """
    directory = _fetched(directory)
    content = _read_config(directory)
    state = _read_weights(directory, content)
    with _as_mismatch(directory):
        done, images = Record.from_dict(content["record"]), _images_of(content)
    given = base() if callable(base) and not isinstance(base, nn.Module) else base
    with _as_mismatch(directory), torch.device("meta"):
        shadow = _shadow_base(content, given, directory)
        if shadow is not None:
            _rebuild(shadow, done, content, state, directory)
    model = given or _named_base(content, directory)
    with _as_mismatch(directory):
        _rebuild(model, done, content, state, directory)
        for key, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(state[key].dtype)
        model.load_state_dict(dict(state))
    for plan in done.plans:
        remember(model, plan)
    if images:
        set_image_config(model, images)
    with suppress(NotImplementedError):  # what torch.export makes has no modes
        model.eval()
    return model.to(device)


@contextmanager
def _as_mismatch(directory: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the files' fault: they may have been forged."""
    try:
        yield
    except SurgeryError as error:
        if isinstance(error, PolicyError):
            raise RecordMismatchError(f"{directory / CONFIG}: {error}") from None
        raise
    except Exception as error:
        what = str(error).partition("\n")[0][:300]
        raise RecordMismatchError(
            f"{directory / CONFIG} does not fit the model: {type(error).__name__}: {what}"
        ) from error


def _images_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """What images the model expects; nothing else goes into its configuration."""
    saved = dict(content.get("images") or {})
    fields = {key: saved[key] for key in IMAGE_FIELDS if key in saved}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _rebuild(
    model: nn.Module,
    done: Record,
    content: Mapping[str, Any],
    state: Mapping[str, Tensor],
    directory: Path,
) -> None:
    """Convert `model` as `done` says and check that `state` fits it, else leave it as it was."""
    replaced: Undo = []
    try:
        for plan in done.plans:
            modularise(model, inplace=True, only=plan.changed)
            replaced = apply_plan(model, plan.replaced) + replaced
        _check_fingerprint(model, content.get("modules", {}), directory)
        _check_state(model, state, directory / WEIGHTS)
    except Exception:
        undo(model, replaced)
        raise


def _shadow_base(
    content: Mapping[str, Any], given: nn.Module | None, directory: Path
) -> nn.Module | None:
    """The base without storage: what does not fit is found before any memory is taken.

    None where it cannot be built so, since its builder reads values (torchvision's RegNets).
    """
    if given is None:
        with suppress(NotImplementedError):
            return _named_base(content, directory)
        return None
    return on_meta(given)


def _fetched(directory: str | Path) -> Path:
    """The local folder of what may be on the hub."""
    if not str(directory).startswith(HUB):
        return Path(directory)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = str(directory).removeprefix(HUB)
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SurgeryError(f"{directory} cannot be had from the hub: {reason}") from None


def _is_json(values: Mapping[str, Any]) -> bool:
    try:
        json.dumps(values)
    except (TypeError, ValueError):  # a class; a dict that holds itself
        return False
    return True


def _unshared(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that own their memory: safetensors refuses shared ones."""
    seen: set[int] = set()
    unshared = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise SurgeryError(
                f"{key!r} in the model's state dict is a {type(tensor).__name__}, and a saved "
                f"directory holds tensors alone: let get_extra_state return a tensor."
            )
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.untyped_storage().data_ptr() in seen and tensor.numel() > 0
        seen.add(tensor.untyped_storage().data_ptr())
        unshared[key] = tensor.clone() if shared else tensor
    return unshared


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """What each module is, as far as it shows: class and settings; dropouts do not count.

    Weights say nothing of strides, activations or pooling, so a base that was built with other
    arguments could load them all and still be another model.
    """
    return {
        path: _digest({"class": class_name(module), "settings": module.extra_repr()})[:12]
        for path, module in model.named_modules()
        if not isinstance(module, nn.Identity)
        and "Drop" not in type(module).__name__
        and " at 0x" not in module.extra_repr()
    }


def _check_fingerprint(model: nn.Module, saved: Mapping[str, str], directory: Path) -> None:
    now = _fingerprint(model)
    for path in sorted(saved.keys() | now.keys()):
        if saved.get(path) != now.get(path):
            raise RecordMismatchError(
                f"{path or 'The model'} was saved as another module than the base in "
                f"{directory / CONFIG} has there: the model was built with other arguments. Pass "
                f"the unconverted model as base=."
            )


def _versions() -> dict[str, str]:
    import pfsurgery

    return {"pfsurgery": pfsurgery.__version__, "torch": str(torch.__version__)}


def _digest(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["pfsurgery"]
        form, digest = content["format"], content["sha256"]
    except OSError as error:
        inside = directory / MODEL_FOLDER
        if (inside / CONFIG).is_file():
            raise RecordMismatchError(
                f"{directory} is the folder of a run; its model is {inside}."
            ) from None
        raise RecordMismatchError(
            f"{path} cannot be read: {error.strerror}. Is {directory} a folder that "
            f"pfsurgery.save wrote?"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecordMismatchError(
            f"{path} is truncated, or was not written by pfsurgery.save."
        ) from None
    if form != _FORMAT:
        raise RecordMismatchError(f"{path} has format {form!r}; this version reads {_FORMAT}.")
    if digest != _digest(content):
        raise RecordMismatchError(f"{path} was changed after it was saved.")
    return dict(content)


def _read_weights(directory: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = directory / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordMismatchError(f"{path} cannot be read: {error.strerror}.") from None
    if hashlib.sha256(data).hexdigest() != content.get("weights_sha256"):
        raise RecordMismatchError(f"{path} is truncated, or was changed after it was saved.")
    try:
        state: dict[str, Tensor] = from_bytes(data)
    except (SafetensorError, ValueError) as error:
        raise RecordMismatchError(f"{path} is not a safetensors file: {error}.") from None
    return state


def _named_base(
    content: Mapping[str, Any],
    directory: Path,
) -> nn.Module:
    if content.get("base") is None:
        raise RecordMismatchError(
            f"{directory} does not say which model it was converted from: pass it, as in "
            f"pfsurgery.load({str(directory)!r}, base=make_my_model)."
        )
    try:
        known = Base(**content["base"])
        model = known.build()
    except (TypeError, AttributeError) as error:
        raise RecordMismatchError(f"{directory / CONFIG}: base: {error}.") from None
    set_base(model, known)
    return model


def _check_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    for key in expected.keys() - state.keys():
        raise RecordMismatchError(
            f"{path} has no tensor {key!r}, which the model needs. {closest(key, state)} "
            f"If the model was built with other arguments, pass it as base=."
        )
    for key, tensor in state.items():
        if key not in expected:
            raise RecordMismatchError(
                f"{path} has a tensor {key!r}, which the model lacks. {closest(key, expected)} "
                f"If the model was built with other arguments, pass it as base=."
            )
        if tensor.shape != expected[key].shape:
            raise RecordMismatchError(
                f"{key!r} has shape {tuple(tensor.shape)} in {path}, but the model needs "
                f"{tuple(expected[key].shape)}. If the model was built with other arguments, "
                f"pass it as base=."
            )
