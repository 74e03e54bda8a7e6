"""Fine-tuning a converted model, with the untouched one as its teacher."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pfsurgery.batches import (
    Images,
    give_freed_memory_back,
    report_skipped,
    skipped_images,
)
from pfsurgery.errors import SlowWarning, TrainingError
from pfsurgery.recover import snapshot
from pfsurgery.recover.compilation import check_backend
from pfsurgery.recover.config import FinetuneConfig, FinetuneResult
from pfsurgery.recover.logs import check_tracker
from pfsurgery.recover.optimizer import check_optimizer
from pfsurgery.recover.sharding import check_sharding, forgotten_afterwards
from pfsurgery.recover.source import opened
from pfsurgery.recover.state import (
    keep_layouts,
    keep_random_state,
    keep_train_flags,
    placement,
    writable_folder,
)
from pfsurgery.recover.stop import stop_on_sigterm, workers_outlive_sigterm
from pfsurgery.recover.training import Training


def finetune(
    model: nn.Module,
    *,
    train: Images | str | Path,
    val: Images | str | Path | None = None,
    teacher: nn.Module | None = None,
    config: FinetuneConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> FinetuneResult:
    """Train `model` in place, from the labels and from what `teacher` says about the same images.

    The loss is `(1 - kd_weight) * cross-entropy + kd_weight * KL` (see
    `pfsurgery.recover.distill`), plus `match_weight` times the error of changed blocks and
    `stage_weight` times that of the stages. Accelerate chooses the device (CUDA when there is one)
    and spreads the images over the processes of `accelerate launch` or `torchrun`; several
    processes see in each step what one process with a batch as large as theirs together would see.
    Optimiser and schedule are timm's. Convert before you call this: the optimiser is made here.
    Where Accelerate is set up for FSDP (version 2), a copy of the model is split over the processes
    and trained, while `model` waits on the CPU; see `pfsurgery.recover.sharding`.

    Afterwards the model holds the weights of the last step, or their moving average (the best ones
    are in `out`; with `max_drop` it holds these), stays on the device where it was trained, and has
    its train flags and memory format back; the teacher is as it was. The global random states are
    put back. After an error the model holds the last good weights: those of the best epoch so far,
    or the ones it came with. On a CPU, the same model, data, seed and number of threads give the
    same weights, bit for bit, no matter how often the run was killed and continued.

    Args:
        model: A classifier with something left to train: (N, C, H, W) -> (N, classes).
        train: Training images: a path or name that `pfsurgery.data.open_data` understands, a
            `Dataset` of (image, label), a `DataLoader`, or any iterable of (images, labels) that
            can be iterated again. Images are (N, C, H, W), labels (N,) class indices; with a
            teacher and `kd_weight=1` the labels may be missing, and a folder needs no classes.
        val: Validation images with labels, of the same kinds; the accuracy on them is taken after
            each epoch.
        teacher: The model as it was before surgery, or any other with the same classes.
        config: Settings; the defaults of `FinetuneConfig` if None.
        out: Folder for `config.yaml`, `log.jsonl` (one JSON object a line), `epochs.csv`,
            `tensorboard/` if that is installed, `checkpoints/`, and `best.safetensors`, the weights
            of the best epoch so far (by top-1 on `val`, else the latest); `final.safetensors` where
            norms that were re-estimated or blocks that were given back made them better. Files are
            replaced in one step, so that a crash or a full disk never leaves half of one. With
            several machines, all must see the same folder. On SIGTERM the run saves and ends.
        resume: Whether to continue from the newest checkpoint in `out`; without one, the run
            begins at the start. Give the same model, images and settings as before.
        progress: Whether to show a progress bar with images/s, loss, accuracy and time left; None
            means where a terminal is attached, and elsewhere a line every half a minute.

    Raises:
        TrainingError: The loss is no longer finite or explodes, `out` cannot be written to or holds
            another run, nothing can be trained, the teacher does not go with the model, or a
            setting does not go with FSDP.
        DataError: The images cannot be opened, there are none, or labels do not fit the model.
        UnknownNameError: timm has no optimiser of that name.
    """
    config = config or FinetuneConfig()
    folder = None if out is None else writable_folder(out)
    if teacher is model:
        raise TrainingError(
            "The teacher is the model itself. Give the model as it was before the conversion: "
            "convert returns a copy, and leaves the one that it was given untouched."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("No parameter of the model requires a gradient, so none is trained.")
    check_run(teacher, config, val=val, folder=folder, resume=resume)
    give_freed_memory_back()
    with ExitStack() as stack:
        stack.enter_context(keep_random_state())
        both = [m for m in (model, teacher) if m is not None]
        stack.enter_context(keep_train_flags(*both))
        stack.enter_context(keep_layouts(*both))
        stack.enter_context(_frozen(teacher))
        stack.enter_context(forgotten_afterwards())
        accelerator = stack.enter_context(_accelerator(model, config, folder))
        train_loader, val_loader = opened(train, val, model, config, labelled=teacher is None)
        if folder is not None:
            stack.enter_context(workers_outlive_sigterm(train_loader, val_loader))
        job = Training(model, teacher, config, accelerator, folder)
        with (
            keep_train_flags(model),
            job.prepared(train_loader, val_loader, resume) as run,
            stop_on_sigterm(folder is not None) as stop,
        ):
            job.train(run, stop, progress if accelerator.is_main_process else False)
        last, given_back = job.finish()
    report_skipped(train_loader)
    return FinetuneResult(
        history=tuple(job.at.history),
        steps=job.at.step,
        seconds=job.seconds,
        last=last,
        best=job.at.best,
        teacher=job.at.teacher,
        weights=job.weights,
        given_back=given_back,
        skipped=skipped_images(train_loader),
    )


def check_run(
    teacher: nn.Module | None,
    config: FinetuneConfig,
    *,
    val: Any,
    folder: Path | None,
    resume: bool,
) -> None:
    """Raise what can be known to go wrong before any image is read; arguments as of `finetune`."""
    check_optimizer(config)
    check_backend(config)
    check_sharding(config)
    check_tracker(config)
    if config.mixed_precision == "bf16" and not _computes_in_bfloat16():
        warnings.warn(
            "This processor has no bfloat16 arithmetic: mixed_precision='bf16' trains many times "
            "slower than 'no'.",
            SlowWarning,
            stacklevel=3,
        )
    for name in ("match_weight", "stage_weight", "ramp", "max_drop"):
        if getattr(config, name) and teacher is None:
            raise TrainingError(f"{name} needs a teacher: the model as it was before.")
    if config.max_drop is not None and (val is None or teacher is None):
        raise TrainingError("max_drop needs a teacher, and validation images to measure it on.")
    for name, needed in (
        ("save_every", config.save_every is not None),
        ("on_divergence='roll_back'", config.on_divergence == "roll_back"),
        ("resume", resume),
        ("tracker", config.tracker is not None),
    ):
        if needed and folder is None:
            raise TrainingError(f"{name} needs a folder for checkpoints and logs: give out.")
    if folder is not None and not resume and snapshot.unfinished(folder):
        raise TrainingError(
            f"{folder} holds the checkpoints of a run that is not finished. Continue it with "
            f"--resume (resume=True in Python), or remove {folder / snapshot.FOLDER}, or choose "
            f"another folder."
        )


def _computes_in_bfloat16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.accelerator.is_available() or supported is None or supported()


@contextmanager
def _frozen(teacher: nn.Module | None) -> Iterator[None]:
    """The teacher needs no gradients, and goes back to where it was."""
    if teacher is None:
        yield
        return
    home = placement(teacher)[0]
    wanted = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    try:
        teacher.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        teacher.to(home)


@contextmanager
def _accelerator(model: nn.Module, config: FinetuneConfig, folder: Path | None) -> Iterator[Any]:
    """An Accelerator that leaves neither a wrapper on the model nor its precision to the next."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    shared = bool(AcceleratorState._shared_state)
    own_forward = "forward" in vars(model)
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise TrainingError(
            "mixed_precision='fp16' needs a GPU, and there is none; give bf16 or no."
        )
    try:
        # Accelerate joins processes without a GPU only when it is told to use the CPU
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=not torch.accelerator.is_available(),
            log_with=config.tracker,
            project_dir=folder,
        )
    except ValueError as error:
        raise TrainingError(
            f"This process already uses Accelerate with another precision than "
            f"mixed_precision={config.mixed_precision!r}: {error}"
        ) from error
    kinds = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    try:
        if accelerator.distributed_type in kinds:
            raise TrainingError(
                f"{accelerator.distributed_type.value} splits a model over processes, which is "
                f"not supported here. Launch with FSDP (fsdp_version: 2) or plain data parallelism "
                f"(torchrun, or accelerate launch --multi_gpu)."
            )
        yield accelerator
    finally:
        for tracker in getattr(accelerator, "trackers", ()):
            tracker.finish()
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if not own_forward:
            vars(model).pop("forward", None)
        accelerator.free_memory()
        if not shared:
            AcceleratorState._reset_state()
