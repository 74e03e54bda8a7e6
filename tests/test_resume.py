"""Nothing is lost: runs that are killed, stopped, out of disk space or diverging."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pfsurgery
from pfsurgery.data import open_data
from pfsurgery.digits import digits
from pfsurgery.errors import DataError, TrainingError
from pfsurgery.recover import FinetuneConfig, finetune, snapshot

# Everything that holds a state: dropout, averages, momentum, mixing, a ramp, matched blocks.
EVERYTHING = {
    "epochs": 2,
    "batch_size": 16,
    "max_steps": 11,
    "save_every": 3,
    "ema": 0.9,
    "mixup": 0.3,
    "cutmix": 0.3,
    "match_weight": 0.5,
    "freeze": 0.3,
    "ramp": 0.5,
    "changed_lr": 3.0,
    "accumulate": 2,
    "norm_images": 64,
    "kd_weight": 0.6,
}

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(
    ["tests.test_resume", "accelerate", "timm.optim", "timm.scheduler", "torch.utils.tensorboard"]
)


def job(out: Path, images: Path, settings: dict[str, Any], workers: int) -> None:
    """A run in a process of its own, continued if it was begun; `out` tells how it ended."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = {"input_size": (3, 32, 32)}
    teacher = timm.create_model(
        "test_resnet", num_classes=10, drop_rate=0.2, pretrained_cfg_overlay=small
    ).eval()
    model = pfsurgery.convert(teacher, "maxpool_all", example=torch.zeros(1, 3, 32, 32))
    data = open_data(images, model, batch_size=16, workers=workers)
    val = TensorDataset(*(tensor[:64] for tensor in digits().val.tensors))
    config = FinetuneConfig(**settings)
    (out / "ready").touch()
    try:
        result = finetune(
            model, train=data.train, val=val, teacher=teacher, config=config, out=out, resume=True
        )
    except Exception as error:
        (out / "error").write_text(f"{type(error).__name__}: {error}")
        raise
    losses = [entry.loss for entry in result.history]
    torch.save({"weights": model.state_dict(), "losses": losses}, out / "end.pt")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ten classes of small images, so that reading augments them."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, number in (("train", 28), ("val", 1)):
        for name in range(10):
            where = root / part / f"class{name}"
            where.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{i}.png")
    return root


