from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pfsurgery.digits import digits
from pfsurgery.errors import DataError, SlowWarning, SurgeryError, TrainingError, UnknownNameError
from pfsurgery.recover import FinetuneConfig, evaluate, finetune
from pfsurgery.recover.distill import kd_loss, recovery_loss
from pfsurgery.recover.state import write_weights

TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
SHORT = FinetuneConfig(batch_size=32, max_steps=4, warmup=0.0)


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


def few(dataset: TensorDataset, number: int = 96) -> TensorDataset:
    return TensorDataset(*(tensor[:number] for tensor in dataset.tensors))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_kd_loss_is_the_divergence_times_the_squared_temperature():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = F.softmax(teacher / 3, -1), F.softmax(student / 3, -1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    assert torch.allclose(kd_loss(student, teacher, temperature=3), expected, atol=1e-6)
    assert kd_loss(student, student + 2, temperature=3).abs() < 1e-6


def test_recovery_loss_mixes_both_shares():
    student, teacher, labels = torch.randn(5, 7), torch.randn(5, 7), torch.arange(5)
    mixed = recovery_loss(student, labels, teacher, temperature=2, kd_weight=0.25)
    hard, soft = F.cross_entropy(student, labels), kd_loss(student, teacher, temperature=2)
    assert torch.allclose(mixed, 0.75 * hard + 0.25 * soft)
    assert torch.equal(recovery_loss(student, labels), hard)
    assert torch.equal(recovery_loss(student, None, teacher, temperature=2, kd_weight=1), soft)
    with pytest.raises(ValueError, match="labels"):
        recovery_loss(student, None, teacher)


def test_evaluate_counts_by_hand(model, data):
    part = few(data.val, 70)
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    accuracy = evaluate(model, part, batch_size=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    with torch.no_grad():
        logits = model.eval()(part.tensors[0])
    labels = part.tensors[1]
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    assert accuracy.images == 70
    assert accuracy.top1 == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert accuracy.top5 == pytest.approx(100 * float(top5))
    assert accuracy.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)


def test_learns_digits_and_leaves_a_log_and_weights(model, data, tmp_path):
    before = evaluate(model, data.val)
    # as evaluate reads images: in another layout, losses are rounded in another order
    config = FinetuneConfig(epochs=2, batch_size=32, lr=3e-3, channels_last=False)
    model.conv1.eval()
    flags = [module.training for module in model.modules()]
    result = finetune(model, train=data.train, val=data.val, config=config, out=tmp_path / "run")

    assert result.last is not None
    assert result.last.top1 > before.top1 + 30
    assert result.last.loss < before.loss
    assert evaluate(model, data.val, batch_size=32) == result.last
    assert result.steps == 2 * (len(data.train) // 32)
    assert str(result).startswith(f"{result.steps} steps in ")
    assert str(result).endswith(f" s, top-1 {result.last.top1:.2f} %")
    assert [module.training for module in model.modules()] == flags
    assert "forward" not in vars(model)

    records = lines(tmp_path / "run")
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "start"
    assert kinds.count("epoch") == 2
    assert records[-1]["kind"] == "end"
    assert records[-1]["val"]["top1"] == result.last.top1
    table = (tmp_path / "run" / "epochs.csv").read_text().splitlines()
    assert table[0] == "epoch,step,loss,lr,images_per_s,top1,top5,val_loss"
    assert [row.split(",")[5] for row in table[1:]] == [
        str(entry.val.top1) for entry in result.history if entry.val
    ]
    steps = [record for record in records if record["kind"] == "step"]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert steps[0]["lr"] < 3e-3
    assert steps[-1]["lr"] < 1e-4
    assert result.weights is not None
    best = copy.deepcopy(model)
    best.load_state_dict(load_file(result.weights))
    assert evaluate(best, data.val, batch_size=32) == result.best
    assert sorted(path.name for path in result.weights.parent.iterdir()) == [
        "best.safetensors",
        "checkpoints",
        "config.yaml",
        "epochs.csv",
        "log.jsonl",
        *(["tensorboard"] if TENSORBOARD else []),
    ]


def test_distillation_alone_needs_no_labels(model, data):
    teacher = timm.create_model("test_efficientnet", num_classes=10, drop_rate=0.5)
    with torch.no_grad():
        teacher.classifier.weight *= 30
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    batches = list(data.train.tensors[0][:320].split(32))
    config = FinetuneConfig(epochs=2, kd_weight=1.0, lr=3e-3)

    teacher.train()
    result = finetune(model, train=batches, teacher=teacher, config=config)
    assert result.history[1].loss < 0.8 * result.history[0].loss
    assert teacher.training
    assert same(before, teacher.state_dict())
    assert all(parameter.grad is None for parameter in teacher.parameters())


class Pairs(nn.Module):
    """Takes at least two images, so that it cannot be traced with one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if len(images) < 2:
            raise ValueError("one image")
        return self.model(images)


@pytest.mark.parametrize("wrapped", [lambda teacher: teacher, Pairs], ids=["traced", "not traced"])
def test_the_teacher_is_asked_for_its_own_logits_and_left_alone(model, data, tmp_path, wrapped):
    torch.manual_seed(1)
    original = timm.create_model("test_resnet", num_classes=10).train()
    original(data.train[:64][0])  # so that its norms have statistics of images
    teacher = wrapped(original.eval())
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = copy.deepcopy(model).train()
    images = data.train[:32][0]
    with torch.no_grad():
        expected = kd_loss(student(images), teacher(images), temperature=1.0)
    config = FinetuneConfig(batch_size=32, max_steps=1, kd_weight=1.0, temperature=1.0, log_every=1)
    finetune(model, train=[images], teacher=teacher, config=config, out=tmp_path)
    (loss,) = (line["loss"] for line in lines(tmp_path) if line["kind"] == "step")
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert same(teacher.state_dict(), state)


def test_same_seed_same_weights_and_the_caller_keeps_his_random_state(data):
    def run(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = timm.create_model("test_resnet", num_classes=10, drop_rate=0.2)
        torch.manual_seed(random.randrange(1000))
        config = FinetuneConfig(batch_size=32, max_steps=4, seed=seed)
        finetune(model, train=few(data.train, 200), config=config)
        return model.state_dict()

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    finetune(timm.create_model("test_resnet", num_classes=10, pretrained=False).eval(),
             train=few(data.train), config=SHORT)  # fmt: skip
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    first = run(3)
    assert same(first, run(3))
    assert not same(first, run(4))


def test_the_random_state_is_untouched(model, data):
    state = torch.get_rng_state()
    finetune(model, train=few(data.train), val=few(data.val), config=SHORT)
    assert torch.equal(torch.get_rng_state(), state)


class Poisoned:
    """Batches whose pixels are NaN from a given pass and batch on."""

    def __init__(self, data: TensorDataset, healthy_passes: int) -> None:
        self.images, self.labels = data.tensors
        self.passes, self.healthy_passes = 0, healthy_passes

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        self.passes += 1
        for index in range(3):
            images = self.images[index * 32 : index * 32 + 32].clone()
            if self.passes > self.healthy_passes and index == 1:
                images[0] = float("nan")
            yield images, self.labels[index * 32 : index * 32 + 32]


def test_nan_stops_with_the_last_good_weights(model, data, tmp_path):
    config = FinetuneConfig(epochs=3)
    with pytest.raises(TrainingError) as caught:
        finetune(model, train=Poisoned(data.train, 1), config=config, out=tmp_path)
    message = str(caught.value)
    assert "step 5 of 9 (epoch 2)" in message
    assert "learning rate of" in message
    assert str(tmp_path / "best.safetensors") in message
    assert same(load_file(tmp_path / "best.safetensors"), model.state_dict())
    assert lines(tmp_path)[-1]["kind"] == "diverged"
    assert lines(tmp_path)[-1]["step"] == 5


def test_nan_in_the_first_epoch_gives_the_starting_weights_back(model, data):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match="starting weights"):
        finetune(model, train=Poisoned(data.train, 0))
    assert same(before, model.state_dict())


def test_the_optimiser_blowing_up_is_noticed(model, data):
    config = FinetuneConfig(optimizer="sgd", lr=1e30, warmup=0.0, batch_size=32, max_steps=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step [123] of 3"):
        finetune(model, train=few(data.train), config=config)
    assert same(before, model.state_dict())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="knows of x86 what is slow there")
def test_bfloat16_that_is_slow_here_is_told(model, data):
    config = FinetuneConfig(batch_size=32, max_steps=1, mixed_precision="bf16")
    slow = not torch.accelerator.is_available() and not torch.cpu._is_avx512_supported()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        finetune(model, train=few(data.train), config=config)
    about_precision = [w for w in told if issubclass(w.category, SlowWarning)]
    assert bool(about_precision) == slow
    for warning in about_precision:
        assert "bfloat16" in str(warning.message)
        assert warning.filename == __file__


def test_numbers_of_other_kinds_are_taken(model, data):
    config = FinetuneConfig(batch_size=32, max_steps=2)
    images, labels = few(data.train).tensors
    ends = []
    for given in ((images, labels), (images.double(), labels.int())):
        student = copy.deepcopy(model)
        finetune(student, train=TensorDataset(*given), config=config)
        ends.append(student.state_dict())
    assert same(*ends)


def images_of(channels, number=8):
    labels = torch.arange(number) % 10
    return TensorDataset(torch.randn(number, channels, 32, 32), labels)


def test_images_of_other_channels_are_told(model):
    fits, other = images_of(3), images_of(1)
    before = copy.deepcopy(model.state_dict())
    short = FinetuneConfig(batch_size=8, max_steps=1, warmup=0.0)
    for train, val in ((other, fits), (fits, other)):
        with pytest.raises(DataError, match=r"does not run on images of shape \(8, 1, 32, 32\)"):
            finetune(model, train=train, val=val, config=short)
    assert same(before, model.state_dict())
    teacher = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    with pytest.raises(DataError, match=r"does not run on images of shape \(8, 3, 32, 32\)"):
        finetune(model, train=fits, teacher=teacher, config=short)


FAILING = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from pfsurgery.recover import FinetuneConfig, finetune

class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.steps = nn.Conv2d(3, 10, 3), 0
    def forward(self, x):
        self.steps += 1
        if self.steps > 1:
            raise KeyError("a fault of the model's own")
        return self.conv(x).mean((2, 3))

if __name__ == "__main__":
    images = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 10)
    train = DataLoader(images, 8, num_workers=1, persistent_workers=True)
    settings = FinetuneConfig(max_steps=4, warmup=0.0)
    finetune(Failing(), train=train, config=settings, out=sys.argv[1])
"""


def test_a_run_with_workers_ends_on_a_fault_of_the_models_own(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    run = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "a fault of the model's own" in done.stderr


class Viewed(nn.Module):
    """A network whose code takes views of feature maps, as LeNets do."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 8)
        return self.fc(x.view(x.shape[0], -1))


def test_code_that_takes_views_is_told_of_the_memory_format():
    settings = {"batch_size": 8, "max_steps": 1, "warmup": 0.0}
    with pytest.raises(DataError, match="channels_last=False"):
        finetune(Viewed(), train=images_of(3), config=FinetuneConfig(**settings))
    plain = FinetuneConfig(**settings, channels_last=False)
    assert finetune(Viewed(), train=images_of(3), config=plain).history


def test_labels_that_are_not_needed_are_not_read(model, data):
    images, labels = few(data.train).tensors
    foreign = TensorDataset(images, labels + 1000)
    config = FinetuneConfig(batch_size=32, max_steps=1, kd_weight=1.0, mixup=0.3)
    result = finetune(model, train=foreign, teacher=copy.deepcopy(model), config=config)
    assert result.steps == 1


@pytest.mark.parametrize("channels_last", [True, False])
def test_model_and_teacher_keep_their_layouts(model, data, channels_last):
    config = FinetuneConfig(batch_size=32, max_steps=1, channels_last=channels_last)
    layouts = (torch.contiguous_format, torch.channels_last)
    for own, of_teacher in (layouts, layouts[::-1]):
        student = copy.deepcopy(model).to(memory_format=own)
        teacher = copy.deepcopy(model).to(memory_format=of_teacher)
        finetune(student, train=few(data.train), teacher=teacher, config=config)
        for network, layout in ((student, own), (teacher, of_teacher)):
            wide = [p for p in network.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
            assert wide
            assert all(p.is_contiguous(memory_format=layout) for p in wide)


def test_kernels_of_three_dimensions_are_trained(data):
    inner = nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1)
    model = nn.Sequential(*inner, nn.Flatten(), nn.Linear(4, 10))
    before = copy.deepcopy(model[1].weight)
    finetune(model, train=few(data.train), config=FinetuneConfig(batch_size=32, max_steps=2))
    assert not torch.equal(before, model[1].weight)


def test_bf16_and_channels_last(model, data):
    config = FinetuneConfig(
        batch_size=32, max_steps=6, mixed_precision="bf16", channels_last=True, warmup=0.0
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    result = finetune(model, train=data.train, val=few(data.val), teacher=copy.deepcopy(model),
                      config=config)  # fmt: skip
    assert result.steps == 6
    assert "forward" not in vars(model)
    assert not hasattr(model, "_original_forward")
    assert model(torch.randn(2, 3, 32, 32)).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    finetune(model, train=few(data.train), config=SHORT)  # another precision in the same process


TWO_PROCESSES = """
import sys, timm, torch
from pfsurgery.digits import digits
from pfsurgery.recover import FinetuneConfig, finetune
torch.manual_seed(0)
data, model = digits(), timm.create_model("test_convnext", num_classes=10)
config = FinetuneConfig(batch_size=8, max_steps=20, log_every=1, optimizer="sgd", lr=0.1)
result = finetune(model, train=data.train, val=data.val, config=config, out=sys.argv[1])
total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
print("images", result.last.images, "sum", total, type(model).__name__)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="would need a GPU for each process")
def test_two_processes_are_one_with_the_double_batch(data, tmp_path):
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*launch, str(tmp_path / "job.py"), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stdout.splitlines() if line.startswith("images"))
    assert first == second
    assert first.startswith("images 445")
    assert first.endswith("ConvNeXt")
    records = lines(tmp_path / "run")
    assert [r["kind"] for r in records] == ["start", *["step"] * 20, "epoch", "end"]

    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=10)
    config = FinetuneConfig(batch_size=16, max_steps=20, log_every=1, optimizer="sgd", lr=0.1)
    finetune(model, train=data.train, val=data.val, config=config, out=tmp_path / "one")
    together, alone = (
        [r["loss"] for r in lines(tmp_path / name) if r["kind"] == "step"]
        for name in ("run", "one")
    )
    assert together == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.05


