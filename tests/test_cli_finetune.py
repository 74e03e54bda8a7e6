"""`pfsurgery finetune` with every option, and `pfsurgery push`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from pfsurgery import Plan, load, plan, push
from pfsurgery.checkpoint import CONFIG
from pfsurgery.errors import RecordMismatchError, SurgeryError, TrainingError
from pfsurgery.job import run_job
from pfsurgery.recover import FinetuneConfig
from pfsurgery.recover.config_file import read_config, write_config
from tests import test_cli

cli, folder = test_cli.cli, test_cli.folder

BASE = (
    *("finetune", "--model", "test_resnet", "--num-classes", 2, "--no-pretrained"),
    *("--size", 32),
)
SHORT = (*BASE, "--policy", "maxpool_deep", "--workers", 0, "--batch-size", 4, "--max-steps", 2)

# One value for each setting, other than its default; all of them work together.
OPTIONS: dict[str, object] = {
    "epochs": 3,
    "batch_size": 4,
    "accumulate": 2,
    "optimizer": "sgd",
    "lr": 0.01,
    "weight_decay": 0.001,
    "layer_decay": 0.9,
    "changed_lr": 2.0,
    "schedule": "step",
    "decay_epochs": 2,
    "warmup": 0.2,
    "temperature": 3.0,
    "kd_weight": 0.5,
    "teacher_cache": True,
    "match_weight": 0.1,
    "stage_weight": 0.1,
    "ramp": 0.3,
    "freeze": 0.3,
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 0.2,
    "auto_augment": "rand-m9-mstd0.5",
    "crop_scale": 0.5,
    "ema": 0.5,
    "mixed_precision": "bf16",
    "channels_last": False,
    "compile": "eager",
    "norm_images": 8,
    "max_drop": 50.0,
    "save_every": 1,
    "keep_last": 1,
    "on_divergence": "roll_back",
    "explosion": 50.0,
    "log_every": 2,
    "tracker": "tensorboard",
    "seed": 7,
    "max_steps": 3,
}

WRONG: dict[str, object] = {
    "epochs": 0,
    "batch_size": 0,
    "accumulate": 0,
    "optimizer": "adam2",
    "lr": -1,
    "weight_decay": -1,
    "layer_decay": 2,
    "changed_lr": 0,
    "schedule": "cosin",
    "decay_epochs": 0,
    "warmup": 1,
    "temperature": 0,
    "kd_weight": 2,
    "match_weight": -1,
    "stage_weight": -1,
    "ramp": 2,
    "freeze": 2,
    "label_smoothing": 1,
    "mixup": -1,
    "cutmix": -1,
    "auto_augment": "sharpen9",
    "crop_scale": 0,
    "ema": 1,
    "mixed_precision": "fp8",
    "compile": "inducter",
    "norm_images": -1,
    "max_drop": -1,
    "save_every": 0,
    "keep_last": 0,
    "on_divergence": "go_on",
    "explosion": 1,
    "log_every": 0,
    "tracker": "wandbb",
    "seed": -1,
    "max_steps": 0,
}


def flags(settings: dict[str, object]) -> list[object]:
    """Settings as options of the command line."""
    words: list[object] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, value]
    return words


def test_every_setting_is_an_option_with_help(cli):
    text = " ".join(cli("finetune", "--help").out.split())
    names = [field.name for field in fields(FinetuneConfig)]
    assert list(OPTIONS) == names
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
    assert "Share of the teacher in the loss" in text
    assert "(0.001)" in text


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard has to show: for each name the values by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_all_options_together_from_a_file_and_the_command_line(cli, folder, tmp_path):
    out = tmp_path / "run"
    names = list(OPTIONS)
    on_the_line, in_the_file = names[::2], [*names[1::2], "epochs"]
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({**{n: OPTIONS[n] for n in in_the_file}, "epochs": 9}))
    torch.manual_seed(0)  # in bfloat16 some networks are right on one image more or less
    result = cli(
        *(*BASE, "--policy", "maxpool_deep", "--data", folder, "--out", out, "--workers", 0),
        *("--in-memory", "--config", settings, *flags({n: OPTIONS[n] for n in on_the_line})),
    )
    assert result.code == 0, result.err
    assert yaml.safe_load((out / "config.yaml").read_text()) == OPTIONS
    assert [path.name for path in (out / "checkpoints").iterdir()] == [
        "step-00000003-of-00000003.pt"
    ]
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps[0]["config"] == OPTIONS
    for name in ("accuracy.png", "comparison.png"):
        with Image.open(out / name) as image:
            assert image.width > 400
    assert scalars(out / "pfsurgery").keys() >= {"train/loss", "train/lr", "val/top1"}
    again = cli("eval", "--model", out / "model", "--data", folder, "--json")
    report = json.loads((out / "report.json").read_text())
    assert json.loads(again.out)["top1"] == report["steps"][-1]["accuracy"]["top1"]


def test_a_model_that_guesses_is_told_of(cli, folder, tmp_path, caplog):
    model = timm.create_model("test_resnet", num_classes=2)
    right_of_half = {"fc.weight": torch.zeros(2, 96), "fc.bias": torch.tensor([1.0, 0.0])}
    model.load_state_dict(right_of_half, strict=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    out = tmp_path / "run"
    result = cli(
        *("finetune", "--model", "test_resnet", "--num-classes", 2, "--size", 40),
        *("--checkpoint", tmp_path / "weights.safetensors", "--policy", "maxpool_deep"),
        *("--data", folder, "--out", out, "--workers", 0, "--batch-size", 4, "--max-steps", 1),
        *("--images", 4),
    )
    assert result.code == 0, result.err
    assert "right on 50.00 % of the validation images, near chance for its 2 classes" in caplog.text
    assert "at 40x40 pixels" in result.out
    assert load(out / "model").pretrained_cfg["input_size"] == (3, 40, 40)


def test_a_tracker_that_is_not_installed_is_named(cli, folder, tmp_path):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    missing = sorted({*LOGGER_TYPE_TO_CLASS} - {*map(str, get_available_trackers())})
    if not missing:
        pytest.skip("every tracker is installed")
    result = cli(*SHORT, "--data", folder, "--out", tmp_path / "run", "--tracker", missing[0])
    assert (result.code, f"pip install {missing[0]}" in result.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_alone(cli, folder, tmp_path, name):
    with_folder = {"on_divergence": {"save_every": 1}}
    given = {**with_folder.get(name, {}), name: OPTIONS[name]}
    result = cli(*SHORT, "--data", folder, "--out", tmp_path / "run", *flags(given))
    assert result.code == 0, result.err
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved[name] == OPTIONS[name]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_values_end_in_one_line_and_exit_code_2(cli, folder, tmp_path, name):
    settings = {"save_every": 1} if name == "on_divergence" else {}
    args = (*SHORT, "--data", folder, "--out", tmp_path / "run", *flags(settings))
    result = cli(*args, *flags({name: WRONG[name]}))
    assert result.code == 2
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert name in result.err or str(WRONG[name]) in result.err


def test_a_run_is_continued(cli, folder, tmp_path):
    out, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), weights)
    args = (*SHORT, "--checkpoint", weights, "--data", folder, "--out", out)
    assert cli(*args, "--resume").code == 0
    newest = out / "checkpoints" / "step-00000002-of-00000002.pt"
    saved = torch.load(newest)
    newest.unlink()
    torch.save(saved, newest.with_name("step-00000001-of-00000002.pt"))
    refused = cli(*args)
    assert refused.code == 2
    assert "--resume" in refused.err
    before = (out / "steps.json").read_text()
    plan = json.loads((out / "plan.json").read_text())
    card = (out / "model" / "README.md").read_text()
    run, report = (out / "run.json").read_text(), json.loads((out / "report.json").read_text())
    result = cli(*args, "--resume")
    assert result.code == 0, result.err
    assert (out / "run.json").read_text() == run
    again = json.loads((out / "report.json").read_text())
    assert again["steps"][-1]["seconds"] > 0.9 * report["steps"][-1]["seconds"]
    assert (out / "steps.json").read_text() == before
    assert json.loads((out / "plan.json").read_text()) == plan
    assert "keep" in {decision["op"] for decision in plan["decisions"]}
    of = r"\d+ of \d+ convolutions"
    assert re.findall(of, (out / "model" / "README.md").read_text()) == re.findall(of, card) != []
    assert "converted before" in result.out
    changed = cli(*args, "--resume", "--lr", 0.5)
    assert changed.code == 2
    assert "lr (then 0.001, now 0.5)" in changed.err
    fewer = cli(*args, "--resume", "--images", 4)
    assert fewer.code == 2
    assert "images (then 1000, now 4)" in fewer.err
    other = cli(*args, "--resume", "--policy", "shift_all")
    assert other.code == 2
    assert "policy (then 'maxpool_deep', now 'shift_all')" in other.err
    assert "maxpool_deep" in json.loads((out / "run.json").read_text())["command"]


def test_a_run_of_a_policy_that_measures_is_continued(tmp_path):
    """What it measures, and so its plan, is never the same twice."""
    model = timm.create_model("test_resnet", num_classes=2).eval()
    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    planned = plan(model, "maxpool_all", example=torch.zeros(1, 3, 32, 32))
    plans = [
        Plan(name, tuple(replace(d, reason=f"{ms} ms") for d in planned))
        for name in ("fastest", "mine")
        for ms in (1, 2)
    ]
    for first, second, refused in ((*plans[:2], False), (*plans[2:], True)):
        out = tmp_path / first.policy
        short = FinetuneConfig(batch_size=4, max_steps=1)
        job = partial(run_job, model, train=images, val=images, out=out, config=short, images=8)
        job(first)
        if refused:
            with pytest.raises(TrainingError, match="plan"):
                job(second, resume=True)
        else:
            _, report = job(second, resume=True)
            assert {d.reason for d in report.plan.replaced} == {"1 ms"}


def test_the_signal_to_a_whole_group_saves_and_ends(folder, tmp_path):
    """As clusters send it, also to what read images before the training began."""
    out = tmp_path / "run"
    words = [*SHORT[:-6], "--workers", 1, "--batch-size", 4, "--epochs", 10_000, "--log-every", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "pfsurgery.cli", *map(str, words), "--data", folder, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
    )
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step"' in log.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert list((out / "checkpoints").glob("step-*.pt"))


def test_an_optimiser_with_second_derivatives_is_refused(cli, folder, tmp_path):
    result = cli(*SHORT, "--data", folder, "--out", tmp_path / "run", "--optimizer", "adahessian")
    assert result.code == 2
    assert "second derivatives" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_what_an_earlier_run_left_is_not_taken_over_by_another(cli, folder, tmp_path):
    out = tmp_path / "run"
    data = ("--data", folder, "--out", out)
    assert cli(*SHORT, *data).code == 0
    (out / "setting.json").write_text('{"policy": "of a run that was killed while it converted"}')
    (out / "steps.json").unlink()
    assert cli(*BASE, "--policy", "shift_all", *SHORT[-6:], *data, "--resume").code == 0
    assert json.loads((out / "report.json").read_text())["policy"] == "shift_all"


def test_images_for_training_need_no_classes_with_the_teacher_alone(
    cli,
    folder,
    tmp_path,
):
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        path.rename(folder / "train" / f"{number}.png")
    for left in ("cat", "dog"):
        (folder / "train" / left).rmdir()
    args = (*SHORT, "--data", folder, "--out", tmp_path / "run")
    assert "class folders" in cli(*args).err
    result = cli(*args, "--kd-weight", 1)
    assert result.code == 0, result.err


def test_the_model_has_a_card_and_goes_to_the_hub(cli, folder, tmp_path, monkeypatch):
    out, cache = tmp_path / "run", tmp_path / "cache"
    assert cli(*SHORT, "--data", folder, "--out", out).code == 0
    card = (out / "model" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "pfsurgery"
    report = json.loads((out / "report.json").read_text())
    accuracy = report["steps"][-1]["accuracy"]["top1"]
    assert matter["model-index"][0]["results"][0]["metrics"][0]["value"] == accuracy
    assert "pfsurgery.load(" in text
    assert "maxpool_deep" in text

    result = cli("push", out / "model", "someone/fast", "--cache", cache)
    assert result.code == 0, result.err
    assert 'load("hf-hub:someone/fast")' in result.out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model, images = load("hf-hub:someone/fast"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), load(out / "model")(images))
    found = cli("eval", "--model", "hf-hub:someone/fast", "--data", folder, "--json")
    assert json.loads(found.out)["top1"] == accuracy


def test_what_the_hub_cannot_take_or_give(tmp_path):
    with pytest.raises(RecordMismatchError, match=r"has no config\.json"):
        push(tmp_path, "someone/fast")
    for name in (CONFIG, "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SurgeryError, match="USER/NAME"):
        push(tmp_path, "fast")
    with pytest.raises(SurgeryError, match="hub"):
        push(tmp_path, "someone/fast")
    with pytest.raises(SurgeryError, match="cannot be had"):
        load("hf-hub:someone/nothing")


def test_settings_go_through_a_file_unchanged(tmp_path):
    config = FinetuneConfig(**OPTIONS)  # type: ignore[arg-type]
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml", {"lr": None}) == config
    assert asdict(read_config(None, {"lr": 0.5}))["lr"] == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lrr: 1", "no setting 'lrr'. Closest: lr"),
        ("- lr", "name: value"),
        ("lr: [1]", r"lr=\[1\]"),
        ("epochs: 1.5", "epochs=1.5"),
        ("channels_last: 3", "channels_last=3"),
        ("lr: {", "not YAML"),
        ("lr: -1", "lr=-1"),
    ],
)
def test_a_wrong_file_of_settings_is_explained(tmp_path, text, expected):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=expected):
        read_config(path, {})
    with pytest.raises(TrainingError, match="cannot be read"):
        read_config(tmp_path / "none.yaml", {})


def test_yaml_reads_numbers_and_no_as_people_mean_them(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-4\nmixed_precision: no\ncompile: no\nema: 0\n")
    config = read_config(path, {})
    assert (config.lr, config.mixed_precision, config.compile, config.ema) == (1e-4, "no", "no", 0)


@pytest.mark.parametrize("recipe", sorted(Path("examples").rglob("*/[ps]*.yaml"), key=str))
def test_the_recipes_are_settings(recipe):
    assert read_config(recipe, {}).save_every == 500


def test_the_slurm_script_is_a_script():
    script = Path("examples/imagenet/train.slurm")
    subprocess.run(["bash", "-n", script], check=True)
    assert "--resume" in script.read_text()
    assert sys.version_info >= (3, 10)
