"""The policy `budget`: fitted bottlenecks where they remove most error for what may be spent."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from pfsurgery.errors import PolicyError
from pfsurgery.plan import Decision, Plan, decide
from pfsurgery.policy import Rule, Tell
from pfsurgery.recover.calibration import as_batch
from pfsurgery.recover.choices import Choices, carry_out, finished, read_choices
from pfsurgery.recover.device import choose_by_latency, site_times
from pfsurgery.recover.drop import cheapest_within
from pfsurgery.recover.fit import Form
from pfsurgery.recover.hull import Pick, Point, spend
from pfsurgery.recover.options import PARAMETER_FREE, Option
from pfsurgery.recover.target import reuse
from pfsurgery.sites import Site

# With thin bottlenecks allowed, the mixed form is hardly ever chosen and takes longest to fit.
_ANY: tuple[Form, ...] = ("columns", "waist", "bottleneck", "thin")

Amount = float | int | str
Unit = Literal["macs", "params", "latency"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What the converted model may cost; made by `budget`.

    Attributes:
        macs: Multiply-adds of one image, absolute or a share of the model's, None if free.
        params: Parameters, absolute or a share, None if free.
        latency: Time of one batch in ms, absolute or a share, None if free.
        batch: Images of that batch.
        max_drop: Points of accuracy that may be lost, None if that is not the limit.
        validate: Gives the accuracy of a model in percent, for `max_drop`.
        forms: Which bottlenecks are considered, see `pfsurgery.structure.Structure`.
        pointwise: 1x1 convolutions take part too.
    """

    macs: Amount | None = None
    params: Amount | None = None
    latency: Amount | None = None
    batch: int = 8
    max_drop: float | None = None
    validate: Callable[[nn.Module], float] | None = None
    forms: tuple[Form, ...] = _ANY
    pointwise: bool = False

    @property
    def name(self) -> str:
        """What plans call the policy."""
        limits = {
            "macs": self.macs,
            "params": self.params,
            "latency": self.latency,
            "max_drop": self.max_drop,
        }
        told = [f"{key}={value}" for key, value in limits.items() if value is not None]
        told += [] if "thin" in self.forms else ["thin=False"]
        told += ["pointwise=True"] if self.pointwise else []
        return f"budget({', '.join(told)})"

    @property
    def unit(self) -> Unit:
        """What it limits."""
        if self.latency is not None:
            return "latency"
        return "macs" if self.params is None else "params"

    @property
    def amount(self) -> Amount:
        """The limit, absolute or a share; there is none with `max_drop`."""
        return next(v for v in (self.macs, self.params, self.latency) if v is not None)

    def decide(self, site: Site) -> Rule | None:
        """Every site that can be fitted takes part."""
        return Rule("bare" if site.kind == "depthwise" else "mixed")

    def convert(
        self,
        model: nn.Module,
        mark: Callable[[Tensor], Plan],
        images: Any,
        tell: Tell = lambda line: None,
    ) -> tuple[nn.Module, Plan]:
        """A converted copy of `model` and the plan that was carried out.

        Args:
            model: The trained model; left as it is.
            mark: Gives the plan for an image (1, C, H, W): what it replaces may change.
            images: Unlabelled images, as `pfsurgery.recover.recalibrate` takes them.
            tell: Called with a line of text as each site is done.
        """
        choices = read_choices(model, self.checked(model, mark), images, self.forms, tell)
        if self.max_drop is not None and self.validate is not None:
            points = self.points(choices, relative_errors(choices))
            student, done = cheapest_within(choices, points, self.max_drop, self.validate, tell)
        else:
            places, times = self.choose(choices, tell)
            student, done = carry_out(choices, places, tell)
            if times is not None:
                done = {name: _with_time(d, times[name], places[name]) for name, d in done.items()}
        kept = "the budget is better spent on keeping it"
        return finished(model, student, self.name, choices.plan, done, kept)

    def choose(
        self,
        choices: Choices,
        tell: Tell,
        damages: Mapping[str, Sequence[float]] | None = None,
        pick: Pick = spend,
        times: Mapping[str, Sequence[float]] | None = None,
    ) -> tuple[dict[str, int], Mapping[str, Sequence[float]] | None]:
        """Index of each site's option within the budget.

        Args:
            choices: What there is to choose from.
            tell: Called with a line of text for each network that was timed.
            damages: What each option of each site does to the output; by default its relative
                error.
            pick: Chooses one option a site, given (cost, damage) of all and what may be spent.
            times: The ms of each option of each site, for a budget of time, if they are known.

        Returns:
            The indices, and with a budget of time the ms of all options.

        Raises:
            PolicyError: The budget cannot be met; the message says what the least is.
        """
        damage = relative_errors(choices) if damages is None else damages
        if self.unit == "latency":
            allowed = partial(absolute, self.amount)
            images = as_batch(choices.batches[0][:1], self.batch)
            known = site_times(choices, self.batch) if times is None else times
            return choose_by_latency(choices, images, allowed, damage, known, pick, tell), known
        left = self._allowed(choices.teacher, choices.batches[0][:1], choices.sites)
        return pick(self.points(choices, damage), left), None

    def checked(self, model: nn.Module, mark: Callable[[Tensor], Plan]) -> Callable[[Tensor], Plan]:
        """`mark`, which also raises a PolicyError where what cannot change costs too much already.

        So a budget that no form of any site can meet is refused before forms are fitted.
        """

        def marked(image: Tensor) -> Plan:
            found = mark(image)
            if found.replaced and self.max_drop is None and self.unit != "latency":
                self._allowed(model, image, [decision.site for decision in found.replaced])
            return found

        return marked

    def points(
        self, choices: Choices, damage: Mapping[str, Sequence[float]]
    ) -> dict[str, list[Point]]:
        """Cost and damage of each option of each site; a budget of time costs multiply-adds."""
        return {
            site.name: [
                (self.cost(site, option), harm)
                for option, harm in zip(choices.options[site.name], damage[site.name], strict=True)
            ]
            for site in choices.sites
        }

    def cost(self, site: Site, option: Option | None) -> float:
        """What a site costs: multiply-adds of one image, or parameters."""
        geometry = site.geometry
        positions = site.positions / site.images
        if self.unit != "params":
            return (geometry.macs_per_position if option is None else option.macs) * positions
        if option is None:
            return geometry.parameters
        if option.form == "op":
            return geometry.parameters - decide(site, Rule(option.op)).parameters_saved
        if option.form == "bare":
            return 0.0
        width = option.sizes[0] if option.form in ("bottleneck", "thin", "mixed") else 0
        repeated = geometry.in_channels * width * (reuse(site) - 1)
        return option.macs - repeated + geometry.out_channels

    def _allowed(self, model: nn.Module, image: Tensor, sites: Sequence[Site]) -> float:
        """What the sites together may cost: the budget less what the rest of the model costs."""
        from pfsurgery.measure import count

        whole = count(model, image)
        total = whole.parameters if self.unit == "params" else whole.macs
        least = total - sum(self.cost(site, None) for site in sites)
        asked = absolute(self.amount, total)
        if asked > total:
            raise PolicyError(
                f"{self.name} asks for {asked:.4g}, but the model has no more than {total:.4g}. "
                f"Ask for less."
            )
        if asked < least:
            raise PolicyError(
                f"{self.name} asks for {asked:.4g} of {total:.4g}, but what is not converted "
                f"costs {least:.4g} already. Ask for more, or convert more sites. A share is "
                f'written as "60%".'
            )
        return asked - least