def test_frozen_parameters_stay(model, data):
    model.conv1.requires_grad_(False)
    before = [parameter.clone() for parameter in model.conv1.parameters()]
    finetune(model, train=few(data.train), config=SHORT)
    assert all(map(torch.equal, before, model.conv1.parameters()))


def test_progress_is_shown_only_when_asked_for(model, data, capsys):
    finetune(model, train=few(data.train), config=SHORT)
    assert capsys.readouterr() == ("", "")
    finetune(model, train=few(data.train), config=SHORT, progress=True)
    output = capsys.readouterr()
    assert "images/s" in output.err
    assert output.out == ""


def test_outside_a_terminal_a_long_run_tells_where_it_is(model, data, capsys, monkeypatch):
    monkeypatch.setattr("pfsurgery.recover.progress._SECONDS_PER_LINE", 0.0)
    finetune(model, train=few(data.train), config=SHORT)
    lines = capsys.readouterr().err.splitlines()
    total = lines[-1].split()[0]
    assert re.fullmatch(r"(\d+)/\1", total)
    assert all("images/s" in line for line in lines[1:])


def test_a_failed_write_leaves_the_earlier_weights(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_weights({"a": torch.ones(3)}, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match="No space left"):
        write_weights({"a": torch.zeros(3)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_refused_before_training(model, data, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "file").write_text("x")
    train = few(data.train)
    with pytest.raises(SurgeryError, match="cannot be written to"):
        finetune(model, train=train, out=tmp_path / "file" / "run")
    with pytest.raises(TrainingError, match="teacher is the model itself"):
        finetune(model, train=train, teacher=model)
    with pytest.raises(UnknownNameError, match="adamw"):
        finetune(model, train=train, config=FinetuneConfig(optimizer="adamww"))
    with pytest.raises(TrainingError, match="none is trained"):
        finetune(copy.deepcopy(model).requires_grad_(False), train=train)
    with pytest.raises(TrainingError, match="teacher gives 7 classes"):
        finetune(model, train=train, teacher=timm.create_model("test_resnet", num_classes=7))
    with pytest.raises(DataError, match="label 9 does not fit the model's 4 classes"):
        finetune(timm.create_model("test_resnet", num_classes=4), train=train)
    with pytest.raises(DataError, match="labels are float32; give class indices"):
        finetune(model, train=[(train.tensors[0], train.tensors[1].float())])
    with pytest.raises(DataError, match="no labels"):
        finetune(model, train=[train.tensors[0]])
    with pytest.raises(DataError, match="images are uint8; give floats"):
        finetune(model, train=[(train.tensors[0].to(torch.uint8), train.tensors[1])])
    with pytest.raises(DataError, match="no batch"):
        finetune(model, train=[])
    with pytest.raises(DataError, match="There is no"):
        finetune(model, train=tmp_path / "nowhere")
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -1.0),
        ("warmup", 1.0),
        ("temperature", 0.0),
        ("kd_weight", 1.1),
        ("label_smoothing", 1.0),
        ("mixed_precision", "fp8"),
        ("seed", -1),
        ("max_steps", 0),
    ],
)
def test_wrong_settings_are_named(name, value):
    with pytest.raises(TrainingError, match=name):
        FinetuneConfig(**{name: value})
