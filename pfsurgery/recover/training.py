"""One run of training: epochs, checkpoints, what happens when it diverges or is asked to stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.batches import images_of
from pfsurgery.errors import TrainingError
from pfsurgery.files import remove_remains
from pfsurgery.modules import set_layout
from pfsurgery.recover import logs, snapshot
from pfsurgery.recover.config import EpochRecord, FinetuneConfig
from pfsurgery.recover.config_file import write_config
from pfsurgery.recover.epoch import DivergedError, LossWindow, Run, train_epoch
from pfsurgery.recover.evaluate import Accuracy, score
from pfsurgery.recover.give_back import give_back
from pfsurgery.recover.norms import recalibrate
from pfsurgery.recover.optimizer import load_state, whole_state
from pfsurgery.recover.order import TrainBatches, spread
from pfsurgery.recover.prepare import build_run
from pfsurgery.recover.progress import Show, Write, progress_bar
from pfsurgery.recover.sharding import copy_to_shard, explained, sharding_of
from pfsurgery.recover.snapshot import Position
from pfsurgery.recover.state import (
    copy_weights,
    load_weights,
    non_finite,
    restore_weights,
    same_buffers,
    whole_weights,
    write_weights,
)
from pfsurgery.recover.stop import StoppedError, StopRequest

_log = logging.getLogger(__name__)

BEST = "best.safetensors"
FINAL = "final.safetensors"
_CONFIG = "config.yaml"
_MOST_ROLL_BACKS = 5


class Training:
    """One call of `finetune`: the models, where the run is, and where it is saved."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        config: FinetuneConfig,
        accelerator: Any,
        folder: Path | None,
    ) -> None:
        self.model, self.teacher, self.config = model, teacher, config
        self.accelerator, self.folder = accelerator, folder
        self.main = bool(accelerator.is_main_process)
        self.sharding = sharding_of(accelerator)
        self.at = Position()
        self.started, self.earlier = time.perf_counter(), 0.0
        self.val: Iterable[Any] | None = None
        self.write: Write = lambda record: None
        self.run: Run | None = None
        self.good: dict[str, Tensor] = {}
        self.weights = None if folder is None else folder / BEST

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, its parts before interruptions included."""
        return self.earlier + time.perf_counter() - self.started

    @contextmanager
    def prepared(
        self, train: Iterable[Any], val: Iterable[Any] | None, resume: bool
    ) -> Iterator[Run]:
        """Everything that steps are made with; the newest checkpoint is loaded if wanted."""
        model, teacher, config, accelerator = (
            self.model, self.teacher, self.config, self.accelerator,
        )  # fmt: skip
        if config.channels_last:
            set_layout(model, torch.channels_last)
            if teacher is not None:
                set_layout(teacher, torch.channels_last)
        with ExitStack() as stack:
            trained = stack.enter_context(self._trained())
            if teacher is not None:
                teacher.to(accelerator.device).eval()
            path = snapshot.newest(self.folder) if resume and self.folder is not None else None
            saved = None if path is None else snapshot.read_snapshot(path)
            if saved is not None:
                snapshot.check_same(config, accelerator.num_processes, saved)
                self.at = Position.from_dict(saved["position"])
                self.earlier = self.at.seconds
            self._open_logs(saved is None, stack)

            batches = TrainBatches(train, seed=config.seed, accelerator=accelerator)
            self.val = None if val is None else spread(val, accelerator)
            self.run = run = build_run(
                trained, teacher, batches, config, accelerator, self.write, self.sharding
            )
            self.good = copy_weights(run.result)
            if saved is not None:
                self._load(run, saved)
            else:
                self.write({"kind": "start", "steps": run.total, "config": asdict(config)})
            stack.enter_context(run.objective.watching())
            if run.ramp is not None:
                stack.enter_context(run.ramp.blending())
            yield run

    @contextmanager
    def _trained(self) -> Iterator[nn.Module]:
        """What is trained: the model, or a copy to be sharded while the model is on the CPU."""
        model, device = self.model, self.accelerator.device
        model.train()
        try:
            if self.sharding is None:
                yield model.to(device)
            else:
                yield copy_to_shard(model.cpu(), device)
        finally:
            model.to(device)

    def _hand_over(self, run: Run) -> None:
        """The model gets the weights of the copy, where that is what was trained."""
        if run.sharded:
            self._agree(run)
            restore_weights(self.model, copy_weights(run.model))

    def _agree(self, run: Run) -> None:
        """Norm statistics are the first process's: DDP sees to that before forward passes only."""
        if run.sharded or self.accelerator.num_processes > 1:
            same_buffers(run.model)
            same_buffers(run.result)

    def train(self, run: Run, stop: StopRequest, progress: bool | None) -> None:
        """Train until the last step, with a checkpoint and an accuracy after each epoch."""
        if self.val is not None and self.teacher is not None and self.at.teacher is None:
            self.at.teacher = self._accuracy(self.teacher, lambda: self._stop_if_asked(run, stop))
            self.write({"kind": "teacher", "val": asdict(self.at.teacher)})
        if self.config.on_divergence == "roll_back" and self.at.step == 0:
            self.save(run)
        with progress_bar(run.total, progress) as show:
            show(self.at.step, "")
            while self.at.step < run.total or self.at.batch:
                try:
                    with explained():
                        self._epoch(run, stop, show)
                except DivergedError as diverged:
                    self._diverged(run, diverged)
                except StoppedError:
                    self._hand_over(run)
                    raise
                except BaseException:
                    restore_weights(self.model, self.good)
                    raise
        self._hand_over(run)

    def _epoch(self, run: Run, stop: StopRequest, show: Show) -> None:
        config, at = self.config, self.at
        beside = "" if at.teacher is None else f" (teacher {at.teacher.top1:.1f})"
        reached = at.history[-1].val if at.history else None
        accuracy = "" if reached is None else f"  top-1 {reached.top1:.1f}{beside}"
        told = f"{accuracy}  epoch {at.epoch}"

        def after_step(window: LossWindow) -> None:
            due = config.save_every is not None and at.step % config.save_every == 0
            asked = self._asked(stop, at.step)
            if due or asked:
                window.close()
                path = self.save(run)
                if asked:
                    raise _stopped(path)

        record = train_epoch(
            run, at, show=lambda step, text: show(step, text + told), after_step=after_step
        )
        if self.val is not None:
            try:
                val = self._accuracy(run.result, lambda: self._stop_if_asked(run, stop))
            finally:
                run.objective.student.train()
            record = replace(record, val=val)
        self._agree(run)
        weights = copy_weights(run.result)
        self._check_finite(record, weights)
        if record.val is None or at.best is None or record.val.top1 >= at.best.top1:
            self.good, at.best = weights, record.val
            if self.folder is not None and self.main:
                write_weights(weights, self.folder / BEST)
        at.history.append(record)
        at.next_epoch()
        self.write({"kind": "epoch", **asdict(record)})
        if self.folder is not None:
            if self.main:
                logs.write_epochs(self.folder / logs.EPOCHS, at.history)
            self.save(run)
        _log.info("epoch %d: %s", record.epoch, record)

    def finish(self) -> tuple[Accuracy | None, tuple[str, ...]]:
        """Hand over the average, re-estimate norms, give blocks back; the accuracy of all that."""
        assert self.run is not None
        config, run = self.config, self.run
        last = self.at.history[-1].val
        if run.ema is not None:
            restore_weights(self.model, copy_weights(run.ema.module))
        given_back: tuple[str, ...] = ()
        if config.norm_images:
            self._estimate_norms(run)
            if self.val is not None:
                last = self._accuracy(self.model, lambda: None)
            if last is None or self.at.best is None or last.top1 >= self.at.best.top1:
                self._keep_final(last)
        if config.max_drop is not None and self.teacher is not None and self.at.teacher is not None:
            restore_weights(self.model, self.good)
            last = self.at.best
            assert last is not None
            given_back, last = give_back(
                self.model,
                self.teacher,
                lambda: self._accuracy(self.model, lambda: None),
                now=last,
                wanted=self.at.teacher.top1 - config.max_drop,
            )
            if given_back:
                self._keep_final(last)
        self.write(
            {
                "kind": "end",
                "step": self.at.step,
                "val": None if last is None else asdict(last),
                "given_back": given_back,
            }
        )
        return last, given_back

    def _keep_final(self, accuracy: Accuracy | None) -> None:
        """What was made of the trained weights is the best; those stay, for a continued run."""
        self.good, self.at.best = copy_weights(self.model), accuracy
        if self.folder is not None:
            self.weights = self.folder / FINAL
            if self.main:
                write_weights(self.good, self.weights)
            self.accelerator.wait_for_everyone()  # all read the file next

    def save(self, run: Run) -> Path | None:
        """Write a checkpoint and remove old ones; all processes wait for it."""
        if self.folder is None:
            return None
        path = None
        self._agree(run)
        weights = whole_weights(run.model)
        average = None if run.ema is None else whole_weights(run.ema.module)
        optimizer = whole_state(run.optimizer, keep=self.main)
        if name := non_finite({k: v for k, v in weights.items() if isinstance(v, Tensor)}):
            raise DivergedError(
                f"The weight {name} is no longer finite", self.at.step, self.at.epoch, self.at.lr
            )
        self.at.seconds = self.seconds
        if self.main:
            scaler = self.accelerator.scaler
            path = snapshot.write_snapshot(
                self.folder,
                {
                    "config": asdict(self.config),
                    "processes": self.accelerator.num_processes,
                    "position": self.at.to_dict(),
                    "model": weights,
                    "ema": average,
                    "optimizer": optimizer,
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
                step=self.at.step,
                total=run.total,
            )
            snapshot.prune(self.folder, self.config.keep_last)
        self.accelerator.wait_for_everyone()
        return path

    def _load(self, run: Run, saved: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        self.at = Position.from_dict(saved["position"])
        load_weights(run.model, saved["model"])
        if run.ema is not None:
            load_weights(run.ema.module, saved["ema"])
        load_state(run.optimizer, saved["optimizer"])
        if saved["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        best = None if self.folder is None else self.folder / BEST
        if self.at.history and best is not None and best.exists():
            self.good = load_file(best)

    def _diverged(self, run: Run, diverged: DivergedError) -> None:
        """Go back to the newest checkpoint, or raise."""
        config, at = self.config, self.at
        self.write(
            {
                "kind": "diverged",
                "step": diverged.step,
                "lr": diverged.lr,
                "reason": diverged.reason,
            }
        )
        if config.on_divergence == "roll_back" and at.roll_backs < _MOST_ROLL_BACKS:
            assert self.folder is not None
            path = snapshot.newest(self.folder)
            assert path is not None
            count, factor = at.roll_backs + 1, at.lr_factor / 2
            self._load(run, snapshot.read_snapshot(path))
            self.at.roll_backs, self.at.lr_factor = count, factor
            self.write({"kind": "rolled back", "step": self.at.step, "lr_factor": factor})
            _log.warning(
                "%s at step %d: back to step %d, with %g times the learning rate.",
                diverged.reason, diverged.step, self.at.step, factor,
            )  # fmt: skip
            return
        restore_weights(self.model, self.good)
        where = "its starting weights" if not at.history else "the best weights so far"
        if at.history and self.folder is not None:
            where += f", which are also in {self.folder / BEST}"
        tried = f" after {at.roll_backs} roll-backs" if at.roll_backs else ""
        raise TrainingError(
            f"{diverged.reason} at step {diverged.step} of {run.total} (epoch {diverged.epoch})"
            f"{tried}, with a learning rate of {diverged.lr:.3g}. The model was set back to "
            f"{where}. Try a lower lr, a longer warmup, or mixed_precision='no'."
        ) from None

    def _asked(self, stop: StopRequest, step: int | None = None) -> bool:
        """Whether any process was asked to stop; with several, they agree at lines of the log."""
        if self.accelerator.num_processes == 1:
            return stop.made
        if step is not None and step % self.config.log_every:
            return False
        made = torch.tensor(float(stop.made), device=self.accelerator.device)
        return bool(self.accelerator.reduce(made, "sum") > 0)

    def _stop_if_asked(self, run: Run, stop: StopRequest) -> None:
        if self._asked(stop):
            raise _stopped(self.save(run))

    def _accuracy(self, model: nn.Module, each: Callable[[], None]) -> Accuracy:
        accelerator = self.accelerator
        gather = accelerator.gather_for_metrics if accelerator.num_processes > 1 else None
        assert self.val is not None
        if gather is not None:
            same_buffers(model)
        with accelerator.autocast():
            return score(
                model,
                self.val,
                channels_last=self.config.channels_last,
                gather=gather,
                each=each,
            )

    def _estimate_norms(self, run: Run) -> None:
        def images() -> Iterator[Tensor]:
            seen = 0
            for batch in run.batches.start(self.at.epoch, 0):
                given = images_of(batch)
                yield given
                seen += len(given)
                if seen >= self.config.norm_images:
                    return

        recalibrate(self.model, images())
        if self.accelerator.num_processes > 1:
            same_buffers(self.model)

    def _check_finite(self, record: EpochRecord, weights: dict[str, Tensor]) -> None:
        reason = None
        if name := non_finite(weights):
            reason = f"The weight {name} is no longer finite"
        elif record.val is not None and not math.isfinite(record.val.loss):
            reason = f"The validation loss is {record.val.loss}"
        if reason is not None:
            raise DivergedError(reason, record.step, record.epoch, record.lr)

    def _open_logs(self, anew: bool, stack: ExitStack) -> None:
        folder = self.folder
        if folder is None or not self.main:
            return
        for name in (BEST, FINAL, logs.LOG, logs.EPOCHS):
            remove_remains(folder, name)
        if anew:
            snapshot.remove_all(folder)
            for name in (BEST, FINAL, logs.LOG, logs.EPOCHS):
                (folder / name).unlink(missing_ok=True)
        else:
            logs.cut_log(folder / logs.LOG, self.at.step)
        write_config(self.config, folder / _CONFIG)
        writers = (
            logs.json_lines(folder / logs.LOG),
            stack.enter_context(logs.board(folder / logs.BOARD, self.at.step)),
            logs.tracker(self.accelerator, self.config),
        )

        def write(record: dict[str, Any]) -> None:
            for write_one in writers:
                write_one(record)

        self.write = write


def _stopped(path: Path | None) -> StoppedError:
    return StoppedError("a checkpoint" if path is None else str(path))
