"""The paper's architecture search: each bottleneck chooses its own operation."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from pfsurgery.batches import Images
from pfsurgery.errors import DataError, SurgeryError
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.state import writable_folder
from pfsurgery.run_folder import write_json
from pfsurgery.sites import Site
from pfsurgery.study.darts import SearchEpoch, SearchSetting, search
from pfsurgery.study.images import study_images
from pfsurgery.study.networks import DEPTHWISE, bottlenecks, dense_network, with_operations
from pfsurgery.study.setting import StudySetting
from pfsurgery.study.supernet import choices, supernet
from pfsurgery.study.training import Trainings, name_of

if TYPE_CHECKING:
    from rich.console import Group

RESULT = "nas.json"
FOUND = "found"
PARTS = ("first third", "second third", "last third")
UNKNOWN = "not found"
PAPER = {
    "data": "CIFAR-10 (from memory, not confirmed)",
    "images": UNKNOWN,
    "layers": UNKNOWN,
    "width": UNKNOWN,
    "epochs": UNKNOWN,
    "candidates": f"trained and parameter-free operations; list {UNKNOWN}",
    "search": "differentiable, as in DARTS (from memory, not confirmed); each cell on its own",
    "search_epochs": UNKNOWN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NasSetting(StudySetting):
    """Setting of the architecture search.

    Attributes:
        candidates: What a bottleneck may choose from; names as in `LayerSetting.ops`.
        search: How the supernet is trained. The other settings are of the networks that are
            compared, each trained from scratch.
    """

    candidates: tuple[str, ...] = (DEPTHWISE, "max_pool", "avg_pool", "shift", "identity")
    search: SearchSetting = field(default_factory=SearchSetting)

    def __post_init__(self) -> None:
        StudySetting.__post_init__(self)
        if len(set(self.candidates)) < max(2, len(self.candidates)):
            raise SurgeryError(
                f"The study's candidates must be two different names or more, not "
                f"{self.candidates}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The setting as JSON-ready values, those of the search with `search_` before the name."""
        values = StudySetting.to_dict(self)
        search = values.pop("search")
        return {**values, **{f"search_{name}": value for name, value in search.items()}}


