"""Solve the chosen form of each site in the order of execution, and put it into the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from pfsurgery.batches import give_freed_memory_back
from pfsurgery.graph import GraphView, view
from pfsurgery.plan import Decision, decide
from pfsurgery.policy import Rule, Tell
from pfsurgery.recover.aim import Aim, aim_at, goals_of, pointwise_behind
from pfsurgery.recover.behind import aim_behind, refit_behind
from pfsurgery.recover.build import bare_structure
from pfsurgery.recover.channels import channel_refit, fold_into_norm
from pfsurgery.recover.columns import centre_of
from pfsurgery.recover.fit_columns import fit_bare
from pfsurgery.recover.front import Front
from pfsurgery.recover.norms import reestimate
from pfsurgery.recover.options import Option
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.reads import Reads, refit_moments
from pfsurgery.recover.refit import layer_aim, original_rows, refit_layer
from pfsurgery.recover.screen import Screen
from pfsurgery.recover.site_fit import fit_at
from pfsurgery.recover.target import site_operations
from pfsurgery.rewrite import apply_plan
from pfsurgery.sites import Site


def refit_in_order(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[Site],
    chosen: Mapping[str, Option | None],
    batches: Sequence[Tensor],
    tell: Tell,
    screens: Mapping[str, Screen],
) -> dict[str, Decision]:
    """Replace the sites one by one, each solved with inputs from the network edited so far.

    Args:
        teacher: The original, in eval mode; left as it is.
        student: A copy of it, edited before these sites; changed in place.
        sites: The sites, in the order of execution.
        chosen: The form of each, None where the convolution is kept.
        batches: Images (N, C, H, W), one batch each.
        tell: Called with a line of text for each site.
        screens: Directions that stand for the channels of very wide sites.

    Returns:
        For each changed site what it became.
    """
    seen = view(teacher, (batches[0][:1],))
    aims = [
        aim_at(teacher, site, option, seen)
        for site in sites
        if (option := chosen[site.name]) is not None
    ]
    done: dict[str, Decision] = {}
    rows = goals_of(teacher, aims, batches)
    front = Front(student, batches, seen, [aim.site.name for aim in aims])
    for aim, goals in zip(tracked(aims, "fitting"), rows, strict=True):
        name = aim.site.name
        decision = place(teacher, front, aim, goals, seen, screens.get(name))
        done[name] = decision
        tell(f"{name}: {decision.label}, {decision.reason}")
        give_freed_memory_back()
    return done


def place(
    teacher: nn.Module,
    front: Front,
    aim: Aim,
    goals: Sequence[Tensor],
    seen: GraphView,
    screen: Screen | None = None,
) -> Decision:
    """Put what a site becomes into the edited network, fitted there; returns what was done.

    Args:
        teacher: The original, in eval mode.
        front: The images, and the edited network, whose site still is its convolution; changed in
            place.
        aim: The site and what it becomes.
        goals: Its rows from `goals_of`.
        seen: The graph view of the original.
        screen: Directions that stand for the channels of a very wide site.
    """
    if aim.option.form == "op":
        return _place_op(teacher, front, aim, seen)
    if aim.option.form == "bare":
        return _place_bare(teacher, front, aim, goals, seen)
    return fit_at(teacher, front, aim, goals, screen)


def _place_op(teacher: nn.Module, front: Front, aim: Aim, seen: GraphView) -> Decision:
    """An op that is not fitted: its norm is re-estimated, the layer that takes it refitted."""
    student = front.network
    decision = decide(aim.site, Rule(aim.option.op))
    apply_plan(student, [decision])
    norm = aim.site.neighbours.norm
    if norm is not None:
        reestimate(student, list(front.batches), {norm})
    (refit,) = refit_behind(front, teacher, [aim_behind(student, teacher, decision, seen)])
    told = f"relative error {refit.after:.3f} behind {refit.layer}" if refit.layer else refit.reason
    return replace(decision, reason=told)


def _place_bare(
    teacher: nn.Module, front: Front, aim: Aim, goals: Sequence[Tensor], seen: GraphView
) -> Decision:
    """One operation a channel; the pointwise layer behind is refitted on what it then reads."""
    site, layer, student = aim.site, pointwise_behind(aim.site), front.network
    ops = site_operations(site)
    if site.kind == "depthwise":
        found = channel_refit(teacher, front, site)
        if site.neighbours.norm is not None:
            fold_into_norm(student.get_submodule(site.neighbours.norm), found)
        chosen, tail = found.ops, "keep"
    else:
        moments = refit_moments(Reads(front, aim, goals), aim, front.batches)
        chosen, tail = fit_bare(moments, aim.how.weights, len(ops), centre_of(ops)).ops, "drop"
    decision = Decision(site, "bare", tail=tail, structure=bare_structure(chosen, ops))  # type: ignore[arg-type]
    apply_plan(student, [decision])
    goal = layer_aim(student, teacher, site.name, layer, layer, seen)
    (rows,) = original_rows(teacher, [goal], front.batches)
    refit = refit_layer(front, teacher, goal, rows)
    return replace(
        decision,
        structure=bare_structure(chosen, ops, refit.after),
        reason=f"relative error {refit.after:.3f} behind {layer}",
    )
