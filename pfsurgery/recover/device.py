"""What a site's forms cost in time on this device: measured at a few widths, a line in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from pfsurgery.errors import PolicyError
from pfsurgery.measure.latency import latency
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.optimize import optimize
from pfsurgery.packed import packed
from pfsurgery.plan import Decision, decide
from pfsurgery.policy import Rule, Tail, Tell
from pfsurgery.recover.build import op_of
from pfsurgery.recover.choices import Choices
from pfsurgery.recover.hull import Pick
from pfsurgery.recover.options import Option
from pfsurgery.rewrite import apply_plan, replacement
from pfsurgery.sites import Geometry, Site
from pfsurgery.structure import Run, Structure

_LANES = 16  # widths are worked on in whole vectors of about so many numbers
_SAMPLED = 4  # widths of a form that are timed
_TRIALS = 5  # whole networks that are timed until the budget is met
_CLOSE = 0.03  # relative distance from the budget that is near enough
_TOLERANCE = 1.1  # times the budget that still meets it


def choose_by_latency(
    choices: Choices,
    images: Tensor,
    allowed: Callable[[float], float],
    damage: Mapping[str, Sequence[float]],
    times: Mapping[str, Sequence[float]],
    pick: Pick,
    tell: Tell,
) -> dict[str, int]:
    """Chooses one option a site so that the whole network takes the time that is allowed.

    Sites are timed alone, and a network with the chosen widths as a whole, both as `optimize`
    leaves them; what the whole takes more or less than its sites promised corrects the budget, and
    the choice is made again.

    Args:
        choices: The original and the options of its sites.
        images: A batch (N, C, H, W) as it will be run.
        allowed: Of the original's time in ms, what the converted network may take.
        damage: What each option of each site does to the output.
        times: The ms of each option of each site alone, from `site_times`.
        pick: Chooses one option a site, given (ms, damage) of all and the ms that may be spent.
        tell: Called with a line of text for each network that was timed.

    Returns:
        For each site the index of its option.

    Raises:
        PolicyError: No choice is as fast as that.
    """
    points = {name: list(zip(times[name], damage[name], strict=True)) for name in choices.options}
    original = optimize(choices.teacher, images)
    whole = latency({"original": original}, images)["original"].median_ms
    asked = allowed(whole) / whole
    least = sum(min(ms) for ms in times.values())
    untouched = {name: options.index(None) for name, options in choices.options.items()}
    kept = sum(times[name][place] for name, place in untouched.items())

    def trial(left: float) -> tuple[float, dict[str, int]]:
        places = pick(points, left)
        share = _share(choices, original, places, images)
        tell(f"a network of {share:.1%} of the original's time, {asked:.1%} asked for")
        return share, places

    share, places = closest(trial, least, kept, whole, asked)
    if share > _TOLERANCE * asked:
        if asked >= 1:  # what no conversion makes faster takes its own time as it is
            return untouched
        raise PolicyError(
            f"A latency of {asked * whole:.3g} ms cannot be met: the fastest choice takes "
            f"{share * whole:.3g} ms of the original's {whole:.3g} ms. Ask for that or more, or "
            "let more sites be converted."
        )
    return places


def closest(
    trial: Callable[[float], tuple[float, dict[str, int]]],
    least: float,
    kept: float,
    whole: float,
    asked: float,
) -> tuple[float, dict[str, int]]:
    """The best of a few trials: the share of the time nearest to `asked`, not far above it.

    What the last trial took more or less than was asked for corrects the ms of the next, within
    what earlier ones showed to be too little and too much.
    """
    low, high = least, max(least, kept)
    left = min(max(least, (asked - 1) * whole + kept), high)
    found: list[tuple[float, dict[str, int]]] = []
    for number in range(1, _TRIALS + 1):
        share, places = trial(left)
        found.append((share, places))
        if abs(share / asked - 1) <= _CLOSE or (left == least and share > asked):
            break
        if share > asked:
            high = left
        else:
            low = left
        met = min(found, key=itemgetter(0))[0] <= _TOLERANCE * asked
        narrow = high - low < _CLOSE * least
        if met and narrow:
            break
        if not met and (narrow or number == _TRIALS - 1):
            left = least  # the fastest choice, before it is said that none is fast enough
            continue
        left += (asked - share) * whole
        if not low < left < high:
            left = (low + high) / 2
    within = [(share, places) for share, places in found if share <= _TOLERANCE * asked]
    return min(within or found, key=lambda one: abs(one[0] - asked))


def _share(
    choices: Choices, original: nn.Module, places: Mapping[str, int], images: Tensor
) -> float:
    """Time of a network with the chosen widths, weights left as they come, over the original's."""
    chosen = {name: choices.options[name][place] for name, place in places.items()}
    fast = optimize(typical_network(choices.teacher, choices.sites, chosen), images)
    taken = latency({"original": original, "trial": fast}, images, repeats=21)
    pairs = zip(taken["trial"].times_ms, taken["original"].times_ms, strict=True)
    return median(after / before for after, before in pairs)


