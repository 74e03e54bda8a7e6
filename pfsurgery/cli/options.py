"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from pfsurgery.convert import plan as make_plan
from pfsurgery.errors import PolicyError, ShapeError, SurgeryError
from pfsurgery.example import default_input_size, set_image_config
from pfsurgery.models import open_model
from pfsurgery.plan import Plan
from pfsurgery.policy import DataPolicy
from pfsurgery.recover import bare, budget, evaluate

FITTED = ("budget", "bare")  # policies that are fitted to images

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="timm name, torchvision/NAME, a folder that pfsurgery saved, or hf-hub:USER/NAME "
        "that it pushed.",
    ),
]
Policy = Annotated[
    str,
    typer.Option("--policy", "-p", help="Name of a policy, a .yaml policy, or a .json plan."),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained/--no-pretrained", help="Trained weights from the hub.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(help="File with weights (.safetensors or .pth) in place of the hub.")
]
NumClasses = Annotated[int | None, typer.Option(help="Number of outputs of the model.", min=1)]
ModelKwarg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-kwarg", help="key=value for the model's factory; JSON values. Repeatable."
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(help="Only sites that match (glob or re:...). Repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Keep sites that match (glob or re:...). Repeatable.")
]
Macs = Annotated[
    str | None,
    typer.Option(help="For --policy budget: multiply-adds left, as 25% or a number."),
]
Params = Annotated[
    str | None, typer.Option(help="For --policy budget: parameters left, as 25% or a number.")
]
Latency = Annotated[
    str | None,
    typer.Option(help="For --policy budget: time of a batch of 8 left, as 60% or in ms."),
]
Thin = Annotated[
    bool,
    typer.Option(
        "--thin/--no-thin", help="For --policy budget: allow thin dense convolutions too."
    ),
]
Pointwise = Annotated[
    bool, typer.Option("--pointwise", help="For --policy budget: 1x1 convolutions take part too.")
]
Mixing = Annotated[
    str, typer.Option(help="never: keep sites that would need a pointwise convolution.")
]
Size = Annotated[
    int | None,
    typer.Option(
        help="Height and width of the model's images, in pixels, where they are not its default.",
        min=1,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Images = Annotated[int, typer.Option("--images", help="How many, up to 400 MB.", min=1)]
Top1 = Annotated[
    bool, typer.Option("--top1", help="Measure the accuracy on the validation part of --data too.")
]
Data = Annotated[
    str,
    typer.Option(
        help="Image folder or tar with train and val parts, torch/NAME, hfds/NAME, tfds/NAME, "
        "wds/FOLDER, or digits."
    ),
]


def opened(
    model: str,
    pretrained: bool,
    checkpoint: Path | None,
    num_classes: int | None,
    model_kwarg: list[str] | None,
    size: int | None = None,
) -> nn.Module:
    """The model that the options describe."""
    net = open_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        num_classes=num_classes,
        kwargs=dict(_pair(text) for text in model_kwarg or []),
    )
    if size is not None:
        channels = default_input_size(net)[0]
        set_image_config(net, {"input_size": (channels, size, size)})
    return net


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"--model-kwarg must be key=value, not {text!r}.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def planned(
    model: nn.Module,
    policy: str,
    *,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    mixing: str = "auto",
) -> Plan:
    """The plan in a JSON file, or what a policy makes of the model."""
    if policy in FITTED:
        limit = " --macs 60%" if policy == "budget" else ""
        raise PolicyError(
            f"{policy} is fitted to images: use pfsurgery convert --policy {policy}{limit} --data "
            f"DIR --out fast/, which shows what becomes of each site; pfsurgery compare --after "
            f"fast/ then measures it."
        )
    if policy.endswith(".json"):
        if include or exclude or mixing != "auto":
            raise PolicyError(
                "A plan is carried out as it stands: --include, --exclude and --mixing go with a "
                "policy, when the plan is made."
            )
        try:
            return Plan.from_json(Path(policy).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"The plan {policy} cannot be read: {error}.") from None
    return make_plan(
        model,
        policy,
        example=example_of(model),
        include=include or None,
        exclude=exclude or None,
        mixing=mixing,  # type: ignore[arg-type]
    )


def chosen(
    model: nn.Module,
    policy: str,
    *,
    macs: str | None = None,
    params: str | None = None,
    latency: str | None = None,
    thin: bool = True,
    pointwise: bool = False,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    mixing: str = "auto",
) -> tuple[Plan | DataPolicy, dict[str, Any]]:
    """The policy fitted to images that the options describe, or the plan (see `planned`).

    And what `convert` is told of the sites that may change: nothing with a plan, which knows.
    """
    if policy != "budget":
        refuse_limits(macs=macs, params=params, latency=latency, thin=thin, pointwise=pointwise)
    if policy not in FITTED:
        plan = planned(model, policy, include=include, exclude=exclude, mixing=mixing)
        return plan, {}
    if mixing != "auto":
        raise PolicyError(f"--mixing does not go with --policy {policy}, which adds what it needs.")
    sites = {"include": include or None, "exclude": exclude or None}
    if policy == "bare":
        return bare(), sites
    return budget(macs, params, latency, thin=thin, pointwise=pointwise), sites


def refuse_limits(**given: str | bool | None) -> None:
    """Raise a PolicyError where options of `--policy budget` come with another policy."""
    usual: dict[str, str | bool | None] = {"thin": True, "pointwise": False}
    wrong = [name for name, value in given.items() if value != usual.get(name)]
    if wrong:
        named = ", ".join("--no-thin" if name == "thin" else f"--{name}" for name in wrong)
        raise PolicyError(f"{named} goes with --policy budget.")


def example_of(model: nn.Module, batch: int = 1) -> Tensor:
    """A batch of black images of the size that the model was made for."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ShapeError(f"{type(model).__name__} has no parameters.")
    return torch.zeros(batch, *default_input_size(model), dtype=parameter.dtype)


def validation(data: str, wanted: bool) -> Callable[[nn.Module], float] | None:
    """A function from a model to its top-1 on the validation part of `data`, if that is wanted."""
    return (lambda network: evaluate(network, data).top1) if wanted else None


def written(write: Callable[[Path], object], file: Path) -> None:
    """Write the file that an option names."""
    try:
        write(file)
    except OSError as error:
        raise SurgeryError(f"{file} cannot be written: {error.strerror}.") from None


def emit(table: Any, as_json: bool, values: Any) -> None:
    """Print a table for people, or JSON for scripts."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        Console().print(table)
