"""What each site and each operation costs and gains, one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from pfsurgery.convert import marker
from pfsurgery.digests import digest, digest_of_images
from pfsurgery.graph import GraphView
from pfsurgery.measure.latency import latency
from pfsurgery.optimize import optimize
from pfsurgery.policy import Tell
from pfsurgery.recover.budget import budget
from pfsurgery.recover.calibration import as_batch
from pfsurgery.recover.choices import Choices, read_choices
from pfsurgery.recover.device import typical_decision, typical_network
from pfsurgery.recover.logs import cut_log, json_lines, parsed_lines
from pfsurgery.recover.options import Option
from pfsurgery.recover.processes import join_processes
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.state import writable_folder
from pfsurgery.run_folder import SETTING, Kind, check_same, note_run, refuse_other
from pfsurgery.select import Patterns
from pfsurgery.sites import Site
from pfsurgery.study.competitors import on_hull, with_unfitted
from pfsurgery.study.damage import damages, judge_of, seen_of

LINES = "sensitivity.jsonl"
WHOLE, ALONE = "whole network", "site alone"  # what is timed
OPS = ("max_pool", "avg_pool", "shift", "identity")
# Rounds of timing the original and the changed network in turns; long ones are less noisy.
_ROUNDS = (5, 15)
_SECONDS = 4.0  # that they should take

# The ms that each of some options of a site saves.
Gains = Callable[[Site, Sequence[Option]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One site, what it became, and what that did to an otherwise untouched network.

    Attributes:
        site: Name of the site.
        depth: Where it is, from 0 (input) to 1 (output).
        kind: Kind of the site.
        op: Name of the op, or form and widths of a fitted bottleneck.
        damage: Kullback-Leibler divergence of the class probabilities to the original's, in nats,
            after the repair at that site; for outputs that are no logits see
            `pfsurgery.recover.distance.distance`.
        top1: Accuracy after the repair in percent, None where no `validate` was given.
        macs: Multiply-adds saved, of one image.
        params: Parameters saved.
        ms: Time saved, of one batch, measured in the whole network in turns with the original (in
            a search, of the site alone).
        seconds: Wall-clock time of all options of the site that were measured together.
    """

    site: str
    depth: float
    kind: str
    op: str
    damage: float
    top1: float | None
    macs: int
    params: int
    ms: float
    seconds: float


def sensitivity(
    model: nn.Module,
    images: Any,
    *,
    ops: Sequence[str] = OPS,
    fitted: int = 4,
    batch: int = 8,
    validate: Callable[[nn.Module], float] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    out: str | Path | None = None,
    tell: Tell = lambda line: None,
) -> tuple[Sensitivity, ...]:
    """Change each site in each way, alone, repair it in closed form, and measure cost and gain.

    No labels are needed: the damage is how far the outputs on held-out images move. Sites are
    shared among the processes that `torchrun` or `accelerate launch` started.

    Args:
        model: The trained model; left as it is.
        images: A few hundred unlabelled images, as `pfsurgery.recalibrate` takes them; a tenth is
            held out to measure the damage.
        ops: Ops that are not fitted, see `pfsurgery.list_ops`.
        fitted: Most bottlenecks fitted to the images at each site, from cheap to good; 0 for none.
        batch: Images of a timed batch.
        validate: Accuracy in percent of a model, if labels are at hand.
        include: Patterns of the sites that are measured.
        exclude: Patterns of sites that are not.
        out: Folder for `sensitivity.jsonl`, one line an option, written as each site is done. A run
            that was stopped goes on behind the sites that are there.
        tell: Called with a line of text for each site.

    Returns:
        One for each site and option, the smallest damage for the multiply-adds saved first.

    Raises:
        SurgeryError: The model has no sites, the images do not fit, or `out` cannot be written or
            holds a damaged line.
    """
    folder = None if out is None else begun(out, model, WHOLE, batch, validate)
    policy = budget(macs="50%")
    mark = marker(model, policy, include, exclude)
    choices = read_choices(model, mark, images, policy.forms if fitted else (), tell)
    rivals = with_unfitted(on_hull(choices, fitted, policy.cost), ops)
    gains = partial(_times_saved, rivals, batch=batch)
    return ranked(measured("sensitivity", rivals, gains, WHOLE, batch, validate, folder, tell))


def begun(
    out: str | Path,
    model: nn.Module,
    timed: str,
    batch: int,
    validate: Callable[[nn.Module], float] | None,
) -> Path:
    """The run folder, which is refused here, before hours of fitting, if it is another run's.

    Raises:
        TrainingError: It holds a run of another setting, or cannot be written to.
    """
    folder = writable_folder(out)
    refuse_other(folder / SETTING, _setting(model, timed, batch, validate))
    return folder


def _setting(
    model: nn.Module, timed: str, batch: int, validate: Callable[[nn.Module], float] | None
) -> dict[str, Any]:
    return {
        "model": digest(model),
        "batch": batch,
        "timed": timed,
        "validated": validate is not None,
    }


