"""The policy `budget`: fitted bottlenecks where they remove most error for what may be spent."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import PolicyError
from pfsurgery.plan import Decision, Plan
from pfsurgery.policy import KEEP, Rule, Tell
from pfsurgery.recover.calibration import (
    calibration_batches,
    dressed,
    frozen_copy,
    hold_out,
    in_fast_layout,
)
from pfsurgery.recover.columns import Operation
from pfsurgery.recover.device import choose_by_latency
from pfsurgery.recover.fit import Form
from pfsurgery.recover.gram import Moments
from pfsurgery.recover.groups import in_memory
from pfsurgery.recover.hull import spend
from pfsurgery.recover.options import Option, site_moments, site_options
from pfsurgery.recover.polish import polish
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.screen import MOST_COLUMNS, Screen, is_wide, lifted_kernel, screens
from pfsurgery.recover.sequence import (
    POSITIONS,
    channel_fits,
    refit_in_order,
    reuse,
    site_kernel,
    site_readout,
)
from pfsurgery.recover.target import input_moments, site_operations
from pfsurgery.sites import Site

_LARGEST_OPTION = 0.85  # of the convolution's cost; a form that saves less is not worth having
_POSITIONS = POSITIONS // 2  # looked at to choose forms; the fits look at all
_MEMORY = 1 << 31  # bytes of Gram matrices that are held at once, about
_PARAMETER_FREE: tuple[Form, ...] = ("columns", "waist", "bottleneck", "mixed")
# With thin bottlenecks allowed, the mixed form is hardly ever chosen and takes longest to fit.
_ANY: tuple[Form, ...] = ("columns", "waist", "bottleneck", "thin")

Amount = float | int | str


@dataclass(frozen=True, slots=True)
class Budget:
    """What the converted model may cost; made by `budget`.

    Attributes:
        macs: Multiply-adds of one image, absolute or a share of the model's, None if free.
        params: Parameters, absolute or a share, None if free.
        latency: Time of one batch in ms, absolute or a share, None if free.
        batch: Images of that batch.
        forms: Which bottlenecks are considered, see `pfsurgery.structure.Structure`.
        pointwise: 1x1 convolutions take part too.
    """

    macs: Amount | None = None
    params: Amount | None = None
    latency: Amount | None = None
    batch: int = 8
    forms: tuple[Form, ...] = _ANY
    pointwise: bool = False

    @property
    def name(self) -> str:
        """What plans call the policy."""
        limits = {"macs": self.macs, "params": self.params, "latency": self.latency}
        limit = ", ".join(f"{key}={value}" for key, value in limits.items() if value is not None)
        return f"budget({limit}{'' if 'thin' in self.forms else ', thin=False'})"

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
        batches, judges = hold_out(calibration_batches(images, model))
        plan = mark(batches[0][:1])
        teacher = frozen_copy(model)
        batches = in_fast_layout(teacher, batches)
        sites = [d.site for d in plan if d.replaced]
        looked = _screens(teacher, sites, batches)
        choices = self._choices(teacher, sites, looked, batches, tell)
        if self.latency is None:
            places, costs = self._spend(teacher, sites, choices, batches[0][:1]), None
        else:
            images = batches[0][:1].expand(self.batch, -1, -1, -1)
            images = images.contiguous(memory_format=torch.channels_last)
            places, costs = choose_by_latency(
                teacher, sites, choices, images, partial(_absolute, self.latency), tell
            )
        chosen = {name: choices[name][place] for name, place in places.items()}
        student, done = refit_in_order(teacher, sites, chosen, batches, tell, looked)
        polish(student, teacher, batches, judges, tell)
        if costs is not None:
            done = {name: _with_time(d, costs[name], places[name]) for name, d in done.items()}
        final = Plan(self.name, tuple(_decided(d, chosen, done) for d in plan))
        return dressed(student, model), final

    def _choices(
        self,
        teacher: nn.Module,
        sites: Sequence[Site],
        looked: Mapping[str, Screen],
        batches: Sequence[Tensor],
        tell: Tell,
    ) -> dict[str, list[Option | None]]:
        """The forms that each site may take; the first, None, keeps its convolution."""
        tell(f"reading what {len(sites)} convolutions see")
        choices: dict[str, list[Option | None]] = {site.name: [None] for site in sites}
        depthwise = [site for site in sites if site.kind == "depthwise"]
        if depthwise:
            for name, fit in channel_fits(teacher, depthwise, batches).items():
                choices[name].append(Option("bare", (len(fit.ops),), 0.0, fit.error))
        mixing = [site for site in sites if site.kind != "depthwise"]
        for group in in_memory(mixing, _gram_bytes, _MEMORY):
            ops = [site_operations(site) for site in group]
            moments = input_moments(teacher, group, batches, ops, _POSITIONS, looked)
            for site, o in zip(tracked(group, "finding forms"), ops, strict=True):
                screen = looked.get(site.name)
                found = _options(teacher, site, moments.pop(0), o, self.forms, screen)
                choices[site.name] += found
                tell(f"{site.name}: {len(found)} forms")
        return choices

    def _spend(
        self,
        teacher: nn.Module,
        sites: Sequence[Site],
        choices: Mapping[str, Sequence[Option | None]],
        image: Tensor,
    ) -> dict[str, int]:
        """Index of each site's option within a budget of multiply-adds or parameters."""
        points = {
            site.name: [
                (self._cost(site, option), 0.0 if option is None else option.error)
                for option in choices[site.name]
            ]
            for site in sites
        }
        return spend(points, self._allowed(teacher, sites, image))

    def _cost(self, site: Site, option: Option | None) -> float:
        """What a site costs: multiply-adds of one image, or parameters."""
        geometry = site.geometry
        positions = site.positions / site.input_shape[0]
        if self.macs is not None:
            return (geometry.macs_per_position if option is None else option.macs) * positions
        if option is None:
            return geometry.parameters
        if option.form == "bare":
            return 0.0
        width = option.sizes[0] if option.form in ("bottleneck", "thin", "mixed") else 0
        repeated = geometry.in_channels * width * (reuse(site) - 1)
        return option.macs - repeated + geometry.out_channels

    def _allowed(self, teacher: nn.Module, sites: Sequence[Site], image: Tensor) -> float:
        """What the sites together may cost: the budget less what the rest of the model costs."""
        from pfsurgery.measure import count

        whole = count(teacher, image)
        total = whole.macs if self.macs is not None else whole.parameters
        amount = self.macs if self.macs is not None else self.params
        rest = total - sum(self._cost(site, None) for site in sites)
        asked = _absolute(amount, total)
        least = rest
        if asked < least:
            raise PolicyError(
                f"{self.name} asks for {asked:.4g} of {total:.4g}, but what is not converted "
                f"costs {least:.4g} already. Ask for more, or convert more sites."
            )
        return asked - rest


