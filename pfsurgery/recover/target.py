"""Where sites are looked at: their windows and operations, sampled positions, original rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pfsurgery.recover.capture import Side, capture, on_input, run_watched
from pfsurgery.recover.columns import Operation, Window, column_rows, operations
from pfsurgery.recover.gram import Moments, MomentSum, sample_positions
from pfsurgery.recover.readout import Readout
from pfsurgery.recover.screen import Screen, screened
from pfsurgery.sites import Geometry, Site

POSITIONS = 65536  # looked at for each layer, about
ROWS_MEMORY = 1 << 29  # bytes of the original's rows that are held at once, about
_CHUNK = 16384  # positions whose columns are in memory at once


def site_window(site: Site) -> Window:
    """The site's window with its padding resolved for its input size."""
    return window_of(site.geometry, (site.input_shape[-2], site.input_shape[-1]))


def window_of(geometry: Geometry, size: tuple[int, int]) -> Window:
    """Where a convolution reads an input of `size` pixels (rows, columns)."""
    (top, bottom), (left, right) = geometry.pads(size)
    return Window(
        geometry.kernel_size, geometry.stride, (top, bottom, left, right), geometry.dilation
    )


def site_operations(site: Site) -> tuple[Operation, ...]:
    """What a channel of a site may become: every tap of the kernel, every centred average."""
    reach = max(site.geometry.kernel_size) // 2
    pools = site.geometry.dilation == (1, 1)
    return tuple(op for op in operations(site_window(site), reach=reach, pools=pools) if op.linear)


def reuse(site: Site) -> float:
    """Input positions for each output position."""
    (height, width), (rows, columns) = site.input_shape[-2:], site.output_shape[-2:]
    return height * width / (rows * columns)


class Sampler:
    """The positions of a site's output that are looked at, the same ones for every sampler of it.

    Args:
        site: The site.
        batches: All images; they are to be sampled batch by batch, in this order.
        most: Positions that are looked at in all batches, about.
    """

    def __init__(self, site: Site, batches: Sequence[Tensor], most: int = POSITIONS) -> None:
        self._window = site_window(site)
        self._per_image = most / sum(len(batch) for batch in batches)
        self._generator = torch.Generator().manual_seed(0)

    def inputs(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Parts of a batch (N, C, H, W) with the flat positions of their outputs, None for all."""
        rows, columns = self._window.output_size(x.shape[2], x.shape[3])
        for images, chosen in self._parts(len(x), rows * columns):
            yield x[images], None if chosen is None else chosen.to(x.device)

    def outputs(self, y: Tensor) -> Tensor:
        """The rows (P, C_out), float32 on the CPU, of outputs (N, C_out, H', W')."""
        rows = []
        for images, chosen in self._parts(len(y), y.shape[2] * y.shape[3]):
            flat = y[images].permute(0, 2, 3, 1).flatten(0, 2)
            rows.append(flat if chosen is None else flat[chosen.to(y.device)])
        return torch.cat(rows).float().cpu()

    def _parts(self, images: int, here: int) -> Iterator[tuple[slice, Tensor | None]]:
        kept = min(1.0, self._per_image / here)
        step = max(1, int(_CHUNK / (here * kept)))
        for first in range(0, images, step):
            last = min(first + step, images)
            number = (last - first) * here
            most = max(1, round(number * kept))
            yield slice(first, last), sample_positions(number, most, self._generator)


def input_moments(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Tensor],
    ops: Sequence[Sequence[Operation]],
    most: int,
    screens: Mapping[str, Screen] | None = None,
) -> list[Moments]:
    """Moments of the columns that each of `sites` reads in `model`, in one pass over the images.

    Args:
        model: The model, in eval mode.
        sites: The sites.
        batches: Images (N, C, H, W), one batch each.
        ops: The operations of each site.
        most: Positions that are looked at for each site, about.
        screens: Directions that stand for the channels of very wide sites.
    """
    looked = [(screens or {}).get(site.name) for site in sites]
    widths = [
        site.geometry.in_channels if screen is None else len(screen.project)
        for site, screen in zip(sites, looked, strict=True)
    ]
    sums = [MomentSum(len(o) * width) for width, o in zip(widths, ops, strict=True)]
    samplers = [Sampler(site, batches, most) for site in sites]

    def add(place: int, x: Tensor) -> None:
        x = screened(x.detach().float(), looked[place])
        for part, chosen in samplers[place].inputs(x):
            rows = column_rows(part, site_window(sites[place]), ops[place], chosen)
            sums[place].add(rows.cpu())

    hooks = [
        on_input(model.get_submodule(site.name), partial(add, place))
        for place, site in enumerate(sites)
    ]
    run_watched(model, batches, hooks)
    return [total.result() for total in sums]


def sampled_rows(
    teacher: nn.Module,
    layers: Sequence[str],
    hows: Sequence[Readout],
    batches: Sequence[Tensor],
    samples: Sequence[Callable[[Tensor], Tensor]],
    calls: Sequence[int],
) -> list[list[Tensor]]:
    """What the original gives at each of some layers, in one pass over the images.

    Args:
        teacher: The original, in eval mode.
        layers: Paths of the layers.
        hows: For each, how its output counts: where a shortcut is added, the sum is read.
        batches: Images (N, C, H, W), one batch each.
        samples: For each layer what takes rows (P, C_out) of a batch of its outputs.
        calls: How often each is called.

    Returns:
        For each layer and batch the rows (P, C_out).
    """
    found: list[list[Tensor]] = [[] for _ in layers]
    wanted: dict[str, tuple[str, Side]] = {
        str(place): (layer, "output") if how.merge is None else (how.merge, "input")
        for place, (layer, how) in enumerate(zip(layers, hows, strict=True))
    }
    called = {str(place): number for place, number in enumerate(calls)}

    def sample(key: str, y: Tensor) -> Tensor:
        return samples[int(key)](y)

    for batch in batches:
        for key, rows in capture(teacher, batch, wanted, called, sample).items():
            found[int(key)].append(rows)
    return found


def rows_bytes(how: Readout) -> int:
    """Bytes of the rows of one layer's output at `POSITIONS` positions."""
    return 4 * POSITIONS * len(how.weights)
