"""Draw what each operation does to an image, with pfsurgery's own modules.

Run it as `python docs/operation_pictures.py`.

The image is drawn here: a bright corner at the border, a single pixel, a thin line, a checkerboard,
a ramp. Grey values are those of the output, unclipped, on one scale.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from pfsurgery.ops import get_op
from pfsurgery.ops.shift import Shift
from pfsurgery.sites import Geometry, Site

FOLDER = Path(__file__).parent / "images"
SIZE = 16


def main() -> None:
    """Write one PNG for each operation."""
    image = test_image()
    for name, title in (
        ("max_pool", "max_pool"),
        ("avg_pool", "avg_pool"),
        ("blur", "blur"),
        ("identity", "identity"),
    ):
        draw(
            name,
            [
                (f"{title}, 3x3", operate(name, image, Geometry(1, 1, (3, 3), padding=(1, 1)))),
                (
                    f"{title}, 3x3, stride 2",
                    operate(name, image, Geometry(1, 1, (3, 3), (2, 2), (1, 1))),
                ),
            ],
        )
    geometry = Geometry(1, 1, (3, 3), (2, 2), (1, 1))
    draw("avg_down", [("avg_down, its 2x2 mean", operate("avg_down", image, geometry))])
    nine = image.expand(1, 9, SIZE, SIZE)
    shift = get_op("shift").build(site(Geometry(9, 9, (3, 3), padding=(1, 1), groups=9), nine))
    assert isinstance(shift, Shift)
    moved = shift(nine)
    shown = [(_direction(tap), moved[:, i : i + 1]) for i, (tap, _) in enumerate(shift.taps)]
    draw("shift", shown[:5])


def test_image() -> Tensor:
    """A grey image (1, 1, 16, 16) in which borders, points, lines and texture can be told apart."""
    image = torch.zeros(1, 1, SIZE, SIZE)
    image[..., :4, :3] = 1  # touches two borders
    image[..., 2, 8] = 1
    image[..., 6, 1:9] = 0.8
    image[..., 9:15, 1:7] = (torch.arange(6)[:, None] + torch.arange(6)).remainder(2) * 0.9
    image[..., 1:15, 12:15] = torch.linspace(0.1, 1, 14)[:, None]
    image[..., 11, 9] = 0.6
    return image


def operate(name: str, image: Tensor, geometry: Geometry) -> Tensor:
    """The image after an operation, as the module that stands in a converted model makes it."""
    module: nn.Module = get_op(name).build(site(geometry, image))
    return module(image)


def site(geometry: Geometry, image: Tensor) -> Site:
    """A site of that geometry that reads the image."""
    shape = tuple(image.shape)
    return Site("picture", ("picture",), "torch.nn.modules.conv.Conv2d", geometry, shape, shape)


def _direction(tap: tuple[int, int]) -> str:
    """Where a channel moves that shows what the tap of a 3x3 kernel sees."""
    arrows = {(0, 0): "↘", (0, 1): "↓", (0, 2): "↙", (1, 0): "→", (1, 2): "←"}
    arrows |= {(2, 0): "↗", (2, 1): "↑", (2, 2): "↖"}
    return f"group moved {arrows[tap]}" if tap in arrows else "group that stays"


def draw(name: str, outputs: list[tuple[str, Tensor]]) -> None:
    """Write the image and what became of it side by side."""
    panels = [("input", test_image()), *outputs]
    figure = Figure(figsize=(1.9 * len(panels), 2.1), dpi=150, layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _panel(axes, title, shown)
    figure.savefig(FOLDER / f"op_{name}.png", metadata={"Software": None})


def _panel(axes: Axes, title: str, shown: Tensor) -> None:
    axes.imshow(shown[0, 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    main()