def start(folder: Path, images: Path, settings: dict[str, Any], workers: int = 0) -> Any:
    """A process that has begun to train."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ready", "error"):
        (folder / name).unlink(missing_ok=True)
    process = START.Process(target=job, args=(folder, images, settings, workers))
    process.start()
    while process.is_alive() and not (folder / "ready").exists():
        time.sleep(0.01)
    return process


def finished(process: Any, folder: Path) -> None:
    process.join(timeout=240)
    error = folder / "error"
    assert process.exitcode == 0, error.read_text() if error.exists() else process.exitcode


def same_end(one: Path, other: Path) -> bool:
    first, second = (torch.load(path / "end.pt") for path in (one, other))
    return first["losses"] == second["losses"] and all(
        torch.equal(first["weights"][name], weight) for name, weight in second["weights"].items()
    )


def killed_and_continued(folder: Path, images: Path, kills: int, seed: int) -> None:
    """Kill the run with SIGKILL at random moments, then let it end."""
    generator = random.Random(seed)
    for _ in range(kills):
        process = start(folder, images, EVERYTHING)
        time.sleep(generator.uniform(0.05, 1.5))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    finished(start(folder, images, EVERYTHING), folder)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finished(start(folder, images, EVERYTHING), folder)
    return folder


def test_killed_twice_and_continued_is_bit_equal(images, uninterrupted, tmp_path):
    killed_and_continued(tmp_path, images, kills=2, seed=1)
    assert same_end(uninterrupted, tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == [
        "step-00000009-of-00000011.pt",
        "step-00000011-of-00000011.pt",
    ]
    records = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (uninterrupted, tmp_path)
    ]
    losses = [[r["loss"] for r in log if r["kind"] == "step"] for log in records]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_twenty_times_in_all(images, uninterrupted, tmp_path, seed):
    killed_and_continued(tmp_path, images, kills=5, seed=100 + seed)
    assert same_end(uninterrupted, tmp_path)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(images, uninterrupted, tmp_path):
    finished(start(tmp_path, images, EVERYTHING, workers=2), tmp_path)
    assert same_end(uninterrupted, tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_to_all_processes_saves_and_ends(images, uninterrupted, tmp_path, workers):
    settings = {**EVERYTHING, "save_every": 1000}
    process = start(tmp_path, images, settings, workers)
    log = tmp_path / "log.jsonl"
    begun = '"step"' if workers else '"teacher"'
    while process.is_alive() and begun not in (log.read_text() if log.exists() else ""):
        time.sleep(0.01)
    readers = psutil.Process(process.pid).children(recursive=True)
    assert len(readers) >= workers
    for each in (*readers, process):  # as torchrun and clusters do
        each.terminate()
    process.join()
    assert process.exitcode == 1
    error = (tmp_path / "error").read_text()
    assert error.startswith("StoppedError")
    assert "--resume" in error
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 1
    finished(start(tmp_path, images, settings), tmp_path)
    assert same_end(uninterrupted, tmp_path)


def small() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    tensors = digits().train.tensors
    model = timm.create_model("test_convnext", num_classes=10, drop_rate=0.1)
    return model, TensorDataset(*(tensor[:64] for tensor in tensors))


class Interrupt(Exception):
    pass


class Broken(TensorDataset):
    """Images that end in an error after so many were read."""

    def __init__(self, data: TensorDataset, readable: int) -> None:
        super().__init__(*data.tensors)
        self.left = readable

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.left -= 1
        if self.left < 0:
            raise Interrupt
        return super().__getitem__(index)


class Asking:
    """Validation batches whose first reader is asked to end, as by a cluster."""

    def __init__(self, data: TensorDataset) -> None:
        self.batches, self.asked = list(DataLoader(data, 16)), False

    def __iter__(self) -> Iterator[Any]:
        if not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)
        yield from self.batches


CONFIG = FinetuneConfig(epochs=2, batch_size=16, save_every=2, ema=0.9)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: data,
        lambda data: DataLoader(data, 16, shuffle=True),
        lambda data: DataLoader(
            data, 16, sampler=torch.utils.data.WeightedRandomSampler([1.0] * 64, 64)
        ),
        lambda data: DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(5)),
    ],
    ids=["data set", "loader", "sampler of the user's", "generator of the user's"],
)
def test_any_source_can_be_continued(wrap, tmp_path):
    model, data = small()
    finetune(model, train=wrap(data), config=CONFIG, out=tmp_path / "whole")
    expected = model.state_dict()

    model, data = small()
    with pytest.raises(Interrupt):
        finetune(model, train=wrap(Broken(data, 85)), config=CONFIG, out=tmp_path / "run")
    torch.manual_seed(99)
    model, data = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = finetune(model, train=wrap(data), config=CONFIG, out=tmp_path / "run", resume=True)
    assert [entry.step for entry in result.history] == [4, 8]
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())


def test_a_run_ends_while_the_teacher_is_measured(tmp_path):
    assert threading.current_thread() is threading.main_thread()  # others do not see the signal
    model, data = small()
    teacher, out = copy.deepcopy(model), tmp_path / "run"
    given = {"train": data, "teacher": teacher, "config": CONFIG}
    whole = finetune(model, val=data, out=tmp_path / "whole", **given)
    expected = model.state_dict()

    model, _ = small()
    with pytest.raises(TrainingError, match="--resume"):
        finetune(model, val=Asking(data), out=out, **given)
    kept = [path.name for path in (out / "checkpoints").iterdir()]
    assert kept == ["step-00000000-of-00000008.pt"]
    result = finetune(model, val=data, out=out, resume=True, **given)
    assert [entry.loss for entry in result.history] == [entry.loss for entry in whole.history]
    assert result.teacher == whole.teacher
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())


def test_a_finished_run_that_is_continued_gives_its_result_again(tmp_path):
    model, data = small()
    first = finetune(model, train=data, val=data, config=CONFIG, out=tmp_path)
    weights = model.state_dict()
    model, data = small()
    again = finetune(model, train=data, val=data, config=CONFIG, out=tmp_path, resume=True)
    assert (again.history, again.best) == (first.history, first.best)
    assert again.last == first.last
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_changed_setting_is_named(tmp_path):
    model, data = small()
    finetune(model, train=data, config=dataclasses.replace(CONFIG, max_steps=3), out=tmp_path)
    changed = dataclasses.replace(CONFIG, lr=0.5, max_steps=3)
    with pytest.raises(TrainingError, match=r"lr \(then 0.001, now 0.5\)") as caught:
        finetune(model, train=data, config=changed, out=tmp_path, resume=True)
    assert "max_steps" not in str(caught.value)


def test_a_run_that_is_not_finished_is_not_overwritten(tmp_path):
    model, data = small()
    with pytest.raises(Interrupt):
        finetune(model, train=Broken(data, 50), config=CONFIG, out=tmp_path)
    with pytest.raises(TrainingError, match="--resume"):
        finetune(model, train=data, config=CONFIG, out=tmp_path)


def test_a_run_that_ended_in_its_last_validation_is_not_finished(tmp_path):
    model, data = small()
    config = dataclasses.replace(CONFIG, epochs=1)
    with pytest.raises(TrainingError, match="--resume"):
        finetune(model, train=data, val=Asking(data), config=config, out=tmp_path)
    with pytest.raises(TrainingError, match="not finished"):
        finetune(model, train=data, val=data, config=config, out=tmp_path)
    result = finetune(model, train=data, val=data, config=config, out=tmp_path, resume=True)
    assert result.best is not None
    finetune(model, train=data, val=data, config=config, out=tmp_path)  # now it is


def test_a_run_that_begins_anew_keeps_nothing_of_an_earlier_one(tmp_path):
    model, data = small()
    for name in ("best.safetensors", "final.safetensors", ".best.safetensors.k1lled"):
        (tmp_path / name).write_bytes(b"of an earlier run")
    with pytest.raises(Interrupt):
        finetune(model, train=Broken(data, 8), config=CONFIG, out=tmp_path)
    assert not list(tmp_path.glob("*.safetensors*"))
    assert not list(tmp_path.glob(".*.safetensors*"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, data = small()
    finetune(model, train=data, config=CONFIG, out=tmp_path)
    other = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(TrainingError, match="another model"):
        finetune(other, train=data, config=CONFIG, out=tmp_path, resume=True)


def test_a_broken_checkpoint_is_named(tmp_path):
    model, data = small()
    finetune(model, train=data, config=CONFIG, out=tmp_path)
    last = max((tmp_path / "checkpoints").iterdir())
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=f"{last.name} cannot be read"):
        finetune(model, train=data, config=CONFIG, out=tmp_path, resume=True)
    last.unlink()
    assert finetune(model, train=data, config=CONFIG, out=tmp_path, resume=True).steps == 8


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files makes writes fail as a full disk does, with half written."""
    config = dataclasses.replace(CONFIG, max_steps=2)
    model, data = small()
    finetune(model, train=data, config=config, out=tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    size = max(len(content) for content in before.values())

    longer = dataclasses.replace(CONFIG, max_steps=4)
    saved = torch.load(next(iter(before)))
    saved["config"]["max_steps"] = 4
    old = next(iter(before))
    torch.save(saved, old.with_name("step-00000002-of-00000004.pt"))
    old.unlink()
    kept = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))
    try:
        with pytest.raises(TrainingError, match="intact") as caught:
            finetune(model, train=data, config=longer, out=tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "Make room" in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == kept
    assert finetune(model, train=data, config=longer, out=tmp_path, resume=True).steps == 4


def write_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    for step in range(10**6):
        weights = {"weight": torch.full((10**6,), float(step))}
        snapshot.write_snapshot(folder, {"model": weights}, step=step, total=10**6)
        snapshot.prune(folder, 2)


def test_a_kill_in_the_middle_of_a_write_leaves_whole_checkpoints(tmp_path):
    generator = random.Random(0)
    remains = 0
    for _ in range(6):
        process = START.Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        while process.is_alive() and snapshot.newest(tmp_path) is None:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.3))
        process.kill()
        process.join()
        for path in (tmp_path / "checkpoints").glob("step-*.pt"):
            step = float(path.name.split("-")[1])
            weight = snapshot.read_snapshot(path)["model"]["weight"]
            assert bool((weight == step).all())
            path.unlink()
        remains += len(list((tmp_path / "checkpoints").iterdir()))
    assert remains, "no kill hit a write; lengthen the test"


