"""The policy `budget`: fitted bottlenecks where they remove most error for what may be spent."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pfsurgery.errors import PolicyError, RecordMismatchError
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.plan import Decision, Plan
from pfsurgery.policy import KEEP, Rule, Tell
from pfsurgery.recover.build import set_weights, structure_of
from pfsurgery.recover.calibration import calibration_batches, frozen_copy, hold_out
from pfsurgery.recover.columns import Operation, kernel_columns
from pfsurgery.recover.fit import Fit, Form
from pfsurgery.recover.gram import Moments
from pfsurgery.recover.hull import spend
from pfsurgery.recover.options import Option, fit_option, site_moments, site_options
from pfsurgery.recover.polish import polish
from pfsurgery.recover.target import (
    Readout,
    input_moments,
    readout_of,
    refit_moments,
    site_operations,
)
from pfsurgery.rewrite import apply_plan
from pfsurgery.sites import Site

_POSITIONS = 65536
_LARGEST_OPTION = 0.85  # of the convolution's cost; a form that saves less is not worth having
_ROUNDS = 4
_PRIOR = 0.02  # how much the original kernel counts where the images say little
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
        forms: Which bottlenecks are considered, see `pfsurgery.structure.Structure`.
    """

    macs: Amount | None = None
    params: Amount | None = None
    forms: tuple[Form, ...] = _ANY

    @property
    def name(self) -> str:
        """What plans call the policy."""
        limit = f"macs={self.macs}" if self.macs is not None else f"params={self.params}"
        return f"budget({limit}{'' if 'thin' in self.forms else ', thin=False'})"

    def decide(self, site: Site) -> Rule | None:
        """Every site that can be fitted takes part."""
        return Rule("mixed")

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
            mark: Gives the sites for an image (1, C, H, W): those marked `mixed` may change.
            images: Unlabelled images, as `pfsurgery.recover.recalibrate` takes them.
            tell: Called with a line of text as each site is done.
        """
        batches, judges = hold_out(calibration_batches(images, model))
        plan = mark(batches[0][:1])
        teacher = frozen_copy(model)
        sites = [d.site for d in plan if d.replaced]
        chosen = self._choose(teacher, sites, batches, tell)
        student, fits = _refit(teacher, sites, chosen, batches, tell)
        polish(student, teacher, batches, judges, tell)
        final = Plan(self.name, tuple(_decided(d, chosen, fits) for d in plan))
        return _dressed(student, model), final

    def _choose(
        self, teacher: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor], tell: Tell
    ) -> dict[str, Option | None]:
        """The form of each site, None where its convolution is kept."""
        tell(f"reading what {len(sites)} convolutions see")
        ops = [site_operations(site) for site in sites]
        moments = input_moments(teacher, sites, batches, ops, _POSITIONS)
        choices: dict[str, list[Option | None]] = {}
        points: dict[str, list[tuple[float, float]]] = {}
        for site, columns, o in zip(sites, moments, ops, strict=True):
            found = _options(teacher, site, columns, o, self.forms)
            choices[site.name] = [None, *found]
            points[site.name] = [(self._cost(site, option), 0.0) for option in [None]]
            points[site.name] += [(self._cost(site, o), o.error) for o in found]
            tell(f"{site.name}: {len(found)} forms")
        allowed = self._allowed(teacher, sites, batches[0][:1])
        places = spend(points, allowed)
        return {name: choices[name][place] for name, place in places.items()}

    def _cost(self, site: Site, option: Option | None) -> float:
        """What a site costs: multiply-adds of one image, or parameters."""
        geometry = site.geometry
        positions = site.positions / site.input_shape[0]
        if option is None:
            return (
                geometry.macs_per_position * positions
                if self.macs is not None
                else (geometry.parameters)
            )
        if self.macs is not None:
            return option.macs * positions
        reuse = geometry.stride[0] * geometry.stride[1]
        width = option.sizes[0] if option.form in ("bottleneck", "thin", "mixed") else 0
        return option.macs - geometry.in_channels * width * (reuse - 1) + geometry.out_channels

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
    macs: Amount | None = None, params: Amount | None = None, *, thin: bool = True
) -> Budget:
    """A policy that spends multiply-adds or parameters where they remove most error.

    Each dense convolution may become a bottleneck fitted in closed form to unlabelled images:
    parameter-free columns between pointwise convolutions, or a thin dense convolution; or it is
    kept. Pass the policy to `convert` together with `images`.

    Args:
        macs: What one image may cost, in multiply-adds: a number, or a share such as `"25%"` of
            the whole model's.
        params: The same for parameters; give one of the two.
        thin: Consider the thin dense form, which is not parameter-free.

    Raises:
        PolicyError: Neither or both limits are given, or one is malformed.
    """
    if (macs is None) == (params is None):
        raise PolicyError('A budget has one limit: budget(macs="25%") or budget(params="40%").')
    _absolute(macs if macs is not None else params, 1.0)
    return Budget(macs, params, _ANY if thin else _PARAMETER_FREE)


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


def _options(
    teacher: nn.Module,
    site: Site,
    columns: Moments,
    ops: Sequence[Operation],
    forms: Iterable[Form],
) -> list[Option]:
    moments = columns.with_linear_target(_kernel(teacher, site, ops))
    prepared = site_moments(moments, _readout(teacher, site).weights, ops, reuse=_reuse(site))
    return site_options(prepared, _LARGEST_OPTION * site.geometry.macs_per_position, tuple(forms))


def _kernel(teacher: nn.Module, site: Site, ops: Sequence[Operation]) -> Tensor:
    conv = teacher.get_submodule(site.name)
    if not isinstance(conv, nn.Conv2d):
        raise RecordMismatchError(
            f"{site.name} is no convolution; was the model converted already?"
        )
    return kernel_columns(conv.weight.detach().cpu(), ops)


def _readout(teacher: nn.Module, site: Site) -> Readout:
    return readout_of(teacher, site.neighbours, site.geometry.out_channels)


def _reuse(site: Site) -> float:
    return float(site.geometry.stride[0] * site.geometry.stride[1])


def _refit(
    teacher: nn.Module,
    sites: Sequence[Site],
    chosen: dict[str, Option | None],
    batches: Sequence[Tensor],
    tell: Tell,
) -> tuple[nn.Module, dict[str, Fit]]:
    """Solve each site again, in order, with inputs from the network edited so far."""
    student = copy.deepcopy(teacher)
    fits: dict[str, Fit] = {}
    for site in sites:
        option = chosen[site.name]
        if option is None:
            continue
        ops = site_operations(site)
        how: Readout = _readout(teacher, site)
        seen = refit_moments(teacher, student, site, batches, ops, how, _POSITIONS)
        moments = seen.with_prior(_kernel(teacher, site, ops), _PRIOR)
        fit = fit_option(
            site_moments(moments, how.weights, ops, reuse=_reuse(site)), option, rounds=_ROUNDS
        )
        decision = Decision(site, _op_name(option), structure=structure_of(fit, ops))
        apply_plan(student, [decision])
        module = student.get_submodule(site.name)
        if isinstance(module, Bottleneck):
            set_weights(module, fit, ops, site.geometry)
        fits[site.name] = fit
        tell(f"{site.name}: {decision.label}, error {option.error:.3f} -> {fit.error:.3f}")
    return student, fits


def _op_name(option: Option) -> str:
    return "thin" if option.form in ("thin", "low_rank") else "mixed"


def _decided(
    decision: Decision, chosen: dict[str, Option | None], fits: dict[str, Fit]
) -> Decision:
    name = decision.site.name
    if name not in chosen:
        return decision
    option = chosen[name]
    if option is None:
        return Decision(decision.site, KEEP, reason="the budget is better spent on keeping it")
    fit = fits[name]
    structure = structure_of(fit, site_operations(decision.site))
    reason = f"relative error {fit.error:.3f}"
    return replace(
        decision, op=_op_name(option), pointwise=False, structure=structure, reason=reason
    )


def _dressed(student: nn.Module, model: nn.Module) -> nn.Module:
    """The student with the train flags and gradient flags of the model."""
    flags = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, module in student.named_modules():
        module.training = flags.get(name, model.training)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    return student
