"""FSDP: two processes over gloo, each with half of the model, train as they do without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from pfsurgery import load
from pfsurgery.digits import digits
from pfsurgery.errors import TrainingError
from pfsurgery.recover import FinetuneConfig, finetune
from tests import test_cli
from tests.test_cli_finetune import BASE, OPTIONS, flags

folder = test_cli.folder

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/imagenet/fsdp.yaml"

START = """
import json, os, signal, sys
from pathlib import Path
import timm, torch
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset
import pfsurgery
from pfsurgery.digits import digits
from pfsurgery.errors import TrainingError
from pfsurgery.recover import FinetuneConfig, finetune

data, out, rank = digits(), Path(sys.argv[1]), int(os.environ["RANK"])
few = TensorDataset(*(tensor[:61] for tensor in data.val.tensors))

def sharded(wanted):
    os.environ["ACCELERATE_USE_FSDP"] = str(wanted).lower()

def is_plain(model):
    return not any(isinstance(value, DTensor) for value in model.state_dict().values())

def keep(name, model):
    assert is_plain(model) and type(model).__module__.startswith("timm"), type(model)
    torch.save(dict(model.state_dict()), out / f"{name}-{rank}.pt")

def converted(kind="test_resnet", **kwargs):
    torch.manual_seed(rank)  # only the first process's weights count
    teacher = timm.create_model(kind, num_classes=10, **kwargs).eval()
    model = pfsurgery.convert(teacher, "maxpool_all", example=torch.zeros(1, 3, 32, 32))
    torch.manual_seed(0)
    teacher = timm.create_model(kind, num_classes=10, **kwargs).eval()
    return model, teacher
"""


def launch(folder: Path, job: str) -> None:
    """Run a job in two processes."""
    (folder / "job.py").write_text(START + job)
    accelerate(folder / "job.py", folder)


def accelerate(*command: object) -> None:
    """Run a command in two processes with the example's settings, in smaller units."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLE)),
            *("--num_processes=2", "--main_process_port=0", "--fsdp_min_num_params=20000"),
            *map(str, command),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


def difference(one: Path, other: Path) -> float:
    """The largest one between two files of weights."""
    first, second = (torch.load(path) for path in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="would need a GPU for each process")

AS_WITHOUT = """
for wanted in (True, False):
    sharded(wanted)
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=10)
    config = FinetuneConfig(batch_size=8, max_steps=20, log_every=1, optimizer="sgd", lr=0.1)
    result = finetune(model, train=data.train, val=few, config=config, out=out / str(wanted))
    assert result.last.images == 61  # an odd number: one is seen twice, and counted once
    keep(str(wanted), model)
"""


@no_gpu
def test_two_processes_train_as_with_whole_models_and_as_one(tmp_path):
    launch(tmp_path, AS_WITHOUT)
    torch.manual_seed(0)
    model, data = timm.create_model("test_convnext", num_classes=10), digits()
    config = FinetuneConfig(batch_size=16, max_steps=20, log_every=1, optimizer="sgd", lr=0.1)
    finetune(model, train=data.train, config=config, out=tmp_path / "one")
    alone = losses(tmp_path / "one")
    for name in ("True", "False"):
        assert losses(tmp_path / name) == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.05
    assert difference(tmp_path / "True-0.pt", tmp_path / "True-1.pt") == 0.0
    assert difference(tmp_path / "True-0.pt", tmp_path / "False-0.pt") < 1e-5
    best = timm.create_model("test_convnext", num_classes=10)
    timm.models.load_checkpoint(best, str(tmp_path / "True" / "best.safetensors"))
    kept = torch.load(tmp_path / "True-0.pt")
    assert all(torch.equal(kept[name], value) for name, value in best.state_dict().items())