def measured(
    kind: Kind,
    choices: Choices,
    gains: Gains,
    timed: str,
    batch: int,
    validate: Callable[[nn.Module], float] | None,
    folder: Path | None,
    tell: Tell,
) -> tuple[Sensitivity, ...]:
    """A row for each option of each site, in the order of the sites; what is known is not repeated.

    Args:
        kind: What the run folder is of.
        choices: The original and the options of its sites.
        gains: The ms that each of some options of a site saves.
        timed: What `gains` times, in words.
        batch: Images of a batch that `gains` times.
        validate: As for `sensitivity`.
        folder: Run folder, None for none.
        tell: Called with a line of text for each site.
    """
    wanted = {key for site in choices.sites for key in _labels(choices, site)}
    rows: list[Sensitivity] = []
    write = json_lines(None if folder is None else folder / LINES)
    if folder is not None:
        images = digest_of_images([*choices.batches, *choices.judges])
        setting = _setting(choices.teacher, timed, batch, validate) | {"images": images}
        if _is_first():
            check_same(folder / SETTING, setting)
            note_run(folder, kind, model=choices.teacher)
            cut_log(folder / LINES, 0)  # drops what a killed write left of a line
        _meet()
        rows += read_sensitivity(folder)
        _meet()  # all processes have read the same, before one of them adds to it
    known = {(row.site, row.op) for row in rows}
    left = [site for site in choices.sites if not _labels(choices, site) <= known]
    changes = sum(len(_labels(choices, site) - known) for site in left)
    tell(f"{changes} changes of {len(left)} sites to measure, one after the other")
    judge, seen = judge_of(choices), seen_of(choices)

    def measure(network: nn.Module) -> tuple[float, float | None]:
        return judge(network), None if validate is None else validate(network)

    for site in _mine(tracked(left, "measuring sites")):
        options = [o for o in _forms(choices, site) if (site.name, str(o)) not in known]
        lines = _measure(choices, site, options, gains, measure, seen)
        rows += lines
        for line in lines:
            write(asdict(line))
        tell(f"{site.name}: {_summary(lines)}")
    latest = {(row.site, row.op): row for row in _all_rows(rows, folder)}
    return tuple(row for key, row in latest.items() if key in wanted)


def _meet() -> None:
    state = join_processes()
    if state is not None:
        state.wait_for_everyone()


def _forms(choices: Choices, site: Site) -> list[Option]:
    return [option for option in choices.options[site.name] if option is not None]


def _labels(choices: Choices, site: Site) -> set[tuple[str, str]]:
    return {(site.name, str(option)) for option in _forms(choices, site)}


def ranked(rows: Iterable[Sensitivity]) -> tuple[Sensitivity, ...]:
    """The rows by damage for each multiply-add saved; those that save nothing last."""
    return tuple(sorted(rows, key=lambda row: (row.macs <= 0, row.damage / max(1, row.macs))))


def _measure(
    choices: Choices,
    site: Site,
    options: Sequence[Option],
    gains: Gains,
    measure: Callable[[nn.Module], tuple[float, float | None]],
    seen: GraphView,
) -> list[Sensitivity]:
    started = time.perf_counter()
    harm = damages(choices, site, options, measure, seen)
    saved = gains(site, options)
    seconds = round(time.perf_counter() - started, 3)
    lines = []
    for option, (damage, top1), ms in zip(options, harm, saved, strict=True):
        decision = typical_decision(site, option)
        macs = decision.macs_saved // site.images
        params = decision.parameters_saved
        where = (site.name, site.depth, site.kind, str(option))
        lines.append(Sensitivity(*where, damage, top1, macs, params, ms, seconds))
    return lines


def _times_saved(
    choices: Choices, site: Site, options: Sequence[Option], *, batch: int
) -> list[float]:
    """The ms that each option saves in the whole network, as `optimize` leaves both."""
    images = as_batch(choices.batches[0][:1], batch)
    original = optimize(choices.teacher, images)
    alone = latency({"original": original}, images, repeats=2, warmup=1)["original"].median_ms
    least, most = _ROUNDS
    rounds = max(least, min(most, round(_SECONDS / (2 * alone / 1000))))
    saved = []
    for option in options:
        trial = typical_network(choices.teacher, [site], {site.name: option})
        pair = {"original": original, "trial": optimize(trial, images)}
        taken = latency(pair, images, repeats=rounds)
        times = zip(taken["original"].times_ms, taken["trial"].times_ms, strict=True)
        saved.append(median(before - after for before, after in times))
    return saved


def _summary(lines: Sequence[Sensitivity]) -> str:
    best = min(lines, key=lambda line: line.damage, default=None)
    return "nothing can take its place" if best is None else f"{best.op} costs {best.damage:.4f}"


def read_sensitivity(folder: Path) -> tuple[Sensitivity, ...]:
    """The rows of a run folder, as many as there are yet.

    Raises:
        SurgeryError: A line is not what `sensitivity` writes.
    """
    rows = parsed_lines(folder / LINES, lambda values: Sensitivity(**values), "a measured site")
    return tuple({(row.site, row.op): row for row in rows}.values())


def _is_first() -> bool:
    state = join_processes()
    return state is None or bool(state.is_main_process)


def _mine(sites: Iterator[Site]) -> Iterator[Site]:
    """This process's share of the sites."""
    state = join_processes()
    for place, site in enumerate(sites):
        if state is None or place % state.num_processes == state.process_index:
            yield site


def _all_rows(rows: list[Sensitivity], folder: Path | None) -> tuple[Sensitivity, ...]:
    """The rows of all processes, which meet here."""
    state = join_processes()
    if state is None:
        return tuple(rows)
    if folder is None:
        from accelerate.utils import gather_object

        return tuple(dict.fromkeys(gather_object(rows)))
    state.wait_for_everyone()
    return read_sensitivity(folder)
