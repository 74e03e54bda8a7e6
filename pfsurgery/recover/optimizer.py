"""timm's optimisers and schedules, with rates of their own for what surgery changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pfsurgery.errors import TrainingError, UnknownNameError, closest
from pfsurgery.recover.blocks import changed_parameters
from pfsurgery.recover.config import FinetuneConfig
from pfsurgery.recover.state import share_of, whole

_FUSED = ("sgd", "adam", "adamw")  # torch's own, which have a fused step on every device
_FUSED_ON_SHARDS = ("adam", "adamw")


def check_optimizer(config: FinetuneConfig) -> None:
    """Raise an error where timm has no optimizer of that name, or it needs second derivatives."""
    from timm.optim import get_optimizer_info, list_optimizers

    names = list_optimizers()
    name = config.optimizer.lower()
    if name not in names:
        raise UnknownNameError(
            f"timm has no optimizer {config.optimizer!r}. {closest(config.optimizer, names)}"
        )
    if get_optimizer_info(name).second_order:
        raise TrainingError(
            f"The optimizer {config.optimizer} needs second derivatives, which are not computed "
            f"here. Give another one, such as adamw, sgd or lamb."
        )


def make_optimizer(model: nn.Module, config: FinetuneConfig, *, sharded: bool = False) -> Any:
    """An optimizer of timm's over `parameter_groups`; `sharded` if the model is split by FSDP."""
    from timm.optim import create_optimizer_v2

    names = _FUSED_ON_SHARDS if sharded else _FUSED
    fits = not (sharded and config.mixed_precision == "fp16")  # whose scale is no shard
    fused = {"fused": True} if fits and config.optimizer.lower() in names else {}
    return create_optimizer_v2(
        parameter_groups(model, config),
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        **fused,
    )


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Groups of parameters with `weight_decay` and `lr_scale`, which timm's schedules multiply by.

    Biases, norms and what the model itself names (`no_weight_decay`) do not decay. `lr_scale` is
    `layer_decay` to the power of the layer's distance from the output, as timm counts it, times
    `changed_lr` in changed blocks; `changed` says which these are.

    Raises:
        TrainingError: Changed blocks are to be trained first or faster, and there are none.
    """
    from timm.optim import param_groups_layer_decay

    exempt = getattr(model, "no_weight_decay", None)
    names = changed_parameters(model)
    for setting, off in (("freeze", 0.0), ("changed_lr", 1.0)):
        if getattr(config, setting) != off and not names:
            raise TrainingError(
                f"{setting} is set, but the model has no replaced site to train. Give a model that "
                f"pfsurgery.convert made, or {setting}={off:g}."
            )
    changed = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    groups: list[dict[str, Any]] = []
    for group in param_groups_layer_decay(
        model,
        weight_decay=config.weight_decay,
        no_weight_decay_list=exempt() if exempt is not None else (),
        layer_decay=config.layer_decay,
    ):
        for inside, factor in ((False, 1.0), (True, config.changed_lr)):
            params = [p for p in group["params"] if (id(p) in changed) == inside]
            scale = group["lr_scale"] * factor
            if params:
                groups.append({**group, "params": params, "lr_scale": scale, "changed": inside})
    return groups


def make_schedule(
    optimizer: Any, config: FinetuneConfig, *, total: int, steps_per_epoch: int
) -> Any:
    """A schedule of timm's, counting steps: warm-up, then a cosine to 0 or falls to a tenth."""
    from timm.scheduler import create_scheduler_v2

    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=total,
        decay_epochs=config.decay_epochs * steps_per_epoch,
        decay_rate=0.1,
        warmup_epochs=round(config.warmup * total),
        warmup_lr=config.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def set_rate(optimizer: Any, scheduler: Any, step: int, factor: float, frozen: int) -> float:
    """Set the learning rates of the next step, which is number `step` from 0; the highest.

    Args:
        optimizer: Over `parameter_groups`.
        scheduler: Of `make_schedule`.
        step: The next step.
        factor: Of all rates.
        frozen: Before this step, only changed blocks are trained.
    """
    scheduler.step_update(step)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    highest = max(group["lr"] / group["lr_scale"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        if step < frozen and not group["changed"]:
            group["lr"] = 0.0
    return float(highest)


def whole_state(optimizer: Any, *, keep: bool) -> dict[str, Any]:
    """The state, each tensor put together if it is split over processes.

    All processes must call it; those that do not `keep` what is put together need no room for it.
    """
    state: dict[str, Any] = optimizer.state_dict()
    return {
        **state,
        "state": {
            place: {name: _whole(value, keep) for name, value in entries.items()}
            for place, entries in state["state"].items()
        },
    }


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `whole_state` gave; of tensors that are split over processes, the own share."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shares = {
        place: {name: _share(value, parameters[place]) for name, value in entries.items()}
        for place, entries in state["state"].items()
        if place < len(parameters)
    }
    optimizer.load_state_dict({**state, "state": {**state["state"], **shares}})


def _whole(value: Any, keep: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    together = whole(value)
    return together if keep else None


def _share(value: Any, parameter: Tensor) -> Any:
    of_parameter = isinstance(value, Tensor) and value.shape == parameter.shape
    return share_of(value, parameter) if of_parameter else value
