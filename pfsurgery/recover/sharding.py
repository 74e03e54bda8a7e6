"""FSDP: weights, gradients and optimiser state of the trained model, split over the processes.

The settings are Accelerate's (`distributed_type: FSDP` in its config file), the work is done by
torch's `fully_shard`. It is called here and not by Accelerate, which shards on GPUs only, computes
batch norms in low precision, and makes units of layers whose weights the module around them reads.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.errors import TrainingError, closest
from pfsurgery.recover.config import FinetuneConfig

_ELEMENTWISE = ("sgd", "momentum", "adam", "adamw")  # those that need no other shard's numbers
_Rule = Callable[[nn.Module, int], bool]


def sharding_of(accelerator: Any) -> Any:
    """Accelerate's settings of FSDP, if the model is to be split over processes, else None."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.MULTI_CPU):
        return _settings()
    return None


def check_sharding(config: FinetuneConfig) -> None:
    """Raise a TrainingError where FSDP is asked for with settings that it cannot have here."""
    settings = _settings()
    if settings is None:
        return
    if getattr(settings, "fsdp_version", 1) != 2:
        raise TrainingError(
            "FSDP is supported in version 2 only. Set fsdp_version: 2 in the fsdp_config of "
            "Accelerate's config file (Accelerate 1.6 or newer)."
        )
    for name, asked, why in (
        (
            "fsdp_cpu_ram_efficient_loading",
            settings.cpu_ram_efficient_loading,
            "it may leave all processes but the first without weights, which each needs for the "
            "teacher",
        ),
        (
            "fsdp_offload_params",
            _offloads(settings),
            "images and norm statistics are where the weights are",
        ),
        (
            "fsdp_activation_checkpointing",
            settings.activation_checkpointing,
            "batch norms would count each batch twice, and dropout would draw twice",
        ),
    ):
        if asked:
            raise TrainingError(
                f"{name} is not supported: {why}. Set {name}: false in the fsdp_config of "
                f"Accelerate's config file (left out, some are true)."
            )
    if settings.ignored_modules is not None:
        raise TrainingError(
            "fsdp_ignored_modules is not supported: their gradients would differ between "
            "processes. Leave it out."
        )
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        raise TrainingError("parallelism_config is not supported. Leave it out.")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise TrainingError(
            "dynamo_config is not supported with FSDP. Leave it out of Accelerate's config file."
        )
    if config.compile != "no":
        raise TrainingError(
            f"compile={config.compile!r} is not supported with FSDP. Give compile='no', or launch "
            f"with plain data parallelism."
        )
    if config.optimizer.lower() not in _ELEMENTWISE:
        raise TrainingError(
            f"optimizer={config.optimizer!r} is not supported with FSDP, which gives it parts of "
            f"tensors. Give one of {', '.join(_ELEMENTWISE)}, or launch with plain data "
            f"parallelism."
        )


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Afterwards Accelerate's processes are no longer of FSDP, whose settings are gone by then."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    before = PartialState._shared_state.get("distributed_type")
    try:
        yield
    finally:
        now = PartialState._shared_state.get("distributed_type")
        if now == DistributedType.FSDP and not AcceleratorState._shared_state:
            if before is None:
                PartialState._reset_state()
            else:
                PartialState._shared_state["distributed_type"] = before


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where a weight is read outside its unit, when it is split.

    Raises:
        TrainingError: That happened.
    """
    try:
        yield
    except RuntimeError as error:
        if "torch.Tensor and DTensor" not in str(error):
            raise
        raise TrainingError(
            "The model reads weights of an FSDP unit without calling it. Give a larger "
            "fsdp_min_num_params, name the classes of blocks that are called "
            "(TRANSFORMER_BASED_WRAP, fsdp_transformer_layer_cls_to_wrap), or set "
            "fsdp_auto_wrap_policy: NO_WRAP in Accelerate's config file."
        ) from error


def copy_to_shard(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` on `device`, with the weights of the first process, to be sharded.

    Raises:
        TrainingError: It has a parameter without dimensions, which cannot be split.
    """
    from accelerate.utils import broadcast

    twin = copy.deepcopy(model).to(device)
    for name, parameter in twin.named_parameters():
        if not parameter.dim():
            raise TrainingError(
                f"The parameter {name} has no dimensions, and FSDP cannot split it. Make it one of "
                f"shape (1,), or launch with plain data parallelism."
            )
        parameter.data = parameter.data.contiguous()
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.copy_(broadcast(tensor.detach().contiguous()))
    return twin


def shard(model: nn.Module, settings: Any) -> None:
    """Split `model` in place over all processes; each unit of it is put together when it runs.

    Raises:
        TrainingError: The settings name a class of modules that the model does not have.
    """
    _shard_below(model, _rule(model, settings), settings.reshard_after_forward)
    _unit(model)


def _settings() -> Any:
    """What is in use already, or what `accelerate launch` put into the environment; else None."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    known = AcceleratorState._shared_state.get("fsdp_plugin")
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if known is not None or not asked:
        return known
    try:
        return FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise TrainingError(
            f"Accelerate does not take the fsdp_config of its config file: {error}. "
            f"examples/imagenet/fsdp.yaml is one that works; fsdp_reshard_after_forward, for "
            f"instance, has to be true or false."
        ) from error


def _offloads(settings: Any) -> bool:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(settings.cpu_offload, CPUOffloadPolicy)


def _rule(model: nn.Module, settings: Any) -> _Rule:
    """Which modules are units, by themselves and by how many parameters no unit inside has."""
    from torch.distributed.fsdp import wrap

    policy = getattr(settings.auto_wrap_policy, "func", settings.auto_wrap_policy)
    if policy is None:
        return lambda module, left: False
    if policy is wrap.size_based_auto_wrap_policy:
        return lambda module, left: left >= settings.min_num_params and _is_block(module)
    if policy is not wrap.transformer_auto_wrap_policy:
        raise TrainingError(
            "An auto_wrap_policy of your own is not supported with FSDP. Use SIZE_BASED_WRAP or "
            "TRANSFORMER_BASED_WRAP."
        )
    names = settings.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", ()) or ()
    classes = {type(module).__name__ for module in model.modules()}
    for name in names:
        if name not in classes:
            raise TrainingError(
                f"fsdp_transformer_layer_cls_to_wrap names {name!r}, and the model has no module "
                f"of that class. {closest(name, sorted(classes))}"
            )
    return lambda module, left: type(module).__name__ in names


def _is_block(module: nn.Module) -> bool:
    """Whether it is more than a layer, whose weights others may read, or a list of modules."""
    lists = (nn.Sequential.forward, nn.ModuleList.forward, nn.ModuleDict.forward)
    return type(module).forward not in lists and any(True for _ in module.children())


def _shard_below(module: nn.Module, rule: _Rule, reshard: bool) -> int:
    """Shard the units below `module`; how many parameters of it are in none of them."""
    left = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    for child in module.children():
        below = _shard_below(child, rule, reshard)
        if below and rule(child, below):
            _unit(child, reshard_after_forward=reshard)
        else:
            left += below
    return left


def _unit(module: nn.Module, **settings: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, **settings)
    module.register_forward_hook(_without_views, prepend=True)


def _without_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """FSDP waits for the gradient of a unit's output, and loses a view that is changed in place."""
    from torch.utils._pytree import tree_map_only

    if not torch.is_grad_enabled():
        return output
    return tree_map_only(Tensor, lambda x: x if x._base is None else x.clone(), output)
