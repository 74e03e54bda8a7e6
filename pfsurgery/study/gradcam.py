"""Where a model looks: Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfsurgery.errors import ShapeError
from pfsurgery.measure.state import undisturbed
from pfsurgery.recover.evaluate import logits_of
from pfsurgery.recover.state import placement

_INK, _FAINT = "#222222", "#6f6f6f"


@dataclass(frozen=True, slots=True)
class Maps:
    """Grad-CAM of a batch.

    Attributes:
        maps: (N, H, W), not negative, at the resolution of the layer.
        layer: Name of the module whose output they weigh.
        predicted: (N,) classes with the highest outputs.
    """

    maps: Tensor
    layer: str
    predicted: Tensor


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Maps:
    """What in the last spatial output A speaks for a class.

    The weight of a channel is the mean of the gradient of the class's logit y over its positions,
    `a_k = mean_ij(dy / dA_kij)` (eq. 1), and the map is `relu(sum_k a_k A_k)` (eq. 2). A is the
    output of the module that comes last in a forward pass among those that give maps (N, C, H, W)
    of more than one position and of the proportions of the image; a layer inside a block that ends
    in a single position does not count, since a shortcut may pass it by. The model is run in eval
    mode and left as it was, the gradients of its parameters included.

    Args:
        model: A classifier: (N, C, H, W) -> (N, classes).
        images: (N, C, H, W), normalised as the model expects.
        classes: (N,) class indices, one an image.

    Raises:
        ShapeError: No module gives such maps.
        TrainingError: The model does not return one tensor of logits.
    """
    device, dtype = placement(model)
    found: dict[str, Tensor] = {}
    # Transformers such as Swin keep the channels last.
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if _is_spatial(output, images, last) and output.requires_grad:
                found.pop(name, None)
                found[name] = output
            elif isinstance(output, Tensor) and output.dim() == 4:
                inside = [other for other in found if other.startswith(f"{name}.")]
                for other in inside if len(inside) < len(found) else ():
                    del found[other]

        return hook

    with undisturbed(model), torch.enable_grad():
        hooks = [
            module.register_forward_hook(watch(name))
            for name, module in model.named_modules()
            if name
        ]
        try:
            leaf = images.detach().to(device, dtype, copy=True).requires_grad_()
            logits = logits_of(model, leaf.clone())  # a model may change its input in place
        finally:
            for handle in hooks:
                handle.remove()
        if not found:
            raise ShapeError(
                f"Grad-CAM needs a layer with a spatial output, and no module of "
                f"{type(model).__name__} gives maps (N, C, H, W) of more than one position on "
                f"images of {images.shape[2]}x{images.shape[3]} pixels. Give larger images."
            )
        layer, output = list(found.items())[-1]
        chosen = logits.gather(1, classes.to(device)[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, output)
    if last:
        output, gradient = output.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    weights = gradient.mean((2, 3), keepdim=True)
    maps = (weights * output.detach()).sum(1).relu()
    return Maps(maps.float().cpu(), layer, logits.detach().argmax(1).cpu())


def draw_maps(pixels: Tensor, labels: Sequence[int], found: Mapping[str, Maps], path: Path) -> None:
    """Write each image with the maps of each model beside it, one row an image, as PNG.

    Each map is scaled by its own maximum.

    Args:
        pixels: (N, 3, H, W) from 0 to 1.
        labels: The class of each image, whose maps are shown.
        found: Maps of each model by its name.
        path: The PNG file.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    size = tuple(pixels.shape[2:])
    figure = Figure(figsize=(1.7 * (1 + len(found)) + 0.3, 1.95 * len(pixels) + 0.5), dpi=200)
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04)
    grid = figure.subplots(len(pixels), 1 + len(found), squeeze=False)
    for place, row in enumerate(grid):
        picture = pixels[place].permute(1, 2, 0).numpy()
        row[0].set_title(f"class {labels[place]}", fontsize=9, color=_INK)
        for axes in row:
            axes.imshow(picture)
            axes.set_axis_off()
        for axes, (name, maps) in zip(row[1:], found.items(), strict=True):
            heat = F.interpolate(maps.maps[place][None, None], size, mode="bilinear")[0, 0]
            heat = heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)
            axes.imshow(heat.numpy(), cmap="turbo", alpha=0.5, vmin=0, vmax=1)
            title = f"{name}: {int(maps.predicted[place])}"
            axes.set_title(title, fontsize=9, color=_INK)
    layers = "; ".join(f"{name}: {maps.layer}" for name, maps in found.items())
    figure.supxlabel(f"Grad-CAM at {layers}", x=0.01, ha="left", fontsize=7.5, color=_FAINT)
    figure.savefig(path, format="png", facecolor="white")


def _is_spatial(output: Any, images: Tensor, last: bool) -> bool:
    if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != len(images):
        return False
    height, width = output.shape[1:3] if last else output.shape[2:]
    of_height, of_width = images.shape[2:]
    # Heads of attention give (N, heads, tokens, channels), which is no map of the image.
    alike = abs(height * of_width - width * of_height) <= max(of_height, of_width)
    return alike and height * width > 1