def budget(
    macs: Amount | None = None,
    params: Amount | None = None,
    latency: Amount | None = None,
    *,
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
            both models as `pfsurgery.optimize` leaves them. Give one of the three limits.
        batch: Images of a timed batch.
        thin: Consider the thin dense form, which is not parameter-free.
        pointwise: Treat 1x1 convolutions in the same way, with the channel itself as the only
            operation: fewer of its channels, or a product of low rank.

    Raises:
        PolicyError: Not exactly one limit is given, or it is malformed.
    """
    given = [limit for limit in (macs, params, latency) if limit is not None]
    if len(given) != 1:
        raise PolicyError(
            'A budget has one limit: budget(macs="25%"), budget(params="40%") or '
            'budget(latency="60%").'
        )
    if batch < 1:
        raise PolicyError(f"A batch has 1 image or more, not {batch}.")
    _absolute(given[0], 1.0)
    forms = _ANY if thin else _PARAMETER_FREE
    return Budget(macs, params, latency, batch, forms, pointwise)


def _absolute(amount: Amount | None, whole: float) -> float:
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


def _screens(
    teacher: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor]
) -> dict[str, Screen]:
    ops = {site.name: site_operations(site) for site in sites}
    wide = [site for site in sites if site.kind != "depthwise" and is_wide(site, ops[site.name])]
    kernels = [site_kernel(teacher, site, ops[site.name]) for site in wide]
    return screens(teacher, wide, [ops[site.name] for site in wide], kernels, batches)


def _options(
    teacher: nn.Module,
    site: Site,
    columns: Moments,
    ops: Sequence[Operation],
    forms: Collection[Form],
    screen: Screen | None,
) -> list[Option]:
    if site.kind == "pointwise":
        forms = [form for form in forms if form in ("columns", "waist")]
    if screen is not None:
        forms = [form for form in forms if form in ("bottleneck", "thin")]
    kernel = lifted_kernel(site_kernel(teacher, site, ops), screen)
    prepared = site_moments(
        columns.with_linear_target(kernel),
        site_readout(teacher, site).weights,
        ops,
        reuse=reuse(site),
    )
    found = site_options(prepared, _LARGEST_OPTION * site.geometry.macs_per_position, forms)
    return found if screen is None else _unscreened_options(site, found, screen)


def _unscreened_options(site: Site, options: Sequence[Option], screen: Screen) -> list[Option]:
    """The options with the cost of reducing all channels and the error of what was not seen."""
    unseen = site.geometry.in_channels - len(screen.project)
    dearer = [
        replace(
            option,
            macs=option.macs + option.sizes[0] * unseen * reuse(site),
            error=screen.missing + (1 - screen.missing) * option.error,
        )
        for option in options
    ]
    most = _LARGEST_OPTION * site.geometry.macs_per_position
    return [option for option in dearer if option.macs < most]


def _gram_bytes(site: Site) -> int:
    """Memory of a site's Gram matrix while it is summed, and as a result."""
    columns = min(len(site_operations(site)) * site.geometry.in_channels, MOST_COLUMNS)
    return 2 * 8 * columns**2


def _with_time(decision: Decision, costs: Sequence[float], place: int) -> Decision:
    """The decision with what the site takes alone beside what its convolution took, in ms."""
    told = f"{decision.reason}, about {costs[place]:.3f} of {costs[0]:.3f} ms"
    return replace(decision, reason=told)


def _decided(
    decision: Decision, chosen: dict[str, Option | None], done: dict[str, Decision]
) -> Decision:
    name = decision.site.name
    if name in chosen and chosen[name] is None:
        return Decision(decision.site, KEEP, reason="the budget is better spent on keeping it")
    return done.get(name, decision)
