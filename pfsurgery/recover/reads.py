"""One site's fitting problem: what it reads in the edited network, what it should give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pfsurgery.errors import DataError
from pfsurgery.recover.aim import Aim
from pfsurgery.recover.capture import Side
from pfsurgery.recover.columns import column_rows
from pfsurgery.recover.front import Front
from pfsurgery.recover.gram import Moments, MomentSum
from pfsurgery.recover.readout import around_sum, lacking, visible
from pfsurgery.recover.screen import Screen, screened
from pfsurgery.recover.target import Sampler, rows_bytes, site_operations, site_window


@dataclass(frozen=True, slots=True)
class Read:
    """What a site reads of one batch in the edited network, and what it should give.

    Attributes:
        x: What it reads, (N, C, H, W).
        goal: What it should give at the sampled positions, (P, C_out). That is what the original
            gives there; where a shortcut is added it is what the sum lacks, the original's sum less
            the edited network's shortcut, so that a site corrects what those before it got wrong.
        shortcut: What is added there behind the norm, (P, C_out), None without a shortcut.
    """

    x: Tensor
    goal: Tensor
    shortcut: Tensor | None


@dataclass(frozen=True, slots=True)
class Reads:
    """What a site reads of all batches: whoever iterates sends them through the edited network.

    Attributes:
        front: The edited network, whose site still is its convolution, and the images.
        aim: The site, the layer whose output is wanted, and how that counts.
        goals: The original's rows of this layer, from `goals_of` with the same images.
    """

    front: Front
    aim: Aim
    goals: Sequence[Tensor]

    def __iter__(self) -> Iterator[Read]:
        """One read a batch."""
        how, site = self.aim.how, self.aim.site
        rows = Sampler(site, self.front.batches)
        own: dict[str, tuple[str, Side]] = {"x": (site.name, "input")}
        wanted = own | around_sum(how, self.aim.layer)
        calls = dict.fromkeys(wanted, site.calls)
        captured = self.front.captures(site.name, wanted, calls)
        for made, goal in zip(captured, self.goals, strict=True):
            yield Read(made["x"], *lacking(goal, made, rows.outputs, how))

    @property
    def bytes(self) -> int:
        """Memory of all of them, about, without the goals that the caller holds."""
        site, images = self.aim.site, sum(len(batch) for batch in self.front.batches)
        numbers = site.calls * torch.Size(site.input_shape).numel() * images // site.images
        own = 0 if self.aim.how.merge is None else 2 * rows_bytes(self.aim.how)
        return numbers * self.front.batches[0].element_size() + own


def let_through(
    reads: Iterable[Read], module: nn.Module, aim: Aim, batches: Sequence[Tensor]
) -> Iterator[Read]:
    """The reads, asking only for what the ReLU behind lets through, where `module` is the site."""
    rows = Sampler(aim.site, batches)
    for read in reads:
        with torch.no_grad():
            made = rows.outputs(module.forward(read.x))  # hooks have seen what was captured
        yield replace(read, goal=visible(read.goal, made, read.shortcut, aim.how))


def refit_moments(
    reads: Iterable[Read],
    aim: Aim,
    batches: Sequence[Tensor],
    screen: Screen | None = None,
    known: Moments | None = None,
) -> Moments:
    """Moments of the columns that a site reads in the edited network, and of what it should give.

    Args:
        reads: What it reads and should give.
        aim: The site.
        batches: The images, one batch for each read.
        screen: Directions that stand for the channels of a very wide site.
        known: Moments of the same columns, with other targets, if they are known.

    Raises:
        DataError: There is no image.
    """
    total: MomentSum | None = None
    site, ops = aim.site, site_operations(aim.site)
    sampler, window = Sampler(site, batches), site_window(site)
    for read in reads:
        x = screened(read.x.float(), screen)
        total = total or MomentSum(len(ops) * x.shape[1], read.goal.shape[1], known)
        first = 0
        for part, chosen in sampler.inputs(x):
            values = column_rows(part, window, ops, chosen).cpu()
            total.add(values, read.goal[first : first + len(values)])
            first += len(values)
    if total is None:
        raise DataError("There is no image to fit to.")
    return total.result()
