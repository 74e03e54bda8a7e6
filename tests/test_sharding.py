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

from pfsurgery.data import digits
from pfsurgery.errors import TrainingError
from pfsurgery.recover import FinetuneConfig, finetune

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/imagenet/fsdp.yaml"

START = """
import json, os, signal, sys
from pathlib import Path
import timm, torch
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset
import pfsurgery
from pfsurgery.data import digits
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


def launch(folder: Path, job: str, *options: str) -> None:
    """Run a job in two processes with the example's settings, in smaller units."""
    (folder / "job.py").write_text(START + job)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLE)),
            *("--num_processes=2", "--main_process_port=0", "--fsdp_min_num_params=20000"),
            *(*options, str(folder / "job.py"), str(folder)),
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


@pytest.mark.parametrize(
    ("asked", "settings", "told"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
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