def test_remains_of_killed_writes_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    remains = tmp_path / "checkpoints" / ".step-00000002-of-00000008.pt.abcd"
    remains.write_bytes(b"half")
    model, data = small()
    finetune(model, train=data, config=CONFIG, out=tmp_path, resume=True)
    assert not remains.exists()


class Poisoned:
    """Batches of which one is NaN while the learning rate is too high for them."""

    def __init__(self, data: TensorDataset, model: nn.Module) -> None:
        self.images, self.labels = data.tensors
        self.visits = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        self.visits += 1
        for index in range(4):
            images = self.images[index * 16 : index * 16 + 16].clone()
            if self.visits <= 2 and index == 2:
                images[0] = float("nan")
            yield images, self.labels[index * 16 : index * 16 + 16]


def test_rolls_back_with_half_the_rate(tmp_path):
    model, data = small()
    config = FinetuneConfig(
        epochs=1, save_every=1, on_divergence="roll_back", log_every=1, lr=1e-3, warmup=0.0
    )
    result = finetune(model, train=Poisoned(data, model), config=config, out=tmp_path)
    assert result.steps == 4
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    backs = [(r["step"], r["lr_factor"]) for r in records if r["kind"] == "rolled back"]
    assert backs == [(2, 0.5), (2, 0.25)]
    rates = {r["step"]: r["lr"] for r in records if r["kind"] == "step"}
    cosine = [1e-3 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert rates[3] == pytest.approx(0.25 * cosine[2])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_rolling_back_ends(tmp_path):
    model, data = small()
    config = FinetuneConfig(on_divergence="roll_back", optimizer="sgd", lr=1e20, batch_size=16)
    with pytest.raises(TrainingError, match="after 5 roll-backs"):
        finetune(model, train=data, config=config, out=tmp_path)


def test_an_exploding_loss_stops(tmp_path):
    model, data = small()
    config = FinetuneConfig(
        optimizer="sgd", lr=300.0, batch_size=16, warmup=0.9, log_every=1, explosion=3.0, epochs=20
    )
    with pytest.raises(TrainingError, match="The loss rose to"):
        finetune(model, train=data, config=config, out=tmp_path)


def test_what_needs_a_folder_says_so():
    model, data = small()
    for settings, resume in (
        ({"save_every": 3}, False),
        ({"on_divergence": "roll_back"}, False),
        ({}, True),
    ):
        with pytest.raises(TrainingError, match="give out"):
            finetune(model, train=data, config=FinetuneConfig(**settings), resume=resume)


def test_an_unreadable_part_is_an_error_of_the_data(images):
    config = FinetuneConfig(auto_augment="sharpen9")
    model = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(DataError, match="no augmentation 'sharpen9'"):
        finetune(model, train=images, config=config)


def test_best_weights_are_whole(uninterrupted):
    weights = load_file(uninterrupted / "best.safetensors")
    model = pfsurgery.convert(
        timm.create_model("test_resnet", num_classes=10),
        "maxpool_all",
        example=torch.zeros(1, 3, 32, 32),
    )
    model.load_state_dict(weights)