# Everything that holds a state, and everything that looks into the model.
CONTINUED = """
EVERYTHING = dict(
    epochs=2, batch_size=8, save_every=3, log_every=1, accumulate=2, ema=0.9,
    mixup=0.3, match_weight=0.5, stage_weight=0.2, freeze=0.3, ramp=0.5, changed_lr=3.0,
    layer_decay=0.9, norm_images=64, kd_weight=0.6, max_drop=100.0,
)
train = TensorDataset(*(tensor[:100] for tensor in data.train.tensors))

class Stopping(TensorDataset):
    left = 70
    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)

def run(name, images, resume=False):
    model, teacher = converted(drop_rate=0.2)
    config = FinetuneConfig(**EVERYTHING)
    try:
        finetune(model, train=images, val=few, teacher=teacher, config=config,
                 out=out / name, resume=resume)
    except TrainingError as error:
        assert "Stopped on request" in str(error), error
        keep(f"{name}-stopped", model)
        return
    keep(name, model)

sharded(False)
run("without", train)
sharded(True)
run("whole", train)
run("continued", Stopping(*train.tensors))
assert (out / f"continued-stopped-{rank}.pt").exists()
run("continued", train, resume=True)
"""


@no_gpu
def test_a_stopped_run_is_continued_as_if_nothing_had_happened(tmp_path):
    launch(tmp_path, CONTINUED)
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "continued") == whole
    assert losses(tmp_path / "without") == pytest.approx(whole, abs=1e-4)
    assert len(whole) == 6
    for rank in (0, 1):
        assert difference(tmp_path / "whole-0.pt", tmp_path / f"continued-{rank}.pt") == 0.0
    assert difference(tmp_path / "without-0.pt", tmp_path / "whole-0.pt") < 1e-3
    stopped = [tmp_path / f"continued-stopped-{rank}.pt" for rank in (0, 1)]
    assert difference(*stopped) == 0.0
    kept = [
        torch.load(max((tmp_path / name / "checkpoints").iterdir()))
        for name in ("without", "whole")
    ]
    assert [checkpoint.keys() for checkpoint in kept] == [kept[0].keys()] * 2
    first, second = (checkpoint["optimizer"]["state"] for checkpoint in kept)
    assert first.keys() == second.keys()
    assert all(
        first[place][name].shape == value.shape
        for place, entries in second.items()
        for name, value in entries.items()
    )


