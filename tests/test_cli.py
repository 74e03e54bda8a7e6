"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import load_checkpoint

from pfsurgery import demo, load, record
from pfsurgery.cli import main

COMMANDS = (
    *("demo", "finetune", "scan", "plan", "convert", "recover", "compare", "eval"),
    *("push", "ops", "policies", "report"),
)
SMALL = ("--model", "test_resnet", "--num-classes", "10")
DIGITS_MODEL = (*SMALL, "--no-pretrained", "--data", "digits")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def width_of(figure: Path) -> int:
    with Image.open(figure) as image:
        return image.width


@pytest.fixture
def cli(monkeypatch, capsys):
    def run(*args: object, columns: int = 200) -> Result:
        monkeypatch.setattr(sys, "argv", ["pfsurgery", *map(str, args)])
        monkeypatch.setenv("COLUMNS", str(columns))
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of small images, for training and validation."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            where = tmp_path / "images" / part / name
            where.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{i}.png")
    return tmp_path / "images"


def test_a_model_of_grey_images_reads_a_folder(cli, folder):
    grey = ("--model", "test_resnet", "--num-classes", "2", "--model-kwarg", "in_chans=1")
    result = cli("eval", *grey, "--no-pretrained", "--data", folder)
    assert result.code == 0, result.err


