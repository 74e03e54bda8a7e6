"""The networks that a search makes and measures, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pfsurgery.measure import count
from pfsurgery.measure.latency import latency
from pfsurgery.optimize import optimize
from pfsurgery.plan import Plan
from pfsurgery.policy import Tell
from pfsurgery.record import remember
from pfsurgery.recover.budget import Budget, Unit, absolute
from pfsurgery.recover.calibration import as_batch
from pfsurgery.recover.choices import Choices, Places, carry_out, finished
from pfsurgery.recover.device import site_times
from pfsurgery.recover.options import Option
from pfsurgery.run_folder import write_json
from pfsurgery.sites import Site
from pfsurgery.study.damage import Judge, judge_of
from pfsurgery.study.known import Known, named_options
from pfsurgery.study.sensitivity import ALONE, Sensitivity, measured

RESULT = "search.json"
Alone = Mapping[tuple[str, str], Sensitivity]  # by site and option


@dataclass(frozen=True, slots=True)
class Point:
    """A network that the search made.

    Attributes:
        name: How its forms were chosen.
        origin: The same as a word: `budget` (relative errors), `sensitivity`, `repair`, `optuna`.
        macs: Multiply-adds of one image.
        params: Parameters.
        ms: Time of one batch, as `optimize` leaves it.
        damage: Distance of its outputs to the original's (KL in nats) on images that it was not
            fitted to; the network that is returned, which is fitted to all, has that of its choice.
        top1: Accuracy in percent, None where no `validate` was given.
        chosen: Whether it is the result.
    """

    name: str
    origin: str
    macs: int
    params: int
    ms: float
    damage: float
    top1: float | None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        model: The converted model, of the class of the original.
        plan: What each site became.
        points: All networks that were made on the way.
        original: The original, measured in the same way.
        predicted_ms: What a batch takes by the sum of what the sites take alone.
    """

    model: nn.Module
    plan: Plan
    points: tuple[Point, ...]
    original: Point
    predicted_ms: float

    @property
    def chosen(self) -> Point:
        """The network that `model` is."""
        return next(point for point in self.points if point.chosen)


@dataclass(frozen=True, slots=True)
class Made:
    """A network of the search.

    Attributes:
        places: Index of each site's option.
        point: What was measured.
        share: Of the original's multiply-adds, parameters or time, in the unit of the bench.
    """

    places: Places
    point: Point
    share: float


@dataclass(frozen=True)
class Bench:
    """How networks are made and measured.

    Attributes:
        choices: The original, the options of its sites, images to fit to and images to judge by.
        validate: Accuracy in percent, None without labels.
        batch: Images of a timed batch.
        unit: What a budget is in: `macs`, `params` or `latency`.
        known: What was measured before.
        tell: Called with a line of text for each network.
    """

    choices: Choices
    validate: Callable[[nn.Module], float] | None
    batch: int
    unit: Unit
    known: Known
    tell: Tell

    @cached_property
    def judge(self) -> Judge:
        """Measures how far outputs are from the original's."""
        return judge_of(self.choices)

    def make(self, name: str, origin: str, places: Places) -> Made:
        """The network with one option a site."""
        what = {
            "network": named_options(self.choices, places),
            "validated": self.validate is not None,
            "unit": self.unit,
        }
        values, share = self.known.measured(what, lambda: self._measured(places))
        point = Point(name, origin, **values)
        self.tell(f"{name}: damage {point.damage:.4f}, {point.macs:.4g} MACs, {point.ms:.3g} ms")
        return Made(places, point, share)

    def known_places(self, what: dict[str, Any], choose: Callable[[], Places]) -> Places:
        """The choice that was made in the same situation before, or else is made now."""
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        named = self.known.measured({"choice": key}, lambda: named_options(self.choices, choose()))
        words = {name: list(map(str, options)) for name, options in self.choices.options.items()}
        return {name: words[name].index(word) for name, word in named.items()}

    def _measured(self, places: Places) -> tuple[dict[str, Any], float]:
        """The fields of its point, and its share of the original's cost."""
        network, _ = carry_out(self.choices, places)
        before, after = self.timed(network)
        whole = count(network, self._image)
        values: dict[str, Any] = {
            "macs": whole.macs,
            "params": whole.parameters,
            "ms": after,
            "damage": self.judge(network),
            "top1": None if self.validate is None else self.validate(network),
        }
        point, original = Point("", "", **values), self.original(before)
        return values, _amount(point, self.unit) / _amount(original, self.unit)

    def original(self, ms: float) -> Point:
        """The original as a point, its accuracy left open."""
        whole = count(self.choices.teacher, self._image)
        return Point("original", "original", whole.macs, whole.parameters, ms, 0.0, None)

    def timed(self, network: nn.Module) -> tuple[float, float]:
        """The ms of the original and of a network, in turns, as `optimize` leaves them."""
        images = as_batch(self._image, self.batch)
        pair = {"original": self.choices.teacher, "network": network}
        taken = latency({key: optimize(model, images) for key, model in pair.items()}, images)
        return taken["original"].median_ms, taken["network"].median_ms

    def allowed(self, policy: Budget) -> float:
        """The share of the original's that the budget allows."""
        ms = self.timed(self.choices.teacher)[0] if self.unit == "latency" else 0.0
        whole = _amount(self.original(ms), self.unit)
        return absolute(policy.amount, whole) / whole

    @property
    def _image(self) -> Tensor:
        return self.choices.batches[0][:1]


