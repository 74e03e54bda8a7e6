"""Networks trained from scratch, one after another; what is done is not done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfsurgery.batches import Images
from pfsurgery.errors import TrainingError
from pfsurgery.measure import count, latency
from pfsurgery.recover import evaluate, finetune
from pfsurgery.recover.logs import cut_log, json_lines, parsed_lines
from pfsurgery.recover.state import placement
from pfsurgery.recover.stop import StoppedError
from pfsurgery.run_folder import SETTING, Kind, check_same, note_run
from pfsurgery.study.images import AugmentedBatches, StudyImages
from pfsurgery.study.setting import StudySetting

TRAININGS = "trainings.jsonl"
_UNFINISHED = "unfinished"
_BATCH = 32  # images that are timed together


class StudyStoppedError(StoppedError):
    """The study was asked to end (SIGTERM), and saved where it was."""

    def __init__(self) -> None:
        TrainingError.__init__(
            self, "Stopped on request; all is saved. Give the same command again to go on."
        )


class Trainings:
    """The trainings of one study, and the file that says which of them are done.

    Args:
        out: Folder of the study.
        kind: Which study.
        setting: What it is made with.
        images: What it trains on.
        data: Names of the training and the validation images.

    Raises:
        SurgeryError: The folder cannot be written, or holds another study or setting.
    """

    def __init__(
        self,
        out: Path,
        kind: Kind,
        setting: StudySetting,
        images: StudyImages,
        data: tuple[str, str],
    ) -> None:
        self.out, self.setting, self.images = out, setting, images
        self.described = {
            "data": data[0] if data[0] == data[1] else " and ".join(data),
            "classes": images.classes,
            **setting.to_dict(),
            "images": len(images.train),
            "val_images": len(images.val),
        }
        check_same(self.out / SETTING, {"study": kind, **self.described}, free=("seeds",))
        note_run(self.out, kind)
        cut_log(self.out / TRAININGS, 0)
        self._write = json_lines(self.out / TRAININGS)
        self._done = self._taken_up()

    @property
    def example(self) -> Tensor:
        """One image (1, C, H, W)."""
        return self.images.train.pixels[:1]

    def top1(self, name: str, make: Callable[[], nn.Module], seed: int) -> float:
        """Top-1 of a network in percent, trained from scratch unless that was done before.

        Args:
            name: Of the training, in the study.
            make: Makes the network with fresh weights.
            seed: Of the order of the images and their augmentation.

        Raises:
            TrainingError: The training diverged; the message names it.
        """
        if name in self._done:
            return self._done[name]
        setting, images = self.setting, self.images
        folder, model = self.out / _UNFINISHED / name, make()
        try:
            folder.parent.mkdir(exist_ok=True)
            finetune(
                model,
                train=AugmentedBatches(images.train, setting.batch_size, flip=images.flip),
                config=setting.training(seed),
                out=folder,
                resume=True,
                progress=False,
            )
        except StoppedError:
            raise StudyStoppedError from None
        except TrainingError as error:
            raise TrainingError(f"Training {name}: {error}") from error
        reached = evaluate(model, self.val_batches()).top1
        self._write({"name": name, "top1": reached})
        self._done[name] = reached
        shutil.rmtree(folder, ignore_errors=True)
        return reached

    def val_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The validation images in batches."""
        val = self.images.val
        return list(zip(torch.split(val.pixels, 256), torch.split(val.labels, 256), strict=True))

    def costs(self, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """Parameters, MACs of one image, and ms of a batch of 32, timed in turns, by name."""
        counts = {name: count(model, self.example) for name, model in models.items()}
        device = placement(next(iter(models.values())))[0]
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator() or device
        moved = {name: model.to(device) for name, model in models.items()}
        batch = self.example.expand(_BATCH, -1, -1, -1).to(device)
        times = latency(moved, batch, repeats=30, warmup=5, memory_format="channels_last")
        return {
            name: {
                "params": counts[name].parameters,
                "macs": counts[name].macs,
                "ms": round(times[name].median_ms, 4),
            }
            for name in models
        }

    def _taken_up(self) -> dict[str, float]:
        """Top-1 of what is done, by name."""
        return dict(
            parsed_lines(
                self.out / TRAININGS,
                lambda entry: (str(entry["name"]), float(entry["top1"])),
                "a finished training",
            )
        )


def name_of(source: Images | str | Path) -> str:
    """What images are called in a setting."""
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__