def budget(
    macs: Amount | None = None,
    params: Amount | None = None,
    latency: Amount | None = None,
    *,
    max_drop: float | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    batch: int = 8,
    thin: bool = True,
    pointwise: bool = False,
) -> Budget:
    """A policy that spends multiply-adds, parameters or time where they remove most error.

    Each convolution that mixes channels may become a bottleneck fitted in closed form to unlabelled
    images: parameter-free columns between pointwise convolutions, or a thin dense convolution. A
    depthwise one may become one operation a channel, with the pointwise layer behind it refitted.
    Or it is kept. Pass the policy to `convert` together with `images`.

    Args:
        macs: What one image may cost, in multiply-adds: a number, or a share such as `"25%"` of
            the whole model's.
        params: The same for parameters.
        latency: The same for the time of a batch, in ms, as measured on the model's device with
            both models as `pfsurgery.optimize` leaves them.
        max_drop: Points of accuracy that may be lost: the cheapest conversion within it is looked
            for, in a few trials, each of which is fitted and validated. Give one of these limits.
        validate: A function from a model to its accuracy in percent, for `max_drop`.
        batch: Images of a timed batch.
        thin: Consider the thin dense form, which is not parameter-free.
        pointwise: Treat 1x1 convolutions in the same way, with the channel itself as the only
            operation: fewer of its channels, or a product of low rank.

    Raises:
        PolicyError: Not exactly one limit is given, or it is malformed.
    """
    given = [limit for limit in (macs, params, latency, max_drop) if limit is not None]
    if len(given) != 1:
        raise PolicyError(
            'A budget has one limit: budget(macs="25%"), budget(params="40%"), '
            'budget(latency="60%") or budget(max_drop=1.0, validate=...).'
        )
    if (max_drop is None) != (validate is None):
        raise PolicyError("max_drop and validate go together: a drop is known by validating.")
    if isinstance(max_drop, str):
        raise PolicyError(
            f"max_drop is a number of points of accuracy, such as budget(max_drop=1.0), not "
            f"{max_drop!r}."
        )
    if not isinstance(batch, int) or batch < 1:
        raise PolicyError(f"A batch has 1 image or more, not {batch}.")
    absolute(given[0], 1.0)
    forms = _ANY if thin else PARAMETER_FREE
    return Budget(macs, params, latency, batch, max_drop, validate, forms, pointwise)


def relative_errors(choices: Choices) -> dict[str, list[float]]:
    """The relative error of each option of each site, as it was read."""
    return {
        name: [0.0 if option is None else option.error for option in options]
        for name, options in choices.options.items()
    }


def absolute(amount: Amount | None, whole: float) -> float:
    """The number that is meant: itself, or a share such as "25%" of `whole`; else a PolicyError."""
    text = str(amount).strip()
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    try:
        value = float(share[1]) / 100 * whole if share else float(text)
    except ValueError:
        raise PolicyError(
            f'A budget is a number or a share such as "25%", not {amount!r}.'
        ) from None
    if not value > 0:
        raise PolicyError(f"A budget is above 0, not {amount!r}.")
    return value


def _with_time(decision: Decision, costs: Sequence[float], place: int) -> Decision:
    """The decision with what the site takes alone beside what its convolution took, in ms."""
    told = f"{decision.reason}, about {costs[place]:.3f} of {costs[0]:.3f} ms"
    return replace(decision, reason=told)
