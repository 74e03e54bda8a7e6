"""The paper's layer-level study: which operation can take the place of a bottleneck's 3x3."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from torch import nn

from pfsurgery.batches import Images
from pfsurgery.errors import SurgeryError
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.state import writable_folder
from pfsurgery.run_folder import write_json
from pfsurgery.sites import Site
from pfsurgery.study.images import study_images
from pfsurgery.study.networks import (
    DENSE,
    DEPTHWISE,
    MIXED,
    bottlenecks,
    dense_network,
    with_operations,
)
from pfsurgery.study.setting import StudySetting
from pfsurgery.study.training import Trainings, name_of

if TYPE_CHECKING:
    from rich.table import Table

RESULT = "layer.json"
PLACES = ("single", "several")
UNKNOWN = "not found"
PAPER = {
    "data": "CIFAR-10 (from memory, not confirmed)",
    "images": UNKNOWN,
    "size": UNKNOWN,
    "layers": f"one bottleneck, then several; numbers {UNKNOWN}",
    "width": UNKNOWN,
    "epochs": "300, since depthwise convolutions converge slowly",
    "batch_size": UNKNOWN,
    "lr": UNKNOWN,
    "seeds": UNKNOWN,
    "ops": "depthwise convolution, parameter-free operations",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSetting(StudySetting):
    """Setting of the layer-level study.

    Attributes:
        ops: What the 3x3 becomes: `dense` (it stays), `depthwise`, `mixed` (an equal share of the
            channels for maximum, average and shift) or the name of a parameter-free op; `identity`
            is nothing at all.
    """

    ops: tuple[str, ...] = (
        *(DENSE, DEPTHWISE, "max_pool", "avg_pool", "shift", MIXED, "identity"),
    )

    def __post_init__(self) -> None:
        StudySetting.__post_init__(self)
        if not self.ops or len(set(self.ops)) < len(self.ops):
            raise SurgeryError(f"The study's ops must be different names, not {self.ops}.")


SMALL = LayerSetting(images=2000, val_images=2000)
FULL = LayerSetting(
    images=None,
    val_images=None,
    layers=(2, 3, 3),
    width=64,
    stem_stride=1,
    epochs=300,
    batch_size=128,
    lr=0.1,
)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One operation at one place.

    Attributes:
        place: `single`: a network of one bottleneck, which has the operation. `several`: a network
            of all bottlenecks; those without a stride have it, the others keep their dense 3x3.
        op: The operation.
        top1: Top-1 on the validation images in percent, one for each seed.
        params: Parameters of the network.
        macs: Multiply-adds of one image.
        ms: Median time of a batch of 32 in ms, channels_last, timed in turns with the others.
    """

    place: str
    op: str
    top1: tuple[float, ...]
    params: int
    macs: int
    ms: float

    @property
    def mean(self) -> float:
        """Mean top-1 in percent."""
        return fmean(self.top1)

    @property
    def deviation(self) -> float:
        """Standard deviation of top-1 over the seeds, in points; 0 with a single seed."""
        return stdev(self.top1) if len(self.top1) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What came of the study.

    Attributes:
        setting: What it was made with.
        paper_setting: What is known of the paper's.
        rows: One for each operation at each place.
    """

    setting: dict[str, Any]
    paper_setting: dict[str, str]
    rows: tuple[LayerRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        from pfsurgery.tables import render

        return render(self.__rich__())

    def __rich__(self) -> Table:
        """The result as a Rich table."""
        from pfsurgery.measure.table import quantity
        from pfsurgery.tables import add_numbers, titled

        table = titled("What takes the place of the 3x3")
        for column in ("place", "op"):
            table.add_column(column)
        for column in ("top-1 %", "+-", "params", "MACs", "ms, 32 images"):
            add_numbers(table, column)
        for row in self.rows:
            table.add_row(
                row.place,
                row.op,
                f"{row.mean:.2f}",
                f"{row.deviation:.2f}",
                quantity(row.params, ""),
                quantity(row.macs, "MACs"),
                f"{row.ms:.2f}",
                end_section=row.op == self.setting["ops"][-1],
            )
        return table


def layer_study(
    train: Images | str | Path,
    val: Images | str | Path,
    out: str | Path,
    *,
    setting: LayerSetting = SMALL,
) -> LayerResult:
    """Train a network for each operation, place and seed, from scratch and all in the same way.

    Networks of one place and seed begin with the same weights wherever they have the same layers,
    and see the same images in the same order. Each training is noted in `out` as it is done, and
    one in progress has a checkpoint at each epoch: given again, the same call goes on.

    Args:
        train: Training images: a path or name that `pfsurgery.data.open_data` understands, a
            `Dataset` of (image, label), or an iterable of (images, labels). They are held in
            memory, randomly moved by a few pixels and mirrored (the digits are not mirrored).
        val: Validation images, of the same kinds.
        out: Folder for `layer.json`, `run.json` and what is done so far.
        setting: What to train; `SMALL` or `FULL`, or one of your own.

    Raises:
        SurgeryError: The images cannot be opened, a training diverges, `out` cannot be written or
            holds another setting; the message says what to do.
    """
    folder = writable_folder(out)
    images = study_images(train, val, setting)
    trainings = Trainings(folder, "layer", setting, images, (name_of(train), name_of(val)))
    # Seeds outermost, so that a run that was cut short has all operations
    tasks = [
        (place, op, seed) for seed in range(setting.seeds) for place in PLACES for op in setting.ops
    ]
    sites = {place: _sites(trainings, place) for place in PLACES}
    top1: dict[tuple[str, str], list[float]] = {}
    for place, op, seed in tracked(tasks, "training"):
        make = partial(_network, trainings, sites[place], place, op, seed)
        reached = trainings.top1(f"{place}-{op}-{seed}", make, seed)
        top1.setdefault((place, op), []).append(reached)
    rows = []
    for place in PLACES:
        networks = {op: _network(trainings, sites[place], place, op, 0) for op in setting.ops}
        costs = trainings.costs(networks)
        rows += [LayerRow(place, op, tuple(top1[place, op]), **costs[op]) for op in setting.ops]
    result = LayerResult(trainings.described, PAPER, tuple(rows))
    write_json(trainings.out / RESULT, result.to_dict())
    return result


def _sites(trainings: Trainings, place: str) -> tuple[Site, ...]:
    found = bottlenecks(_dense(trainings, place, 0), trainings.example)
    return tuple(site for site in found if not site.geometry.strided)


def _network(
    trainings: Trainings, sites: tuple[Site, ...], place: str, op: str, seed: int
) -> nn.Module:
    dense = _dense(trainings, place, seed)
    return with_operations(dense, sites, [op] * len(sites), trainings.example, seed=seed)


def _dense(trainings: Trainings, place: str, seed: int) -> nn.Module:
    images = trainings.images
    return dense_network(
        trainings.setting,
        channels=images.shape[0],
        classes=images.classes,
        seed=seed,
        single=place == "single",
    )