def _amount(point: Point, unit: Unit) -> float:
    return point.ms if unit == "latency" else float(getattr(point, unit))


def measured_alone(
    choices: Choices,
    times: Callable[[], Mapping[str, Sequence[float]]],
    batch: int,
    folder: Path | None,
    tell: Tell,
) -> Alone:
    """What each option of each site does in the otherwise untouched network.

    The time that it saves is that of the site alone: in the whole network it would take as long to
    measure as all else.
    """

    def gains(site: Site, options: Sequence[Option]) -> list[float]:
        known, ms = choices.options[site.name], times()[site.name]
        return [ms[0] - ms[known.index(option)] for option in options]

    rows = measured("search", choices, gains, ALONE, batch, None, folder, tell)
    return {(row.site, row.op): row for row in rows}


def damages_alone(choices: Choices, alone: Alone) -> dict[str, list[float]]:
    """The damage of each option of each site, none for keeping the convolution."""
    return {
        name: [0.0 if option is None else alone[name, str(option)].damage for option in options]
        for name, options in choices.options.items()
    }


def found(
    model: nn.Module,
    policy: Budget,
    choices: Choices,
    bench: Bench,
    best: Made,
    points: Sequence[Point],
    alone: Alone,
    folder: Path | None,
) -> Found:
    """The result of a search: the best choice fitted to all images, timed, written to `folder`."""
    network, done = carry_out(choices, best.places)
    before, after = bench.timed(network)
    name = f"{best.point.name}, fitted to all images"
    original, chosen = bench.original(before), replace(best.point, name=name, ms=after, chosen=True)
    if bench.validate is not None:
        original = replace(original, top1=bench.validate(choices.teacher))
        chosen = replace(chosen, top1=bench.validate(network))
    times = site_times(choices, bench.batch)  # anew: the machine may have been busier before
    gains = {site: times[site][0] - times[site][best.places[site]] for site in done}
    for site, decision in done.items():
        option = choices.options[site][best.places[site]]
        told = _told(alone[site, str(option)].damage, gains[site])
        done[site] = replace(decision, reason=told)
    name = policy.name.replace("budget(", "search(", 1)
    fast, plan = finished(model, network, name, choices.plan, done, "kept by the search")
    remember(fast, plan)
    predicted = round(before - sum(gains.values()), 6)
    result = Found(fast, plan, (*points, chosen), original, predicted)
    if folder is not None:
        write_json(folder / RESULT, _as_values(policy, result))
    return result


def _told(damage: float, gain: float) -> str:
    """What was done at a site, by the damage and the gain that it has alone."""
    return f"alone it costs {damage:.2g} nats and saves {gain:.3g} ms"


def _as_values(policy: Budget, found: Found) -> dict[str, Any]:
    return {
        "unit": policy.unit,
        "original": asdict(found.original),
        "points": [asdict(point) for point in found.points],
        "predicted_gain_ms": found.original.ms - found.predicted_ms,
        "measured_gain_ms": found.original.ms - found.chosen.ms,
        "plan": found.plan.to_dict(),
    }
