"""Solve the chosen form of each site in the order of execution, and put it into the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pfsurgery.batches import give_freed_memory_back
from pfsurgery.errors import RecordMismatchError
from pfsurgery.graph import GraphView, view
from pfsurgery.neighbours import neighbours_of_module
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.plan import Decision, decide
from pfsurgery.policy import Rule, Tell
from pfsurgery.recover.behind import aim_behind, refit_behind
from pfsurgery.recover.build import bare_structure, op_of, set_weights, structure_of
from pfsurgery.recover.capture import capture, first_of
from pfsurgery.recover.channels import ChannelFit, ChannelSums, fold_into_norm
from pfsurgery.recover.columns import Operation, kernel_columns
from pfsurgery.recover.fit_columns import fit_bare
from pfsurgery.recover.front import Front
from pfsurgery.recover.gram import sample_positions
from pfsurgery.recover.groups import in_memory
from pfsurgery.recover.norms import reestimate
from pfsurgery.recover.options import Option, SiteMoments, fit_option, site_moments
from pfsurgery.recover.progress import tracked
from pfsurgery.recover.refit import layer_aim, original_rows, refit_layer
from pfsurgery.recover.screen import Screen, lifted_kernel, unscreened
from pfsurgery.recover.target import (
    POSITIONS,
    ROWS_MEMORY,
    Readout,
    goal_rows,
    readout_of,
    refit_moments,
    rows_bytes,
    site_operations,
    site_window,
)
from pfsurgery.rewrite import apply_plan
from pfsurgery.sites import Site

_ROUNDS = 4


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


@dataclass(frozen=True, slots=True)
class Aim:
    """A site, what it becomes, and the layer whose output is then to be as it was."""

    site: Site
    option: Option
    layer: str
    how: Readout

    @property
    def reads_goals(self) -> bool:
        """Whether it is fitted to rows of the original's output, which `goals_of` reads."""
        return self.site.kind != "depthwise" and self.option.form != "op"


def aim_at(teacher: nn.Module, site: Site, option: Option, seen: GraphView) -> Aim:
    """What is to be fitted where `site` becomes `option`; `seen` is the view of the original."""
    if option.form != "bare" or site.kind == "depthwise":
        return Aim(site, option, site.name, site_readout(teacher, site))
    layer = _layer_behind(site)
    around = neighbours_of_module(layer, seen)
    return Aim(site, option, layer, readout_of(teacher, around, _outputs(teacher, layer)))


