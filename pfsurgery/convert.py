"""Convert a model: scan, policy, plan, rewrite, check."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from pfsurgery.errors import (
    PolicyError,
    ShapeError,
    UnsupportedSiteError,
)
from pfsurgery.example import Example, example_inputs
from pfsurgery.modularise import modularise
from pfsurgery.modules import Model, copied
from pfsurgery.plan import Decision, Mixing, Plan, make_plan, warn_of_no_effect
from pfsurgery.policy import KEEP, DataPolicy, DevicePolicy, PolicyLike, Tell, get_policy
from pfsurgery.record import remember
from pfsurgery.rewrite import apply_plan
from pfsurgery.scan import refuse_wrapped, scan
from pfsurgery.select import Patterns, Where
from pfsurgery.shadow import dry_run
from pfsurgery.sites import Convolution


def plan(
    model: nn.Module,
    policy: PolicyLike,
    *,
    example: Example | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Where | None = None,
    mixing: Mixing = "auto",
) -> Plan:
    """Say what `policy` would make of each site of `model`; nothing is changed.

    Args:
        model: The model.
        policy: Name of a policy (`list_policies()`), a `Policy`, a path to a YAML file, or a
            function from a `Site` to the name of an op or None.
        example: A tensor (N, C, H, W) or a tuple of arguments; by default one image of the model's
            own input size.
        include: Name patterns; only sites that match may change. An exact name also frees a stem
            or an output convolution, which are kept otherwise.
        exclude: Name patterns; sites that match are kept.
        where: A function of the site; only sites for which it returns True may change.
        mixing: `"never"` keeps the sites that would need a pointwise convolution behind the op.

    Raises:
        SurgeryError: The model is wrapped, has no sites or cannot run on the example; or the
            policy, an op or a pattern does not exist. The message says what to do.
    """
    chosen = get_policy(policy)
    sites = scan(model, example, attention=chosen.attention)
    return make_plan(
        sites,
        chosen.on(model) if isinstance(chosen, DevicePolicy) else chosen,
        include=include,
        exclude=exclude,
        where=where,
        mixing=mixing,
    )


def convert(
    model: Model,
    policy: PolicyLike | Plan | DataPolicy,
    *,
    example: Example | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Where | None = None,
    mixing: Mixing = "auto",
    images: Any = None,
    tell: Tell = lambda line: None,
) -> Model:
    """A converted copy of `model`, of the same class; the original is left as it is.

    Arguments and errors are those of `plan`; `policy` may also be a `Plan`, which is then carried
    out as it stands. Where nothing changes, a NoEffectWarning says so.

    The policy `budget(...)` is fitted to `images`: a few hundred to a few thousand unlabelled ones,
    as batches (N, C, H, W), a `DataLoader` (labels are ignored) or a path. The first of them is
    then the example, and `tell` is called with a line of text for each step.
    """
    if isinstance(policy, DataPolicy):
        _refuse_mixing(mixing)
        fitted, carried_out = _fitted(model, policy, include, exclude, where, images, tell)
        remember(fitted, carried_out)
        return fitted
    _refuse_images(images)
    chosen = _as_plan(model, policy, example, include, exclude, where, mixing)
    _check(model, chosen, example)
    with torch.inference_mode(False):
        return _apply(copied(model), chosen)


def convert_(
    model: Model,
    policy: PolicyLike | Plan | DataPolicy,
    *,
    example: Example | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Where | None = None,
    mixing: Mixing = "auto",
    images: Any = None,
    tell: Tell = lambda line: None,
) -> Model:
    """Convert `model` itself and return it; see `convert`. If it fails, the model is unchanged."""
    if isinstance(policy, DataPolicy):
        _refuse_mixing(mixing)
        fitted, carried_out = _fitted(model, policy, include, exclude, where, images, tell)
        with torch.inference_mode(False):
            _apply(model, carried_out)
            model.load_state_dict(fitted.state_dict())
        for name, parameter in fitted.named_parameters():
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        return model
    _refuse_images(images)
    chosen = _as_plan(model, policy, example, include, exclude, where, mixing)
    _check(model, chosen, example)
    with torch.inference_mode(False):
        return _apply(model, chosen)


def _fitted(
    model: Model,
    policy: DataPolicy,
    include: Patterns,
    exclude: Patterns,
    where: Where | None,
    images: Any,
    tell: Tell,
) -> tuple[Model, Plan]:
    """A copy that is fitted to images, and the plan that was carried out."""
    with torch.inference_mode(False):
        marked = marker(model, policy, include, exclude, where)
        fitted, carried_out = policy.convert(model, marked, images, tell)
    return cast(Model, fitted), carried_out


def _refuse_images(images: Any) -> None:
    if images is not None:
        raise PolicyError(
            "images are for policies that are fitted to them (budget, bare). To win accuracy back "
            "after another one, use pfsurgery.reconstruct(converted, original, images)."
        )


def _refuse_mixing(mixing: Mixing) -> None:
    if mixing != "auto":
        raise PolicyError(
            f"mixing={mixing!r} is for policies of rules: what a policy that is fitted to images "
            "leaves at a site brings its own pointwise convolutions. Leave it out."
        )


def marker(
    model: nn.Module,
    policy: DataPolicy,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Where | None = None,
) -> Callable[[Tensor], Plan]:
    """A function from an image to a plan: which sites `policy` may fit, why others are kept."""

    def mark(image: Tensor) -> Plan:
        sites = scan(model, image, pointwise=policy.pointwise)
        found = make_plan(sites, policy, include=include, exclude=exclude, where=where)
        modules = model.named_modules(remove_duplicate=False)
        convolutions = {name for name, module in modules if isinstance(module, Convolution)}
        return Plan(found.policy, tuple(_kept_call(d, convolutions) for d in found))

    return mark


def _kept_call(decision: Decision, convolutions: Collection[str]) -> Decision:
    """A call of a function in a graph has no module that fitting could watch: it is kept."""
    if not decision.replaced or decision.site.name in convolutions:
        return decision
    reason = "a call of a function in a graph is not fitted: convert it by a policy of rules"
    return Decision(decision.site, KEEP, reason=reason)


def _as_plan(
    model: nn.Module,
    policy: PolicyLike | Plan,
    example: Example | None,
    include: Patterns,
    exclude: Patterns,
    where: Where | None,
    mixing: Mixing,
) -> Plan:
    if not isinstance(policy, Plan):
        return plan(
            model,
            policy,
            example=example,
            include=include,
            exclude=exclude,
            where=where,
            mixing=mixing,
        )
    if include is not None or exclude is not None or where is not None or mixing != "auto":
        raise PolicyError(
            "A plan is carried out as it stands: edit it with plan.keep(...) and plan.set(...) "
            "in place of include, exclude, where and mixing."
        )
    refuse_wrapped(model)
    return policy


def _check(model: nn.Module, chosen: Plan, example: Example | None) -> None:
    """Carry the plan out on a shadow of the model and compare what it returns."""
    if not chosen.replaced:
        warn_of_no_effect(model, chosen, stacklevel=4)
        return
    inputs = example_inputs(model, example)
    model = modularise(model)
    ran: set[nn.Module] = set()
    made: dict[str, nn.Module] = {}

    def edit(shadow: nn.Module) -> None:
        apply_plan(shadow, chosen.replaced)
        made.update({d.site.name: shadow.get_submodule(d.site.name) for d in chosen.replaced})
        for module in made.values():  # hooks are shared with what was replaced, see `_inherit`
            module.register_forward_hook(lambda module, *_: ran.add(module))

    try:
        after, by_value = dry_run(model, inputs, edit)
    except ShapeError as error:
        dry_run(model, inputs)  # raises the error of a model that does not run as it is either
        raise ShapeError(
            f"{type(model).__name__} runs, but would not once it is converted: {error.__cause__}. "
            f"Does its code read the convolutions' attributes? Exclude those sites; the model was "
            f"not changed."
        ) from error
    if by_value:
        return
    idle = [name for name, module in made.items() if module not in ran]
    if idle:
        raise UnsupportedSiteError(
            f"{', '.join(idle)}: the code of {type(model).__name__} would still run the "
            f"convolution, which it also holds elsewhere than there. Exclude these sites; the "
            f"model was not changed."
        )
    before, _ = dry_run(model, inputs)
    if before != after:
        raise ShapeError(
            f"The conversion would change what {type(model).__name__} returns: {before} "
            f"would become {after}. Keep some sites; the model was not changed."
        )


def _apply(model: Model, chosen: Plan) -> Model:
    modularise(model, inplace=True, only=chosen.changed)
    apply_plan(model, chosen.replaced)
    remember(model, chosen)
    return model