def typical_network(
    teacher: nn.Module, sites: Sequence[Site], chosen: Mapping[str, Option | None]
) -> nn.Module:
    """A copy of the original with an option a site, of their widths but with any weights."""
    trial = copy.deepcopy(teacher)
    decisions = [
        typical_decision(site, option)
        for site in sites
        if (option := chosen[site.name]) is not None
    ]
    with torch.random.fork_rng(devices=[]):
        apply_plan(trial, decisions)
    return trial.eval()


def site_times(choices: Choices, batch: int) -> dict[str, list[float]]:
    """The ms of every option of every site; sites of one kind and size are timed once."""
    lines: dict[tuple[object, ...], tuple[float, float]] = {}
    found: dict[str, list[float]] = {}
    for site in choices.sites:
        options = choices.options[site.name]
        kind = (site.geometry, site.input_shape[1:], site.input_shape[0] // site.images, site.calls)
        forms = {_family(option) for option in options if option is not None}
        new = [form for form in sorted(forms) if (kind, form) not in lines]
        if new or (kind, None) not in lines:
            wanted = [o for o in options if o is not None and _family(o) in new]
            measured = _lines(choices.teacher, site, wanted, batch)
            lines |= {(kind, form): line for form, line in measured.items()}
        found[site.name] = [
            _at(lines[kind, None if option is None else _family(option)], option, site.geometry)
            for option in options
        ]
    return found


def _family(option: Option) -> str:
    """Options of one family differ in their widths alone."""
    return option.op or option.form


def _lines(
    teacher: nn.Module, site: Site, options: Sequence[Option], batch: int
) -> dict[str | None, tuple[float, float]]:
    """Intercept and slope of the ms of each form against its work; None is the convolution."""
    conv = teacher.get_submodule(site.name)
    sampled = [o for form in {_family(o) for o in options} for o in _spread(options, form)]
    weight = next(conv.parameters())
    timed: dict[str, nn.Module] = {"keep": copy.deepcopy(conv)}
    for place, option in enumerate(sampled):
        with torch.random.fork_rng(devices=[]):
            module = replacement(typical_decision(site, option), timed["keep"])
        module = module.eval().to(weight.device, weight.dtype)
        if isinstance(module, Bottleneck):
            module.freeze()
        timed[str(place)] = module
    size = (batch * site.input_shape[0] // site.images, *site.input_shape[1:])
    x = torch.zeros(size, device=weight.device, dtype=weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    for module in timed.values():
        module.to(memory_format=torch.channels_last)
    kept = timed["keep"]
    if type(kept) is nn.Conv2d and (made := packed(kept, size)).is_packed:
        timed["packed"] = made  # what `optimize` may make of one that is kept
    calls = max(1, site.calls)
    taken = {name: calls * t.median_ms for name, t in latency(timed, x, repeats=9).items()}
    least = min(taken[name] for name in ("keep", "packed") if name in taken)
    found: dict[str | None, tuple[float, float]] = {None: (least, 0.0)}
    for form in {_family(o) for o in sampled}:
        mine = [
            (_work(o, site.geometry), taken[str(i)])
            for i, o in enumerate(sampled)
            if _family(o) == form
        ]
        found[form] = _line(mine)
    return found


def typical_decision(site: Site, option: Option) -> Decision:
    """What a site becomes with an option, its columns not known before a fit."""
    if option.form == "op":
        return decide(site, Rule(option.op))
    structure = typical_structure(option, site.geometry)
    tail: Tail = "drop" if option.form == "bare" and site.kind == "dense" else "keep"
    return Decision(site, op_of(structure), tail=tail, structure=structure)


def _spread(options: Sequence[Option], form: str) -> list[Option]:
    """A few options of one form, from the cheapest to the dearest."""
    mine = sorted((o for o in options if _family(o) == form), key=lambda o: o.macs)
    places = {round(i * (len(mine) - 1) / (_SAMPLED - 1)) for i in range(_SAMPLED)}
    return [mine[place] for place in sorted(places)]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares, never falling."""
    work, ms = np.array(points).T
    spread = ((work - work.mean()) ** 2).sum()
    slope = 0.0
    if spread > 0:
        slope = max(0.0, float(((work - work.mean()) * (ms - ms.mean())).sum() / spread))
    return float(ms.mean() - slope * work.mean()), slope


def _at(line: tuple[float, float], option: Option | None, geometry: Geometry) -> float:
    intercept, slope = line
    return max(0.0, intercept + slope * (0.0 if option is None else _work(option, geometry)))


def _work(option: Option, geometry: Geometry) -> float:
    """Multiply-adds of an output position with every product's width rounded to whole vectors."""
    if option.form in ("bare", "op"):
        return 0.0
    structure = typical_structure(option, geometry)
    height, width = geometry.kernel_size
    columns = structure.columns
    if structure.dense:
        columns = (structure.reduce or geometry.in_channels) * height * width
    area = geometry.stride[0] * geometry.stride[1]
    reduction = geometry.in_channels * _whole(structure.reduce or 0) * area
    outputs = _whole(geometry.out_channels)
    if structure.waist is None:
        return float(reduction + columns * outputs)
    return float(reduction + columns * _whole(structure.waist) + structure.waist * outputs)


def _whole(width: int) -> int:
    return -(-width // _LANES) * _LANES


def typical_structure(option: Option, geometry: Geometry) -> Structure:
    """A structure of an option's form and widths; which columns it has is not known before a fit.

    A third of the columns of an unreduced input are averages, the rest taps in equal shares.
    """
    sizes, inputs = option.sizes, geometry.in_channels
    if option.form == "thin":
        return Structure("thin", sizes[0], (), sizes[1], option.error)
    if option.form == "low_rank":
        return Structure("low_rank", None, (), sizes[0], option.error)
    if option.form == "bare":
        return Structure("bare", None, _one_each(geometry, inputs), None, option.error)
    if option.form == "bottleneck":
        return Structure("bottleneck", sizes[0], _one_each(geometry, sizes[0]), None, option.error)
    if option.form == "mixed":
        r1, columns, r2 = sizes
        return Structure("mixed", r1, _taps(geometry, r1, columns, 0), r2, option.error)
    columns = sizes[-1]
    whole_window = geometry.kernel_size != (1, 1) and geometry.dilation == (1, 1)
    averages = min(inputs, columns // 3) if whole_window else 0
    runs = _taps(geometry, inputs, columns, averages)
    return Structure(option.form, None, runs, sizes[0] if len(sizes) > 1 else None, option.error)


def _taps(geometry: Geometry, channels: int, columns: int, averages: int) -> tuple[Run, ...]:
    """Averages of the whole window, and taps in equal shares, over the first channels."""
    height, width = geometry.kernel_size
    taps, left = [(i, j) for i in range(height) for j in range(width)], columns - averages
    runs = []
    for place, (row, column) in enumerate(taps):
        count = min(channels, -(-left // (len(taps) - place)))
        if count:
            runs.append(Run("tap", row, column, 1, 1, tuple(range(count))))
        left -= count
    if averages:
        runs.append(Run("average", 0, 0, height, width, tuple(range(averages))))
    return tuple(runs)


def _one_each(geometry: Geometry, channels: int) -> tuple[Run, ...]:
    """One tap for each channel, channels sorted by tap."""
    height, width = geometry.kernel_size
    taps = [(i, j) for i in range(height) for j in range(width)]
    edges = [round(i * channels / len(taps)) for i in range(len(taps) + 1)]
    return tuple(
        Run("tap", row, column, 1, 1, tuple(range(edges[i], edges[i + 1])))
        for i, (row, column) in enumerate(taps)
        if edges[i + 1] > edges[i]
    )