def goals_of(
    teacher: nn.Module, aims: Sequence[Aim], batches: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """The original's rows for each aim, from as few passes as their memory allows."""
    for group in in_memory(aims, lambda aim: rows_bytes(aim.how), ROWS_MEMORY):
        read = [aim for aim in group if aim.reads_goals]
        places = [aim.site for aim in read], [aim.layer for aim in read], [aim.how for aim in read]
        rows = goal_rows(teacher, *places, batches, POSITIONS) if read else []
        for aim in group:
            yield rows.pop(0) if aim.reads_goals else []


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
    problem = fitting_problem(teacher, front, aim, goals, screen)
    return place_fit(front.network, aim, problem, screen)


def site_kernel(teacher: nn.Module, site: Site, ops: Sequence[Operation]) -> Tensor:
    """The site's kernel as weights of its columns (ops * C, C_out), zero between groups."""
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


def site_readout(teacher: nn.Module, site: Site) -> Readout:
    """How the site's output counts."""
    return readout_of(teacher, site.neighbours, site.geometry.out_channels)


def reuse(site: Site) -> float:
    """Input positions for each output position."""
    (height, width), (rows, columns) = site.input_shape[-2:], site.output_shape[-2:]
    return height * width / (rows * columns)


def fitting_problem(
    teacher: nn.Module,
    front: Front,
    aim: Aim,
    goals: Sequence[Tensor],
    screen: Screen | None = None,
) -> SiteMoments:
    """What any fitted form of the site is fitted to; arguments as for `place`."""
    site, how = aim.site, aim.how
    ops = site_operations(site)
    found = refit_moments(front, site, goals, ops, how, POSITIONS, screen=screen)
    kernel = lifted_kernel(site_kernel(teacher, site, ops), screen)
    return site_moments(found.with_prior(kernel), how.weights, ops, reuse=reuse(site))


def place_fit(
    student: nn.Module, aim: Aim, problem: SiteMoments, screen: Screen | None = None
) -> Decision:
    """Fit the site's form to `problem` and put it into the edited network."""
    site = aim.site
    fit = unscreened(fit_option(problem, aim.option, rounds=_ROUNDS), screen)
    structure = structure_of(fit, problem.ops)
    decision = Decision(
        site, op_of(structure), reason=f"relative error {fit.error:.3f}", structure=structure
    )
    apply_plan(student, [decision])
    module = student.get_submodule(site.name)
    if isinstance(module, Bottleneck):
        set_weights(module, fit, problem.ops, site.geometry)
    return decision


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
    site, layer, student = aim.site, _layer_behind(aim.site), front.network
    ops = site_operations(site)
    if site.kind == "depthwise":
        found = _channel_refit(teacher, front, site)
        if site.neighbours.norm is not None:
            fold_into_norm(student.get_submodule(site.neighbours.norm), found)
        chosen, tail = found.ops, "keep"
    else:
        how = aim.how
        moments = refit_moments(front, site, goals, ops, how, POSITIONS, layer)
        chosen, tail = fit_bare(moments, how.weights, len(ops)).ops, "drop"
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


def _layer_behind(site: Site) -> str:
    if site.neighbours.pointwise_after is None:
        raise RecordMismatchError(f"No pointwise layer reads {site.name}.")
    return site.neighbours.pointwise_after


def _outputs(model: nn.Module, layer: str) -> int:
    module = model.get_submodule(layer)
    return len(module.weight)  # type: ignore[arg-type]


def channel_fits(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor]
) -> dict[str, ChannelFit]:
    """The best operation for each channel of depthwise sites, in one pass over the images."""
    sums = {s.name: ChannelSums(len(site_operations(s)), s.geometry.in_channels) for s in sites}
    generator = torch.Generator().manual_seed(0)
    images = sum(len(batch) for batch in batches)

    def add(site: Site, x: Tensor, y: Tensor) -> None:
        _add_channels(sums[site.name], site, x, y, images, generator)

    handles = [
        model.get_submodule(site.name).register_forward_hook(
            lambda _, args, kwargs, out, site=site: add(site, first_of(args, kwargs), out),
            with_kwargs=True,
        )
        for site in sites
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {site.name: sums[site.name].fit(site_readout(model, site).weights) for site in sites}


def _channel_refit(teacher: nn.Module, front: Front, site: Site) -> ChannelFit:
    """The best operation for each channel, with inputs from the edited network."""
    sums = ChannelSums(len(site_operations(site)), site.geometry.in_channels)
    generator = torch.Generator().manual_seed(0)
    images = sum(len(batch) for batch in front.batches)
    read = front.captures(site.name, {"x": (site.name, "input")})
    for batch, made in zip(front.batches, read, strict=True):
        y = capture(teacher, batch, {"y": (site.name, "output")})["y"]
        _add_channels(sums, site, made["x"], y, images, generator)
    return sums.fit(site_readout(teacher, site).weights)


def _add_channels(
    sums: ChannelSums, site: Site, x: Tensor, y: Tensor, images: int, generator: torch.Generator
) -> None:
    number = len(y) * y.shape[2] * y.shape[3]
    chosen = sample_positions(number, max(1, round(POSITIONS * len(x) / images)), generator)
    where = None if chosen is None else chosen.to(x.device)
    sums.add(x, y, site_window(site), site_operations(site), where)
