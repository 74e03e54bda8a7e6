"""What the sites of a trained model may become, read from images once, and how it is done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pfsurgery.plan import Decision, Plan
from pfsurgery.policy import KEEP, Tell
from pfsurgery.recover.calibration import (
    calibration_batches,
    dressed,
    frozen_copy,
    hold_out,
    in_fast_layout,
)
from pfsurgery.recover.channels import channel_fits
from pfsurgery.recover.columns import Operation
from pfsurgery.recover.fit import Form
from pfsurgery.recover.gram import Moments
from pfsurgery.recover.groups import in_memory
from pfsurgery.recover.options import Option, site_moments, site_options
from pfsurgery.recover.polish import polish
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.readout import site_readout
from pfsurgery.recover.screen import MOST_COLUMNS, Screen, is_wide, lifted_kernel, screens
from pfsurgery.recover.sequence import refit_in_order
from pfsurgery.recover.site_fit import site_kernel
from pfsurgery.recover.target import POSITIONS, input_moments, reuse, site_operations
from pfsurgery.sites import Site

_LARGEST_OPTION = 0.85  # of the convolution's cost; a form that saves less is not worth having
_POSITIONS = POSITIONS // 2  # looked at to choose forms; the fits look at all
_MEMORY = 1 << 31  # bytes of Gram matrices that are held at once, about

Options = Mapping[str, Sequence[Option | None]]
Places = dict[str, int]  # index of each site's option


@dataclass(frozen=True, slots=True)
class Choices:
    """A trained model, images, and what each site may become.

    Attributes:
        teacher: A frozen copy of the model, in eval mode.
        plan: All its sites; those that take part are the replaced ones.
        sites: The sites that take part, in the order of execution.
        options: The forms that each may take; the first, None, keeps its convolution.
        batches: Images (N, C, H, W) to fit to, one batch each.
        judges: Images to judge by.
        screens: Directions that stand for the channels of very wide sites.
    """

    teacher: nn.Module
    plan: Plan
    sites: tuple[Site, ...]
    options: Options
    batches: Sequence[Tensor]
    judges: Sequence[Tensor]
    screens: Mapping[str, Screen]


def read_choices(
    model: nn.Module,
    mark: Callable[[Tensor], Plan],
    images: Any,
    forms: Collection[Form],
    tell: Tell = lambda line: None,
) -> Choices:
    """Fits every form of every site roughly, to know its cost and its error.

    Args:
        model: The trained model; left as it is.
        mark: Gives the plan for an image (1, C, H, W): what it replaces takes part.
        images: Unlabelled images, as `pfsurgery.recover.recalibrate` takes them.
        forms: Which bottlenecks are considered, see `pfsurgery.structure.Structure`.
        tell: Called with a line of text as each site is done.

    Raises:
        DataError: There is no image, or a value is not finite.
    """
    batches, judges = hold_out(calibration_batches(images, model))
    plan = mark(batches[0][:1])
    teacher = frozen_copy(model)
    batches = in_fast_layout(teacher, batches)
    sites = tuple(d.site for d in plan.replaced)
    looked = _screens(teacher, sites, batches)
    options = _all_options(teacher, sites, looked, batches, forms, tell)
    return Choices(teacher, plan, sites, options, batches, judges, looked)


def carry_out(
    choices: Choices, places: Places, tell: Tell = lambda line: None
) -> tuple[nn.Module, dict[str, Decision]]:
    """The model with one option a site, each solved with inputs from what was edited before it.

    Args:
        choices: The model and its options.
        places: Index of each site's option.
        tell: Called with a line of text for each site.

    Returns:
        The edited network, in eval mode, and what was done at each site that changed.
    """
    student = copy.deepcopy(choices.teacher)
    done = edit(choices, student, choices.sites, places, tell)
    if done:
        polish(student, choices.teacher, choices.batches, choices.judges, tell)
    return student, done


def edit(
    choices: Choices,
    student: nn.Module,
    sites: Sequence[Site],
    places: Places,
    tell: Tell = lambda line: None,
) -> dict[str, Decision]:
    """Give sites their options, in place, and return what was done at each that changed.

    Args:
        choices: The model and its options.
        student: A copy of the original, edited before these sites.
        sites: The sites, in the order of execution.
        places: Index of each site's option.
        tell: Called with a line of text for each site.
    """
    chosen = {site.name: choices.options[site.name][places[site.name]] for site in sites}
    return refit_in_order(
        choices.teacher, student, sites, chosen, choices.batches, tell, choices.screens
    )


def halved(choices: Choices) -> Choices:
    """The same with half of the images to fit to and the others to judge by, if there are enough.

    A fit knows the images that it was made from: how far a network is from the original there says
    little of how far it is elsewhere.
    """
    batches, judges = hold_out(choices.batches, every=2)
    if batches[0] is judges[0]:  # too few
        return choices
    batches = in_fast_layout(choices.teacher, batches)
    return replace(choices, batches=batches, judges=[*judges, *choices.judges])


def finished(
    model: nn.Module,
    student: nn.Module,
    name: str,
    plan: Plan,
    done: Mapping[str, Decision],
    kept: str,
) -> tuple[nn.Module, Plan]:
    """The edited network dressed as `model`, and the plan that was carried out.

    Args:
        model: The model that was converted.
        student: The edited network.
        name: What the plan calls its policy.
        plan: All sites of the model; those that took part are the replaced ones.
        done: What was done at each site that changed.
        kept: Why the other sites that took part were kept.
    """

    def decided(decision: Decision) -> Decision:
        if decision.replaced:
            return done.get(decision.site.name, Decision(decision.site, KEEP, reason=kept))
        return decision

    return dressed(student, model), Plan(name, tuple(decided(d) for d in plan))


def _all_options(
    teacher: nn.Module,
    sites: Sequence[Site],
    looked: Mapping[str, Screen],
    batches: Sequence[Tensor],
    forms: Collection[Form],
    tell: Tell,
) -> dict[str, list[Option | None]]:
    tell(f"reading what {len(sites)} convolutions see")
    options: dict[str, list[Option | None]] = {site.name: [None] for site in sites}
    depthwise = [site for site in sites if site.kind == "depthwise"]
    if depthwise:
        for name, fit in channel_fits(teacher, depthwise, batches).items():
            options[name].append(Option("bare", (len(fit.ops),), 0.0, fit.error))
    mixing = [site for site in sites if site.kind != "depthwise"]
    for group in in_memory(mixing, _gram_bytes, _MEMORY):
        ops = [site_operations(site) for site in group]
        moments = input_moments(teacher, group, batches, ops, _POSITIONS, looked)
        for site, o in zip(tracked(group, "finding forms, then to be fitted"), ops, strict=True):
            screen = looked.get(site.name)
            found = _fitted_options(teacher, site, moments.pop(0), o, forms, screen)
            options[site.name] += found
            tell(f"{site.name}: {len(found)} forms")
    return options


def _screens(
    teacher: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor]
) -> dict[str, Screen]:
    ops = {site.name: site_operations(site) for site in sites}
    wide = [site for site in sites if site.kind != "depthwise" and is_wide(site, ops[site.name])]
    kernels = [site_kernel(teacher, site, ops[site.name]) for site in wide]
    return screens(teacher, wide, [ops[site.name] for site in wide], kernels, batches)


def _fitted_options(
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
        columns.with_linear_target(kernel).with_prior(kernel),
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