OTHERS = """
import torch.nn.functional as F

def both(name, make, images, **settings):
    for wanted in (True, False):
        sharded(wanted)
        model, teacher = make()
        config = FinetuneConfig(**{"batch_size": 8, "max_steps": 6, "log_every": 1, **settings})
        finetune(model, train=images, val=few, teacher=teacher, config=config,
                 out=out / f"{name} {wanted}")
        keep(f"{name} {wanted}", model)

def vit():
    torch.manual_seed(0)
    model, teacher = (timm.create_model("test_vit", num_classes=10, img_size=32) for _ in "12")
    return model, teacher.eval()

class InPlace(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.one, self.two = (torch.nn.Identity(), torch.nn.Linear(96, 200),
                                        torch.nn.Linear(200, 200))
    def forward(self, x):
        return self.two(F.relu(self.one(x))).view(-1, 200)

class Views(torch.nn.Module):
    # Its blocks give views, which are changed in place.
    def __init__(self):
        super().__init__()
        self.block, self.head = InPlace(), torch.nn.Linear(200, 10)
    def forward(self, x):
        x = self.block(x.flatten(1, 2).transpose(1, 2))
        return self.head(x.relu_().view(-1, 32, 200).mean(1))

class Reads(Views):
    def forward(self, x):
        x = F.linear(x.flatten(1, 2).transpose(1, 2), self.block.one.weight)
        return self.head(x.mean(1))

Views.__module__ = "timm"

def views(kind=Views):
    torch.manual_seed(0)
    return kind(), None

train = data.train

def fails(error, model, told, **settings):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"batch_size": 8, "log_every": 1, "warmup": 0.0, **settings}
    try:
        finetune(model, train=settings.pop("train", train), config=FinetuneConfig(**settings),
                 out=out / f"fails {told}")
    except error as found:
        assert told in str(found), found
    else:
        raise AssertionError(told)
    assert is_plain(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"
both("bf16", converted, train, mixed_precision="bf16", optimizer="momentum", lr=0.01)
os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Block,PatchEmbed"
both("vit", vit, train, optimizer="adam")
sharded(True)
fails(TrainingError, views()[0], "no module of that class")
os.environ["FSDP_AUTO_WRAP_POLICY"] = "SIZE_BASED_WRAP"
both("views", views, train, optimizer="sgd", lr=0.1)
both("last", converted, train, channels_last=True, max_drop=0.0, accumulate=2, optimizer="sgd")

sharded(True)
fails(TrainingError, views(Reads)[0], "without calling it")
fails(TrainingError, vit()[0], "after 5 roll-backs",
      on_divergence="roll_back", optimizer="sgd", lr=1e20, max_steps=8)

class Interrupt(Exception):
    pass

class Broken(TensorDataset):
    left = 30
    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise Interrupt("broken")
        return super().__getitem__(index)

fails(Interrupt, vit()[0], "broken", train=Broken(*train.tensors))
model = vit()[0]
model.scale = torch.nn.Parameter(torch.tensor(1.0))
fails(TrainingError, model, "scale has no dimensions")

# What was begun with FSDP goes on without it.
part = TensorDataset(*(tensor[:64] for tensor in train.tensors))
for name, begun in (("begun with", True), ("begun without", False)):
    for images, wanted, resume in (
        (Broken(*part.tensors), begun, False), (part, not begun, True)
    ):
        sharded(wanted)
        torch.manual_seed(0)
        model = timm.create_model("test_convnext", num_classes=10)
        config = FinetuneConfig(batch_size=8, epochs=1, save_every=2, log_every=1)
        try:
            finetune(model, train=images, config=config, out=out / name, resume=resume)
        except Interrupt:
            assert not resume
"""


@no_gpu
@pytest.mark.slow
def test_other_models_settings_and_errors(tmp_path):
    launch(tmp_path, OTHERS)
    for name, most in (("vit", 1e-5), ("bf16", 1e-3), ("views", 1e-5), ("last", 1e-4)):
        whole = losses(tmp_path / f"{name} False")
        assert losses(tmp_path / f"{name} True") == pytest.approx(whole, abs=most), name
    assert len(losses(tmp_path / "begun with")) == 4
    begun_without = losses(tmp_path / "begun without")
    assert losses(tmp_path / "begun with") == pytest.approx(begun_without, abs=1e-5)


@no_gpu
@pytest.mark.slow
def test_the_command_line_with_every_setting(folder, tmp_path):
    settings = {**OPTIONS, "compile": "no"}
    run = (*BASE, "--policy", "maxpool_deep", "--workers", 0, *flags(settings))
    accelerate("-m", "pfsurgery.cli", *run, "--data", folder, "--out", tmp_path / "run")
    assert "maxpool_deep" in (tmp_path / "run" / "report.md").read_text()
    model = load(tmp_path / "run" / "model")
    assert type(model).__name__ == "ResNet"
    assert (tmp_path / "run" / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("asked", "settings", "told"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, {}, "has to be true or false"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fsdp_activation_checkpointing: false"),
        ({"FSDP_IGNORED_MODULES": "fc"}, {}, "fsdp_ignored_modules"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism_config"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "dynamo_config"),
        ({}, {"compile": "inductor"}, "compile='no'"),
        ({}, {"optimizer": "lamb"}, "sgd, momentum, adam, adamw"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_training(monkeypatch, asked, settings, told):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **asked}.items():
        monkeypatch.setenv(name, value)
    model = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(TrainingError, match=told):
        finetune(model, train=digits().train, config=FinetuneConfig(**settings))
