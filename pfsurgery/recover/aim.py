"""What is fitted where a site becomes something else, and what the original gives there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.graph import GraphView
from pfsurgery.neighbours import neighbours_of_module
from pfsurgery.recover.groups import in_memory
from pfsurgery.recover.options import Option
from pfsurgery.recover.readout import Readout, readout_of, rectified_readout
from pfsurgery.recover.target import ROWS_MEMORY, Sampler, rows_bytes, sampled_rows
from pfsurgery.sites import Site


@dataclass(frozen=True, slots=True)
class Aim:
    """A site, what it becomes, and the layer whose output is then to be as it was.

    Attributes:
        site: The site.
        option: What it becomes.
        layer: Path of the layer: the site itself, or the pointwise one behind a bare site.
        how: How the layer's output counts.
    """

    site: Site
    option: Option
    layer: str
    how: Readout

    @property
    def reads_goals(self) -> bool:
        """Whether it is fitted to rows of the original's output, which `goals_of` reads."""
        return self.site.kind != "depthwise" and self.option.form != "op"


def aim_at(teacher: nn.Module, site: Site, option: Option, seen: GraphView) -> Aim:
    """What is to be fitted where `site` becomes `option`; `seen` is the view of the original."""
    if option.form != "bare" or site.kind == "depthwise":
        outputs = site.geometry.out_channels
        how = rectified_readout(teacher, site.name, site.neighbours, outputs, seen)
        return Aim(site, option, site.name, how)
    layer = pointwise_behind(site)
    around = neighbours_of_module(layer, seen)
    return Aim(site, option, layer, readout_of(teacher, around, _outputs(teacher, layer)))


def goals_of(
    teacher: nn.Module, aims: Sequence[Aim], batches: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """The original's rows for each aim, from as few passes as their memory allows."""
    for group in in_memory(aims, lambda aim: rows_bytes(aim.how), ROWS_MEMORY):
        read = [aim for aim in group if aim.reads_goals]
        layers, hows = [aim.layer for aim in read], [aim.how for aim in read]
        samples = [Sampler(aim.site, batches).outputs for aim in read]
        calls = [aim.site.calls for aim in read]
        rows = sampled_rows(teacher, layers, hows, batches, samples, calls) if read else []
        for aim in group:
            yield rows.pop(0) if aim.reads_goals else []


def pointwise_behind(site: Site) -> str:
    """Path of the pointwise layer that reads a site; a RecordMismatchError without one."""
    if site.neighbours.pointwise_after is None:
        raise RecordMismatchError(f"No pointwise layer reads {site.name}.")
    return site.neighbours.pointwise_after


def _outputs(model: nn.Module, layer: str) -> int:
    module = model.get_submodule(layer)
    return len(module.weight)  # type: ignore[arg-type]
