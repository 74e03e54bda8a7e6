"""Fit a form with weights of its own to a site, and put it into the edited network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.modules import get_module, set_at
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.plan import Decision
from pfsurgery.recover.aim import Aim
from pfsurgery.recover.build import op_of, set_weights, structure_of
from pfsurgery.recover.columns import Operation, kernel_columns
from pfsurgery.recover.front import Front
from pfsurgery.recover.gram import Moments
from pfsurgery.recover.options import SiteMoments, fit_option, site_moments
from pfsurgery.recover.reads import Read, Reads, let_through, refit_moments
from pfsurgery.recover.screen import Screen, lifted_kernel, unscreened
from pfsurgery.recover.target import reuse, site_operations
from pfsurgery.rewrite import apply_plan
from pfsurgery.sites import Site

_ROUNDS = 4  # of alternation
_VISIBLE_ROUNDS = 2  # towards what a ReLU lets through
_MEMORY = 1 << 29  # bytes of what a site reads that are held for these, about


def site_kernel(teacher: nn.Module, site: Site, ops: Sequence[Operation]) -> Tensor:
    """The site's kernel as weights of its columns (ops * C, C_out), zero between groups.

    Raises:
        RecordMismatchError: No convolution stands there.
    """
    conv = teacher.get_submodule(site.name)
    if not isinstance(conv, nn.Conv2d):
        raise RecordMismatchError(
            f"{site.name} is no convolution; was the model converted already?"
        )
    weight = conv.weight.detach().cpu()
    if conv.groups > 1:
        full = weight.new_zeros(conv.out_channels, conv.in_channels, *weight.shape[2:])
        outs, ins = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        for g in range(conv.groups):
            mine = slice(g * outs, (g + 1) * outs)
            full[mine, g * ins : (g + 1) * ins] = weight[mine]
        weight = full
    return kernel_columns(weight, ops)


def site_problem(
    teacher: nn.Module, aim: Aim, moments: Moments, screen: Screen | None
) -> SiteMoments:
    """What any form of the site is fitted to.

    Args:
        teacher: The original.
        aim: The site, and how its output counts.
        moments: What the site reads and should give.
        screen: Directions that stand for the channels of a very wide site.
    """
    site, ops = aim.site, site_operations(aim.site)
    kernel = lifted_kernel(site_kernel(teacher, site, ops), screen)
    return site_moments(moments.with_prior(kernel), aim.how.weights, ops, reuse=reuse(site))


def fit_at(
    teacher: nn.Module, front: Front, aim: Aim, goals: Sequence[Tensor], screen: Screen | None
) -> Decision:
    """Put a fitted form into the edited network, and return what was done.

    Where a ReLU alone reads the site, fits to what this lets through follow (see `visible`).

    Args:
        teacher: The original, in eval mode.
        front: The images, and the edited network, whose site still is its convolution; changed in
            place.
        aim: The site and what it becomes.
        goals: The original's rows of it.
        screen: Directions that stand for the channels of a very wide site.
    """
    student, names, batches = front.network, aim.site.names, front.batches
    convolution, rectified = get_module(student, names[0]), aim.how.rectified
    anew = Reads(front, aim, goals)
    reads: Iterable[Read] = list(anew) if rectified and anew.bytes <= _MEMORY else anew
    moments = refit_moments(reads, aim, batches, screen)
    problem = site_problem(teacher, aim, moments, screen)
    variance = problem.problem.total
    decision = place_fit(student, aim, problem, screen)
    for _ in range(_VISIBLE_ROUNDS if rectified else 0):
        del problem
        fitted = get_module(student, names[0])
        set_at(student, names, convolution)
        visible_reads = let_through(reads, fitted, aim, batches)
        moments = refit_moments(visible_reads, aim, batches, screen, moments)
        problem = site_problem(teacher, aim, moments, screen)
        decision = place_fit(student, aim, problem, screen, variance)
    return decision


def place_fit(
    student: nn.Module,
    aim: Aim,
    problem: SiteMoments,
    screen: Screen | None = None,
    variance: float | None = None,
) -> Decision:
    """Fit the site's form to `problem` and put it into the edited network.

    Args:
        student: The edited network, whose site still is its convolution; changed in place.
        aim: The site and what it becomes.
        problem: What it is fitted to.
        screen: Directions that stand for the channels of a very wide site.
        variance: What the told error is a share of, by default the variance of the targets.
    """
    site = aim.site
    fit = unscreened(fit_option(problem, aim.option, rounds=_ROUNDS), screen)
    if variance is not None and variance > 0:
        fit = replace(fit, error=fit.error * problem.problem.total / variance)
    structure = structure_of(fit, problem.ops)
    decision = Decision(
        site, op_of(structure), reason=f"relative error {fit.error:.3f}", structure=structure
    )
    apply_plan(student, [decision])
    module = student.get_submodule(site.name)
    if isinstance(module, Bottleneck):
        set_weights(module, fit, problem.ops, site.geometry)
    return decision
