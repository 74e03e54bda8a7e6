"""Each setting of the fine-tuning as an option: names, types and help from `FinetuneConfig`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from pfsurgery.recover import FinetuneConfig


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each setting; `command` gets `settings`, None where one was not given."""
    options = {field.name: _option(field.name, field.default) for field in fields(FinetuneConfig)}

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        settings = {name: values.pop(name) for name in options}
        command(**values, settings=settings)

    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "settings"]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in options.items()
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_options


def _option(name: str, default: Any) -> Any:
    wanted = get_type_hints(FinetuneConfig)[name]
    if get_origin(wanted) is Literal:
        kind: Any = str
    else:
        kind = next(k for k in (get_args(wanted) or (wanted,)) if k is not type(None))
    flag = f"--{name.replace('_', '-')}"
    declaration = f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag
    shown = "" if default is None else f" ({'yes' if default is True else _shown(default)})"
    return Annotated[
        kind | None, typer.Option(declaration, help=f"{_help(name)}{shown}", show_default=False)
    ]


def _shown(default: Any) -> str:
    return "no" if default is False else str(default)


def _help(name: str) -> str:
    """The first sentence on a setting in the docstring."""
    text = inspect.getdoc(FinetuneConfig) or ""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^$)", text, re.MULTILINE | re.DOTALL)
    described = " ".join(found[1].split()) if found else ""
    return re.split(r"(?<=\.) (?=[A-Z])", described)[0]