def test_data_of_other_channels_ends_in_one_line(cli):
    result = cli("eval", *DIGITS_MODEL, "--model-kwarg", "in_chans=2")
    assert result.code == 2
    assert "does not run on images" in " ".join(result.err.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(cli, command):
    result = cli(command, "--help")
    assert result.code == 0
    assert "Example: pfsurgery" in " ".join(result.out.split())


def test_listings(cli):
    assert "max_pool" in cli("ops").out
    assert "eff_hybrid" in json.loads(cli("policies", "--json").out)


def test_scan_and_plan(cli, tmp_path):
    sites = json.loads(cli("scan", *SMALL, "--json").out)
    assert "layer1.0.conv1" in [site["name"] for site in sites]
    out = tmp_path / "plan.json"
    result = cli("plan", *SMALL, "-p", "maxpool_all", "--exclude", "layer1.*", "--out", out)
    assert result.code == 0
    assert "excluded" in result.out
    again = cli("plan", *SMALL, "-p", out, "--json")
    assert json.loads(again.out) == json.loads(out.read_text())


def test_names_are_whole_on_a_narrow_terminal(cli):
    model = ("--model", "mobilenetv2_050")
    names = [site["name"] for site in json.loads(cli("scan", *model, "--json").out)]
    for command in (("scan",), ("plan", "-p", "maxpool_depthwise")):
        table = cli(*command, *model, columns=80).out
        assert set(names) <= set(table.split()), command
        assert max(map(len, table.splitlines())) <= 80


def test_paths_are_no_markup(cli, tmp_path):
    out = tmp_path / "[old" / "red]"
    result = cli("convert", *SMALL, "--no-pretrained", "-p", "maxpool_deep", "--out", out)
    assert result.code == 0, result.err
    assert str(out) in result.out


def test_attention_is_scanned_and_converted(cli, tmp_path):
    vit = ("--model", "test_vit", "--num-classes", "10", "--model-kwarg", "depth=2")
    sites = json.loads(cli("scan", *vit, "--json").out)
    assert [s["name"] for s in sites] == ["patch_embed.proj", "blocks.0.attn", "blocks.1.attn"]
    assert sites[1]["geometry"]["grid"] == [10, 10]
    table = cli("scan", *vit).out
    assert "attention" in table
    assert "10x10+1 tokens 64 h2" in " ".join(table.split())
    out = tmp_path / "fast"
    result = cli("convert", *vit, "--no-pretrained", "-p", "eff_transformer", "--out", out)
    assert result.code == 0, result.err
    loaded = load(out)
    assert type(loaded.blocks[1].attn).__name__ == "EffAttention"
    assert loaded(torch.zeros(1, 3, 160, 160)).shape == (1, 10)


def test_a_model_of_the_paper_is_opened_by_name(cli, tmp_path):
    paper = ("--model", "resnet50_max.pf", "--model-kwarg", "layers=[1,1,1,1]")
    sites = json.loads(cli("scan", *paper, "--size", 64, "--json").out)
    assert [site["name"] for site in sites] == ["conv1"]
    result = cli("convert", *paper, "--pretrained", "-p", "eff_max", "--out", tmp_path / "fast")
    assert result.code == 2
    assert "no weights of resnet50_max" in " ".join(result.err.split())


def test_convert_then_compare(cli, tmp_path):
    out = tmp_path / "fast"
    result = cli("convert", *SMALL, "--no-pretrained", "-p", "maxpool_all", "--out", out)
    assert result.code == 0
    assert load(out)(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    figure = tmp_path / "figure.png"
    result = cli(
        *("compare", *SMALL, "--after", out, "--size", 64, "--repeats", 3, "--figure", figure),
        "--json",
    )
    assert json.loads(result.out)["ratios"]["macs"] < 1
    assert width_of(figure) > 400


def test_a_model_on_the_hub_is_compared_with_its_original(cli, tmp_path, monkeypatch):
    out, cache = tmp_path / "fast", tmp_path / "cache"
    cli("convert", *SMALL, "--no-pretrained", "-p", "maxpool_all", "--out", out)
    cli("push", out, "someone/fast", "--cache", cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    result = cli("compare", *SMALL, "--after", "hf-hub:someone/fast", "--repeats", 2, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["ratios"]["macs"] < 1


def test_a_budget_is_fitted_to_images(cli, tmp_path):
    out = tmp_path / "fast"
    result = cli(
        *("convert", *SMALL, "--no-pretrained", "-p", "budget", "--macs", "60%", "--size", 32),
        *("--data", "digits", "--images", 128, "--out", out, "--figure", tmp_path / "sites.png"),
    )
    assert result.code == 0, result.err
    assert width_of(tmp_path / "sites.png") > 400
    assert "saved to" in result.out
    assert "relative error" in result.out
    assert " s)" in result.out
    assert any("columns" in name or "reduce" in name for name, _ in load(out).named_modules())


def test_a_budget_keeps_excluded_sites(cli, tmp_path):
    out = tmp_path / "fast"
    result = cli(
        *("convert", *SMALL, "--no-pretrained", "-p", "budget", "--macs", "80%", "--size", 32),
        *("--data", "digits", "--images", 64, "--exclude", "layer1.*", "--out", out),
    )
    assert result.code == 0, result.err
    replaced = [d.site.name for d in record(load(out)).plans[-1] if d.replaced]
    assert replaced
    assert not any(name.startswith("layer1.") for name in replaced)


def test_a_latency_is_asked_for(cli, tmp_path):
    result = cli(
        *("convert", *SMALL, "--no-pretrained", "-p", "budget", "--latency", "95%", "--size", 32),
        *("--data", "digits", "--images", 64, "--out", tmp_path / "fast"),
    )
    met = result.code == 0 and "of the original's time" in result.out
    assert met or (result.code == 2 and "cannot be met" in result.err)


def test_weights_come_from_a_local_checkpoint(cli, tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    out = tmp_path / "fast"
    cli("convert", *SMALL, "--checkpoint", weights, "-p", "shift_all", "--out", out)
    assert torch.equal(load(out).fc.weight, model.fc.weight)


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(5)
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return path


def test_recover_refits_a_converted_directory_to_its_original(cli, tmp_path, weights):
    fast, better = tmp_path / "fast", tmp_path / "better"
    cli("convert", *SMALL, "--checkpoint", weights, "-p", "avgpool_all", "--out", fast)
    args = ("--checkpoint", weights, "--data", "digits", "--images", 128, "--out", better)
    result = cli("recover", "--model", fast, *args)
    assert result.code == 0, result.err
    assert "layer1.0.conv1.pointwise" in result.out
    assert "seconds" in result.out
    original = timm.create_model("test_resnet", num_classes=10).eval()
    load_checkpoint(original, str(weights))
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        goal = original(images)
        assert dist(load(better)(images), goal) < dist(load(fast)(images), goal)


def dist(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean())


def test_recover_asks_for_the_weights_of_the_original(cli, tmp_path, weights):
    fast = tmp_path / "fast"
    cli("convert", *SMALL, "--checkpoint", weights, "-p", "avgpool_all", "--out", fast)
    result = cli("recover", "--model", fast, "--data", "digits", "--out", tmp_path / "better")
    assert result.code == 2
    assert "--checkpoint FILE" in result.err


def test_recover_converts_first_where_a_policy_is_given(cli, tmp_path, weights):
    result = cli(
        *("recover", *SMALL, "--checkpoint", weights, "-p", "shift_all", "--data", "digits"),
        *("--images", 128, "--size", 32, "--out", tmp_path / "out", "--json"),
    )
    assert result.code == 0, result.err
    refits = [refit for refit in json.loads(result.out) if refit["layer"]]
    assert refits
    assert all(refit["after"] <= refit["before"] and refit["seconds"] > 0 for refit in refits)
    assert load(tmp_path / "out")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_the_main_job(cli, tmp_path, folder):
    out = tmp_path / "run"
    result = cli(
        *("finetune", "--model", "test_resnet", "--num-classes", 2, "--no-pretrained"),
        *("--policy", "maxpool_deep", "--data", folder, "--out", out, "--epochs", 1),
        *("--batch-size", 4, "--workers", 0, "--model-kwarg", "drop_rate=0.1"),
    )
    assert result.code == 0, result.err
    assert "pfsurgery.load" in result.out
    report = json.loads((out / "report.json").read_text())
    names = [step["name"] for step in report["steps"]]
    assert names == ["original", "after surgery", "norms re-estimated", "refitted", "fine-tuned"]
    assert report["comparison"]["ratios"]["parameters"] < 1
    assert report["steps"][-1]["accuracy"]["images"] == 8
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert "maxpool_deep" in (out / "report.md").read_text()
    assert width_of(out / "comparison.png") > 400
    again = cli("eval", "--model", out / "model", "--data", folder, "--json")
    assert json.loads(again.out)["top1"] == report["steps"][-1]["accuracy"]["top1"]


def test_the_demo(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(demo.TRAINING, "epochs", 1)
    monkeypatch.setitem(demo.RECOVERY, "epochs", 1)
    result = cli("demo", "--out", tmp_path / "demo", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["comparison"]["ratios"]["macs"] < 0.5
    assert load(tmp_path / "demo" / "model").pretrained_cfg["input_size"] == (3, 32, 32)


BAD = {
    "no such folder": (["eval", "--model", "none/model", "--data", "digits"], "There is no folder"),
    "unknown model": (("scan", "--model", "resnet5O"), "resnet50"),
    "unknown torchvision model": (("scan", "--model", "torchvision/resnet5O"), "resnet50"),
    "unknown policy": (("plan", *SMALL, "-p", "maxpool_dep"), "maxpool_deep"),
    "unreadable plan": (("plan", *SMALL, "-p", "none.json"), "none.json"),
    "unknown optimizer": (
        ("finetune", *DIGITS_MODEL, "-p", "maxpool_all", "--out", "OUT", "--optimizer", "adam2"),
        "adam",
    ),
    "pattern without a match": (
        ("plan", *SMALL, "-p", "maxpool_all", "--exclude", "layer9.*"),
        "matches no site",
    ),
    "model without sites": (
        ("plan", "--model", "naflexvit_base_patch16_gap", "-p", "maxpool_all"),
        "nothing to convert",
    ),
    "size too small": (("scan", "--model", "vgg11", "--size", "8"), "example of shape"),
    "missing checkpoint": (
        ("convert", *SMALL, "--checkpoint", "none.pth", "-p", "shift_all", "--out", "OUT"),
        "none.pth",
    ),
    "missing data": (("eval", *SMALL, "--no-pretrained", "--data", "none/"), "none"),
    "wrong number of classes": (
        ("eval", "--model", "test_resnet", "--no-pretrained", "--data", "digits"),
        "1000",
    ),
    "budget without images": (
        ("convert", *SMALL, "--no-pretrained", "-p", "budget", "--macs", "50%", "--out", "OUT"),
        "images=",
    ),
    "budget without a limit": (
        ("convert", *SMALL, "--no-pretrained", "-p", "budget", "--out", "OUT"),
        "one limit",
    ),
    "recovery of what was not converted": (
        ("recover", *SMALL, "--data", "digits", "--out", "OUT"),
        "was not made by pfsurgery.convert",
    ),
    "recovery by a budget": (
        ("recover", *DIGITS_MODEL, "-p", "budget", "--out", "OUT"),
        "pfsurgery convert",
    ),
    "limit without a budget": (
        ("convert", *SMALL, "--no-pretrained", "-p", "shift_all", "--macs", "5%", "--out", "OUT"),
        "--policy budget",
    ),
    "thin convolutions without a budget": (
        ("convert", *SMALL, "--no-pretrained", "-p", "shift_all", "--no-thin", "--out", "OUT"),
        "--no-thin goes with --policy budget",
    ),
    "limit of a demo without a budget": (("demo", "--macs", "30%", "--out", "OUT"), "--macs"),
    "images for a policy of rules": (
        ("convert", *DIGITS_MODEL, "-p", "shift_all", "--out", "OUT"),
        "pfsurgery recover",
    ),
    "sites of a recovery without a policy": (
        ("recover", *SMALL, "--data", "digits", "--include", "layer1.*", "--out", "OUT"),
        "go with --policy",
    ),
    "impossible rate": (
        ("finetune", *DIGITS_MODEL, "-p", "maxpool_all", "--out", "OUT", "--lr", "-1"),
        "lr",
    ),
    "output is a file": (
        ("finetune", *DIGITS_MODEL, "-p", "maxpool_all", "--out", "FILE"),
        "cannot be written",
    ),
    "conversion into a file": (
        ("convert", "--model", "resnet18", "-p", "shift_all", "--out", "FILE"),
        "cannot be written",
    ),
    "figure of what is not fitted": (
        ("convert", "--model", "resnet18", "-p", "shift_all", "--out", "OUT", "--figure", "OUT"),
        "--policy budget or bare",
    ),
    "plan of a budget": (
        ("plan", *SMALL, "-p", "budget"),
        "pfsurgery convert --policy budget --macs",
    ),
    "comparison by bare": (
        ("compare", *SMALL, "-p", "bare"),
        "pfsurgery convert --policy bare --data",
    ),
    "trials of a programme": (
        ("search", *DIGITS_MODEL, "--budget", "macs=50%", "--out", "OUT", "--trials", "5"),
        "--method optuna",
    ),
    "storage of a programme": (
        ("search", *DIGITS_MODEL, "--budget", "macs=50%", "--out", "OUT", "--storage", "x.db"),
        "--method optuna",
    ),
    "not a saved directory": (("scan", "--model", "EMPTY"), "config.json"),
    "hub out of reach": (
        ("convert", "--model", "resnet18", "-p", "shift_all", "--out", "OUT"),
        "--checkpoint",
    ),
    "diverging": (
        (
            *("finetune", *DIGITS_MODEL, "-p", "shift_all", "--out", "OUT", "--lr", "1e12"),
            *("--optimizer", "sgd", "--max-steps", "12"),
        ),
        "learning rate",
    ),
    "both after and policy": (("compare", *SMALL), "--after"),
    "kwarg without value": (("scan", *SMALL, "--model-kwarg", "x"), "key=value"),
    "kwarg that the model refuses": (("scan", *SMALL, "--model-kwarg", "wings=2"), "wings"),
}


def test_a_folder_with_the_name_of_a_model_is_not_guessed_at(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_resnet").mkdir()
    result = cli("scan", "--model", "test_resnet")
    assert result.code == 2
    assert "timm/test_resnet" in result.err
    assert cli("scan", "--model", "timm/test_resnet").code == 0


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input_ends_in_one_message_and_exit_code_2(cli, case, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    places = {
        "OUT": tmp_path / "out",
        "FILE": tmp_path / "file",
        "EMPTY": tmp_path / "empty",
    }
    args, expected = BAD[case]
    result = cli(*(places.get(str(arg), arg) for arg in args))
    assert result.code == 2
    assert "Traceback" not in result.err + result.out
    assert expected in result.err


def test_corrupt_images_are_counted_or_named(cli, folder, tmp_path):
    args = (
        *("eval", "--model", "test_resnet", "--num-classes", 2, "--no-pretrained"),
        *("--data", folder, "--json"),
    )
    (folder / "val" / "cat" / "0.png").write_bytes(b"not an image")
    assert json.loads(cli(*args).out)["images"] == 7
    for i in range(4):
        (folder / "val" / "cat" / f"{i}.png").write_bytes(b"not an image")
    result = cli(*args)
    assert result.code == 2
    assert ".png" in result.err


def test_importing_pfsurgery_imports_nothing_heavy():
    heavy = ("timm", "torchvision", "fvcore", "accelerate", "matplotlib", "sklearn", "numba")
    code = f"import sys, pfsurgery; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
