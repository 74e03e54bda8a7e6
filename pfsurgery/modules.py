"""Look up and set submodules by their dotted path."""

from __future__ import annotations

from torch import nn

from pfsurgery.errors import RecordMismatchError, closest


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`.

    Raises:
        RecordMismatchError: There is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules()]
        raise RecordMismatchError(
            f"{type(model).__name__} has no module {path!r}. {closest(path, known)}"
        ) from None


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, where a module already is.

    Raises:
        RecordMismatchError: There is no module at `path`.
    """
    get_module(model, path)
    parent_path, _, name = path.rpartition(".")
    get_module(model, parent_path)._modules[name] = module
