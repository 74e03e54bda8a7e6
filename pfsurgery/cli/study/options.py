"""Options that the studies which train networks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from pfsurgery.study.setting import StudySetting

Chosen = TypeVar("Chosen", bound=StudySetting)
Size = Literal["small", "full"]

Out = Annotated[
    Path, typer.Option(help="Folder for the results; given again, an unfinished study goes on.")
]
Setting = Annotated[
    Size, typer.Option(help="small: minutes on two cores. full: the paper's length, for a GPU.")
]
Seeds = Annotated[int | None, typer.Option(help="Trainings of each network; 3 by default.", min=1)]
Epochs = Annotated[int | None, typer.Option(help="Epochs of each training.", min=1)]
Images = Annotated[
    int | None, typer.Option(help="Training images, and at most as many for validation.", min=2)
]


def changed(
    setting: Chosen, *, seeds: int | None, epochs: int | None, images: int | None
) -> Chosen:
    """The setting with what the options say."""
    given: dict[str, Any] = {
        "seeds": seeds,
        "epochs": epochs,
        "images": images,
        "val_images": images,
    }
    if images is not None and setting.val_images is not None:
        given["val_images"] = min(images, setting.val_images)
    return replace(setting, **{name: value for name, value in given.items() if value is not None})
