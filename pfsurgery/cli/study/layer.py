"""`pfsurgery study layer`."""

from __future__ import annotations

from pfsurgery.cli import options as shared
from pfsurgery.cli.study import options
from pfsurgery.study.layer import FULL, SMALL, layer_study


def layer(
    out: options.Out,
    data: shared.Data = "digits",
    setting: options.Setting = "small",
    seeds: options.Seeds = None,
    epochs: options.Epochs = None,
    images: options.Images = None,
    json: shared.Json = False,
) -> None:
    """Train networks with each operation in place of the 3x3, and compare them.

    Example: pfsurgery study layer --data cifar10/ --out layer-study
    """
    chosen = options.changed(
        SMALL if setting == "small" else FULL, seeds=seeds, epochs=epochs, images=images
    )
    result = layer_study(data, data, out, setting=chosen)
    shared.emit(result, json, result.to_dict())