SMALL = NasSetting(images=2000, val_images=2000)
FULL = NasSetting(
    images=None,
    val_images=None,
    layers=(4, 4, 4),
    width=32,
    stem_stride=1,
    epochs=300,
    batch_size=128,
    lr=0.1,
    search=SearchSetting(epochs=50, warmup=10, lr=0.05, choice_lr=1e-3),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """What one bottleneck chose.

    Attributes:
        cell: Its number, from 0.
        depth: Where it stands, from 0 (first) to 1 (last).
        kind: `reduction` with a stride, `normal` without.
        chosen: The operation of the highest probability.
        weights: Probability of each candidate.
    """

    cell: int
    depth: float
    kind: str
    chosen: str
    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class Trained:
    """A network that was trained from scratch.

    Attributes:
        name: What it is.
        top1: Top-1 on the validation images in percent, mean over the seeds (each is in
            `trainings.jsonl`).
        params: Parameters.
        macs: Multiply-adds of one image.
        ms: Median time of a batch of 32 in ms, channels_last, timed in turns with the others.
    """

    name: str
    top1: float
    params: int
    macs: int
    ms: float


@dataclass(frozen=True, slots=True)
class NasResult:
    """What came of the search.

    Attributes:
        setting: What it was made with.
        paper_setting: What is known of the paper's.
        candidates: Names of the operations.
        cells: One for each bottleneck, from the input to the output.
        history: Of the search, one entry an epoch.
        found: The network of the chosen operations.
        baselines: Networks with one operation everywhere, and one of random choices.
    """

    setting: dict[str, Any]
    paper_setting: dict[str, str]
    candidates: tuple[str, ...]
    cells: tuple[Cell, ...]
    history: tuple[SearchEpoch, ...]
    found: Trained
    baselines: tuple[Trained, ...]

    def counts(self) -> dict[str, Counter[str]]:
        """How often each operation was chosen in the first, second and last third of the depth."""
        made = {part: Counter[str]() for part in PARTS}
        for cell in self.cells:
            made[PARTS[min(2, int(3 * cell.depth))]][cell.chosen] += 1
        return made

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        values = asdict(self)
        del values["found"]["name"]
        return values

    def __str__(self) -> str:
        from pfsurgery.tables import render

        return render(self.__rich__())

    def __rich__(self) -> Group:
        """What was chosen, cell by cell and by depth, and how good it is."""
        from rich.console import Group

        from pfsurgery.measure.table import quantity
        from pfsurgery.tables import add_numbers, titled

        cells = titled("What each bottleneck chose")
        for column in ("cell", "kind", "chosen"):
            cells.add_column(column)
        for op in self.candidates:
            add_numbers(cells, op)
        for cell in self.cells:
            shares = (f"{cell.weights[op]:.3f}" for op in self.candidates)
            cells.add_row(str(cell.cell), cell.kind, cell.chosen, *shares)
        depths = titled("How often, by depth")
        depths.add_column("")
        for op in self.candidates:
            add_numbers(depths, op)
        for part, counted in self.counts().items():
            depths.add_row(part, *(str(counted[op]) for op in self.candidates))
        networks = titled("Trained from scratch")
        networks.add_column("network")
        for column in ("top-1 %", "params", "MACs", "ms, 32 images"):
            add_numbers(networks, column)
        for made in (self.found, *self.baselines):
            networks.add_row(
                made.name,
                f"{made.top1:.2f}",
                quantity(made.params, ""),
                quantity(made.macs, "MACs"),
                f"{made.ms:.2f}",
            )
        return Group(cells, "", depths, "", networks)


def nas_study(
    train: Images | str | Path,
    val: Images | str | Path,
    out: str | Path,
    *,
    setting: NasSetting = SMALL,
) -> NasResult:
    """Search an operation for each bottleneck, then train what was found and its rivals.

    A supernet has all candidates in every bottleneck, and a softmax over them for each (see
    `pfsurgery.study.darts`). The network of the most probable ones is trained from scratch, in the
    same way as all depthwise, all max-pool, and a random choice. The search keeps its state in
    `out` at each epoch, and each training is noted as it is done: given again, the same call goes
    on.

    Args:
        train: Training images, as `layer_study` takes them.
        val: Validation images; the search does not see them.
        out: Folder for `nas.json`, `run.json` and what is done so far.
        setting: What to search and train; `SMALL` or `FULL`, or one of your own.

    Raises:
        DataError: No class has two training images.
        SurgeryError: The images cannot be opened, a training diverges, `out` cannot be written or
            holds another setting; the message says what to do.
    """
    folder = writable_folder(out)
    images = study_images(train, val, setting)
    if not len(images.train.halves()[1]):
        raise DataError(
            f"The search needs at least two images of a class, one for each half that it trains "
            f"on, and none of {name_of(train)} has: give more, or a setting with more images."
        )
    trainings = Trainings(folder, "nas", setting, images, (name_of(train), name_of(val)))
    dense = _dense(trainings, setting.search.seed)
    sites = bottlenecks(dense, trainings.example)
    model = supernet(dense, sites, setting.candidates, seed=setting.search.seed)
    history = search(
        model,
        images,
        setting,
        setting.search,
        val=trainings.val_batches(),
        folder=folder / "search",
    )
    cells = tuple(
        _cell(place, site, choice.weights(), len(sites))
        for place, (site, choice) in enumerate(zip(sites, choices(model), strict=True))
    )
    draw = random.Random(setting.search.seed)
    networks = {
        FOUND: [cell.chosen for cell in cells],
        f"all {DEPTHWISE}": [DEPTHWISE] * len(sites),
        "all max_pool": ["max_pool"] * len(sites),
        "random": [draw.choice(setting.candidates) for _ in sites],
    }
    tasks = [(name, seed) for seed in range(setting.seeds) for name in networks]
    top1: dict[str, list[float]] = {}
    for name, seed in tracked(tasks, "training"):
        make = partial(_network, trainings, sites, networks[name], seed)
        reached = trainings.top1(f"{name.replace(' ', '-')}-{seed}", make, seed)
        top1.setdefault(name, []).append(reached)
    costs = trainings.costs(
        {name: _network(trainings, sites, ops, 0) for name, ops in networks.items()}
    )
    found, *baselines = (
        Trained(name, round(fmean(top1[name]), 4), **costs[name]) for name in networks
    )
    result = NasResult(
        trainings.described,
        PAPER,
        setting.candidates,
        cells,
        history,
        found,
        tuple(baselines),
    )
    write_json(folder / RESULT, result.to_dict())
    return result


def _dense(trainings: Trainings, seed: int) -> nn.Module:
    images = trainings.images
    return dense_network(
        trainings.setting, channels=images.shape[0], classes=images.classes, seed=seed
    )


def _network(trainings: Trainings, sites: tuple[Site, ...], ops: list[str], seed: int) -> nn.Module:
    return with_operations(_dense(trainings, seed), sites, ops, trainings.example, seed=seed)


def _cell(place: int, site: Site, weights: dict[str, float], cells: int) -> Cell:
    return Cell(
        cell=place,
        depth=round(place / max(1, cells - 1), 4),
        kind="reduction" if site.geometry.strided else "normal",
        chosen=max(weights, key=lambda op: weights[op]),
        weights={op: round(weight, 6) for op, weight in weights.items()},
    )
