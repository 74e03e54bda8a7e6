"""How a converted model is fine-tuned, and what came of it: plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pfsurgery.errors import TrainingError
from pfsurgery.recover.evaluate import Accuracy


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """Settings of `finetune`; wrong values raise at once.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a batch, on each process. Not used for a `DataLoader` or batches.
        accumulate: Batches whose gradients make one step.
        optimizer: timm's name of it, such as adamw, sgd (with Nesterov momentum) or lamb.
        lr: Highest learning rate.
        weight_decay: Weight decay. Not applied to biases and norms.
        layer_decay: Factor of the learning rate from each layer to the one before it; 1 for none.
        changed_lr: Factor of the learning rate in blocks where a site was replaced.
        schedule: cosine (the rate falls to 0, step by step) or step (to a tenth now and then).
        decay_epochs: Epochs between two falls of the step schedule.
        warmup: Share of all steps in which the learning rate rises linearly from a hundredth.
        temperature: Of the distillation. See `pfsurgery.recover.distill.kd_loss`.
        kd_weight: Share of the teacher in the loss, from 0 to 1; the rest is cross-entropy. With 1,
            no labels are needed. Without a teacher it is not used.
        teacher_cache: Keep the teacher's logits of all training images, from one pass before the
            first step. For small sets without augmentation, in one process; it has no effect with
            several, or where blocks, stages or mixed images need the teacher itself.
        match_weight: Weight of matching the teacher's outputs of the blocks where a site was
            replaced. Added to the loss, see `pfsurgery.recover.match.Match`.
        stage_weight: Weight of matching the teacher's outputs at the ends of the stages, which
            timm's models name in `feature_info`. Added to the loss in the same way.
        ramp: Share of all steps in which replaced sites are blended from the teacher's convolution.
            See `pfsurgery.recover.ramp.Ramp`.
        freeze: Share of all steps in which only blocks where a site was replaced are trained.
        label_smoothing: Of the cross-entropy.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        auto_augment: timm's augmentation of images that are read by path, such as rand-m9-mstd0.5.
        crop_scale: Smallest share of the area that random crops of such images keep.
        ema: Decay of the exponential moving average of the weights, which is then what is evaluated
            and kept; 0 for none.
        mixed_precision: no, bf16 or fp16 (the latter on a GPU only).
        channels_last: Train in that memory format, in which most models are faster. Afterwards the
            model has its own back.
        compile: Backend of torch.compile for model and teacher, such as inductor, or no.
        norm_images: Training images for re-estimating norm statistics at the end; 0 for none.
        max_drop: Most points of top-1 to lose against the teacher; changed blocks are given back
            until it holds. See `pfsurgery.recover.give_back`.
        save_every: Steps between further checkpoints, besides the one at the end of each epoch.
        keep_last: Number of checkpoints that are kept, besides the best weights.
        on_divergence: What to do when the loss is not finite or explodes: stop, or roll_back to the
            newest checkpoint and go on with half the learning rate.
        explosion: The loss explodes when it is so many times the larger of 1 and its lowest value.
        log_every: Steps between two lines of the log.
        tracker: Accelerate's name of a service that is told the same, such as wandb, mlflow or
            comet_ml. Which project and account is said by its own environment variables.
        seed: Of augmentation, order of the images, dropout.
        max_steps: Stop after so many steps. The learning rate is planned for them.

    Raises:
        TrainingError: A value is out of its range.
    """

    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.02
    layer_decay: float = 1.0
    changed_lr: float = 1.0
    schedule: Literal["cosine", "step"] = "cosine"
    decay_epochs: int = 30
    warmup: float = 0.05
    temperature: float = 2.0
    kd_weight: float = 0.7
    teacher_cache: bool = False
    match_weight: float = 0.0
    stage_weight: float = 0.0
    ramp: float = 0.0
    freeze: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: str | None = None
    crop_scale: float = 0.35
    ema: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = True
    compile: str = "no"
    norm_images: int = 0
    max_drop: float | None = None
    save_every: int | None = None
    keep_last: int = 2
    on_divergence: Literal["stop", "roll_back"] = "stop"
    explosion: float = 10.0
    log_every: int = 10
    tracker: str | None = None
    seed: int = 0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        count = "at least 1"
        checks = (
            ("epochs", self.epochs >= 1, count),
            ("batch_size", self.batch_size >= 1, count),
            ("accumulate", self.accumulate >= 1, count),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0, to 1"),
            ("changed_lr", 0 < self.changed_lr < math.inf, "above 0"),
            ("schedule", self.schedule in ("cosine", "step"), "cosine or step"),
            ("decay_epochs", self.decay_epochs >= 1, count),
            ("warmup", 0 <= self.warmup < 1, "a share of all steps, from 0 to below 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("kd_weight", 0 <= self.kd_weight <= 1, "from 0 to 1"),
            ("match_weight", 0 <= self.match_weight < math.inf, "0 or more"),
            ("stage_weight", 0 <= self.stage_weight < math.inf, "0 or more"),
            ("ramp", 0 <= self.ramp <= 1, "a share of all steps, from 0 to 1"),
            ("freeze", 0 <= self.freeze <= 1, "a share of all steps, from 0 to 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("mixup", 0 <= self.mixup < math.inf, "0 or more"),
            ("cutmix", 0 <= self.cutmix < math.inf, "0 or more"),
            ("crop_scale", 0 < self.crop_scale <= 1, "above 0, to 1"),
            ("ema", 0 <= self.ema < 1, "from 0 to below 1"),
            (
                "mixed_precision",
                self.mixed_precision in ("no", "bf16", "fp16"),
                "no, bf16 or fp16",
            ),
            ("norm_images", self.norm_images >= 0, "0 or more"),
            ("max_drop", self.max_drop is None or self.max_drop >= 0, "0 or more, or None"),
            ("save_every", self.save_every is None or self.save_every >= 1, f"{count}, or None"),
            ("keep_last", self.keep_last >= 1, count),
            (
                "on_divergence",
                self.on_divergence in ("stop", "roll_back"),
                "stop or roll_back",
            ),
            ("explosion", self.explosion > 1, "above 1"),
            ("log_every", self.log_every >= 1, count),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
            ("max_steps", self.max_steps is None or self.max_steps >= 1, f"{count}, or None"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise TrainingError(f"{name}={getattr(self, name)!r} must be {allowed}.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise TrainingError(
                f"batch_size={self.batch_size} must be even, since mixup and cutmix pair images."
            )


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One pass over the training images.

    Attributes:
        epoch: Counted from 1.
        step: Optimiser steps taken since the start.
        loss: Mean of the training loss over the epoch, in nats.
        lr: Learning rate of the last step.
        images_per_s: Training throughput over all processes, evaluation not included.
        val: Accuracy on the validation images, if there are any.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    images_per_s: float
    val: Accuracy | None


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What came of `finetune`.

    Attributes:
        history: One record for each epoch.
        steps: Optimiser steps taken.
        seconds: Wall-clock time of all, data loading and evaluation included.
        last: Accuracy of the model as it was returned; None without validation images.
        best: Highest accuracy (top-1) of all epochs, which `weights` has.
        teacher: Accuracy of the teacher, if there is one and validation images.
        weights: File of the best weights (without validation images, of the last ones).
        given_back: Sites that have their convolution back, to keep within `max_drop`.
        skipped: Names of images that could not be read.
    """

    history: tuple[EpochRecord, ...]
    steps: int
    seconds: float
    last: Accuracy | None
    best: Accuracy | None
    teacher: Accuracy | None
    weights: Path | None
    given_back: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        """For example `975 steps in 992 s, top-1 76.66 %, the original's 77.09 %`."""
        told = [f"{self.steps} steps in {self.seconds:.0f} s"]
        if self.last is not None:
            told.append(f"top-1 {self.last.top1:.2f} %")
        if self.teacher is not None:
            told.append(f"the original's {self.teacher.top1:.2f} %")
        return ", ".join(told)

    def figure(self, path: str | Path) -> None:
        """Write accuracy and loss against steps, with the teacher's accuracy as a line, as PNG.

        Raises:
            OSError: `path` cannot be written.
        """
        from pfsurgery.recover.curve import draw_curve

        draw_curve(self, Path(path))
