"""Corruptions, attacks and Grad-CAM, of the original and the converted model."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pfsurgery
from pfsurgery.digits import digits
from pfsurgery.errors import DataError, ShapeError, SurgeryError, TrainingError, UnknownNameError
from pfsurgery.run_folder import read_run
from pfsurgery.study.attacks import fgsm, pgd
from pfsurgery.study.corruptions import PARAMETERS, SEVERITIES, corrupt
from pfsurgery.study.gradcam import grad_cam
from pfsurgery.study.pixels import Normalisation, normalisation_of
from pfsurgery.study.robustness import MODELS, TRIALS, robustness
from tests import test_cli

cli = test_cli.cli
data = cache(digits)
SHORT = {"number": 40, "severities": (1, 5), "epsilons": (8,), "steps": 2}

names = st.sampled_from(sorted(PARAMETERS))
severities = st.sampled_from(SEVERITIES)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A network that knows the digits, and what it was converted to."""
    torch.manual_seed(0)
    original = nn.Sequential(
        *(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.AdamW(original.parameters(), lr=1e-2)
    for _ in range(5):
        for images, labels in DataLoader(data().train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(original(images), labels).backward()
            optimizer.step()
    optimizer.zero_grad()
    original.eval()
    images = [data().train.tensors[0][:256]]
    fast = pfsurgery.convert(original, "avgpool_all", example=torch.zeros(1, 3, 32, 32))
    pfsurgery.reconstruct(fast, original, images)
    return original, fast.eval()


@pytest.fixture(scope="module")
def normalisation() -> Normalisation:
    return Normalisation(data().mean, data().std)


@pytest.fixture(scope="module")
def batch(normalisation: Normalisation) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels of held-out digits."""
    images, labels = data().val[:64]
    return normalisation.undo(images), labels


def pixels_of(seed: int, number: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    name=names,
    severity=severities,
    seed=st.integers(0, 2**40),
    number=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    cut=st.integers(0, 4),
)
def test_corrupted_images_are_images_and_depend_on_seed_and_place_alone(
    name, severity, seed, number, height, width, cut
):
    pixels = pixels_of(1, number, height, width)
    before = pixels.clone()
    random_state = torch.get_rng_state()
    corrupted = corrupt(pixels, name, severity, seed=seed)
    assert corrupted.shape == pixels.shape
    assert corrupted.dtype == torch.float32
    assert 0 <= corrupted.min() <= corrupted.max() <= 1
    assert torch.equal(corrupted, corrupt(pixels, name, severity, seed=seed))
    parts = [
        corrupt(pixels[:cut], name, severity, seed=seed),
        corrupt(pixels[cut:], name, severity, seed=seed, first=min(cut, number)),
    ]
    torch.testing.assert_close(torch.cat(parts), corrupted)
    assert torch.equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_error_grows_with_severity(name, batch):
    errors = [float((corrupt(batch[0], name, s) - batch[0]).abs().mean()) for s in SEVERITIES]
    assert errors == sorted(errors)
    assert errors[0] > 0
    assert len(set(errors)) == len(errors)


@pytest.mark.parametrize("name", ["gaussian_noise", "shift"])
def test_another_seed_gives_other_images(name, batch):
    assert not torch.equal(corrupt(batch[0], name, 5, seed=0), corrupt(batch[0], name, 5, seed=1))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_is_that_of_scipy_scaled_with_the_image(severity):
    pixels = pixels_of(0, 2, 56, 80)
    deviation = PARAMETERS["gaussian_blur"][severity - 1] * 56 / 224
    expected = gaussian_filter(
        pixels.double().numpy(), (0, 0, deviation, deviation), mode="nearest"
    )
    found = corrupt(pixels, "gaussian_blur", severity)
    torch.testing.assert_close(found, torch.from_numpy(expected).float())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_contrast_and_jpeg_have_the_parameters_of_the_table(severity):
    pixels = torch.full((1, 3, 64, 64), 0.5)
    noise = corrupt(pixels, "gaussian_noise", severity) - 0.5
    deviation = PARAMETERS["gaussian_noise"][severity - 1]
    assert float(noise.abs().median()) == pytest.approx(0.6745 * deviation, rel=0.05)
    pixels = pixels_of(0, 1, 20, 30)
    corrupted = corrupt(pixels, "contrast", severity)
    torch.testing.assert_close(corrupted.mean((2, 3)), pixels.mean((2, 3)))
    left = corrupted.std((2, 3)) / pixels.std((2, 3))
    torch.testing.assert_close(left, torch.full((1, 3), PARAMETERS["contrast"][severity - 1]))
    file = io.BytesIO()
    picture = Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())
    picture.save(file, "JPEG", quality=int(PARAMETERS["jpeg"][severity - 1]))
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert torch.equal(corrupt(pixels, "jpeg", severity)[0], expected)


def test_shifts_go_in_eight_directions_and_repeat_the_edge():
    pixels = pixels_of(0, 1, 32, 32).expand(64, -1, -1, -1)
    moved = corrupt(pixels, "shift", 3)
    padded = F.pad(pixels[:1], (3, 3, 3, 3), mode="replicate")
    windows = [
        padded[:, :, i : i + 32, j : j + 32]
        for i in (0, 3, 6)
        for j in (0, 3, 6)
        if (i, j) != (3, 3)
    ]
    matches = [[torch.equal(image[None], window) for window in windows] for image in moved]
    assert all(sum(row) == 1 for row in matches)
    assert np.array(matches).any(0).all()


def test_what_cannot_be_corrupted_is_said(batch):
    with pytest.raises(UnknownNameError, match="gaussian_blur"):
        corrupt(batch[0], "gaussian_blurr", 1)
    with pytest.raises(DataError, match="1 to 5"):
        corrupt(batch[0], "jpeg", 6)
    with pytest.raises(DataError, match=r"\(N, 3, H, W\)"):
        corrupt(batch[0][:, :1], "jpeg", 1)
    with pytest.raises(DataError, match="undo the normalisation"):
        corrupt(batch[0] * 2, "jpeg", 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), mean=st.floats(0, 1), std=st.floats(0.05, 2))
def test_normalisation_is_undone(seed, mean, std):
    pixels = pixels_of(seed, 2, 5, 6)
    normalisation = Normalisation((mean, 0.5, 0.1), (std, 1.0, 0.2))
    torch.testing.assert_close(normalisation.undo(normalisation.redo(pixels)), pixels)


def test_normalisation_is_that_of_the_model_but_for_digits():
    model = timm.create_model("test_resnet")
    config = timm.data.resolve_model_data_config(model)
    assert normalisation_of(model, "images/") == Normalisation(config["mean"], config["std"])
    assert normalisation_of(model, "digits") == Normalisation(data().mean, data().std)


def top1(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, how: Normalisation) -> float:
    with torch.no_grad():
        return float((model(how.redo(pixels)).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("place", [0, 1], ids=MODELS)
def test_attacks_stay_in_their_bound_and_lower_accuracy(place, models, batch, normalisation):
    model, (pixels, labels) = models[place], batch
    clean = top1(model, pixels, labels, normalisation)
    assert clean > 0.7
    found = {}
    for attack in (fgsm, pgd):
        for epsilon in (0, 2, 16):
            changed = attack(model, pixels, labels, epsilon, normalisation=normalisation)
            assert changed.dtype == torch.float32
            assert 0 <= changed.min() <= changed.max() <= 1
            assert float((changed - pixels).abs().max()) <= epsilon / 255 + 1e-7
            found[attack, epsilon] = top1(model, changed, labels, normalisation)
        assert found[attack, 0] == clean
        assert found[attack, 16] < clean - 0.2
    assert found[pgd, 16] <= found[fgsm, 16]


@settings(max_examples=15, deadline=None)
@given(
    epsilon=st.floats(0, 300),
    steps=st.integers(1, 3),
    step_size=st.none() | st.floats(0, 500),
    seed=st.integers(0, 9),
)
def test_pgd_projects_whatever_its_steps(epsilon, steps, step_size, seed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    pixels, labels = pixels_of(seed, 3, 4, 4), torch.tensor([0, 2, 1])
    options = {"steps": steps, "step_size": step_size, "seed": seed}
    how = Normalisation((0.5,) * 3, (0.2,) * 3)
    changed = pgd(model, pixels, labels, epsilon, normalisation=how, **options)
    assert 0 <= changed.min() <= changed.max() <= 1
    assert float((changed - pixels).abs().max()) <= epsilon / 255 + 1e-6
    alone = [
        pgd(
            model,
            pixels[i : i + 1],
            labels[i : i + 1],
            epsilon,
            normalisation=how,
            first=i,
            **options,
        )
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), changed)


def test_fgsm_is_a_step_along_the_sign_of_the_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    pixels, labels = torch.full((2, 3, 2, 2), 0.5), torch.tensor([0, -1])
    how = Normalisation((0.5,) * 3, (0.5,) * 3)
    changed = fgsm(model, pixels, labels, 51, normalisation=how)
    against = (model[1].weight[1] - model[1].weight[0]).sign().view(3, 2, 2)
    torch.testing.assert_close(changed[0], 0.5 + 0.2 * against)
    assert torch.equal(changed[1], pixels[1])  # no label


def test_sure_predictions_are_attacked_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.ones(12), -torch.ones(12)]) * 2)
        model[1].bias.zero_()
    pixels = torch.full((1, 3, 2, 2), 0.9)  # the logits are 43 apart
    how = Normalisation((0.0,) * 3, (1.0,) * 3)
    changed = fgsm(model, pixels, torch.tensor([0]), 51, normalisation=how)
    torch.testing.assert_close(changed, torch.full_like(pixels, 0.7))


def test_wrong_attacks_are_refused(models, batch, normalisation):
    with pytest.raises(DataError, match="negative"):
        fgsm(models[0], *batch, -1, normalisation=normalisation)
    with pytest.raises(DataError, match="one step"):
        pgd(models[0], *batch, 1, normalisation=normalisation, steps=0)
    with pytest.raises(DataError, match="label 10"):
        fgsm(models[0], batch[0][:1], torch.tensor([10]), 1, normalisation=normalisation)
    cut = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    cut.forward = torch.no_grad()(cut.forward)
    with pytest.raises(TrainingError, match="no gradient"):
        fgsm(cut, *batch, 1, normalisation=normalisation)


class Tiny(nn.Module):
    """Its Grad-CAM is known: the weights of a class, over the number of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(5, 4)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class Last(Tiny):
    """The same with channels last, behind a layer whose maps are none of the image."""

    output_fmt = "NHWC"

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()
        self.heads = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.last(self.features(x).permute(0, 2, 3, 1))
        self.heads(maps.flatten(1, 2)[:, None])
        return self.head(maps.mean((1, 2)))


@pytest.mark.parametrize(("kind", "layer"), [(Tiny, "act"), (Last, "last")])
def test_grad_cam_is_that_of_the_paper(kind, layer):
    torch.manual_seed(0)
    model, images, classes = kind().eval(), torch.randn(3, 3, 6, 8), torch.tensor([0, 3, 1])
    with torch.no_grad():
        maps = model.features(images)
        weights = model.head.weight[classes] / 48
        expected = torch.einsum("nk,nkij->nij", weights, maps).relu()
        predicted = model(images).argmax(1)
    found = grad_cam(model, images, classes)
    assert found.layer == layer
    assert torch.equal(found.predicted, predicted)
    torch.testing.assert_close(found.maps, expected)


@pytest.mark.parametrize(("size", "layer"), [(64, "layer4"), (32, "layer3")])
def test_grad_cam_looks_at_the_last_stage_that_is_spatial(size, layer):
    model = timm.create_model("test_resnet")
    found = grad_cam(model, torch.randn(2, 3, size, size), torch.tensor([1, 2]))
    assert found.layer == layer
    assert found.maps.shape == (2, 2, 2)


def test_grad_cam_needs_maps():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ShapeError, match="2x2 pixels"):
        grad_cam(model, torch.zeros(1, 3, 2, 2), torch.tensor([0]))


@pytest.mark.parametrize("what", ["fgsm", "pgd", "grad_cam"])
def test_models_are_left_as_they_were(what, batch, normalisation):
    model = Tiny()
    model.train()
    model.act.eval()
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    pixels, labels = batch[0][:4], batch[1][:4] % 4
    if what == "grad_cam":
        grad_cam(model, normalisation.redo(pixels), labels)
    else:
        {"fgsm": fgsm, "pgd": pgd}[what](model, pixels, labels, 2, normalisation=normalisation)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert not pixels.requires_grad


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures take as long as all the rest."""
    monkeypatch.setattr("pfsurgery.study.robustness.draw_maps", lambda *args: None)


def told(models, out: Path, **options: object) -> tuple[dict, list[str]]:
    lines: list[str] = []
    options = {"normalisation": Normalisation(data().mean, data().std), **SHORT, **options}
    result = robustness(*models, data().val, out, **{"tell": lines.append, **options})
    return result.to_dict(), lines


def test_the_study(models, tmp_path, monkeypatch):
    found, lines = told(models, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "robustness.json").read_text()) == found
    assert read_run(tmp_path / "run").kind == "robustness"
    assert found["models"] == ["original", "converted"]
    assert found["setting"]["images"] == 40
    assert [(c["name"], c["severity"]) for c in found["corruptions"]] == [
        (name, severity) for name in PARAMETERS for severity in (1, 5)
    ]
    assert [(a["name"], a["epsilon"]) for a in found["attacks"]] == [("fgsm", 8.0), ("pgd", 8.0)]
    for row in (*found["corruptions"], *found["attacks"]):
        assert all(0 <= row["top1"][model] <= 100 for model in MODELS)
    assert all(value > 70 for value in found["clean"].values())
    assert len(lines) == 1 + 2 * len(PARAMETERS) + 2 + 1
    with Image.open(tmp_path / "run" / found["gradcam"]) as picture:
        assert picture.width > 800
        assert picture.height > 1000
    monkeypatch.setattr("pfsurgery.study.robustness.draw_maps", lambda *args: None)
    again, lines = told(models, tmp_path / "run", batch_size=7)
    assert again == found
    assert lines == ["Grad-CAM"]
    # The size of a batch does not matter, nor what was measured beside it.
    other, _ = told(models, tmp_path / "other", batch_size=7, severities=(5,), epsilons=())
    assert other["clean"] == found["clean"]
    assert other["corruptions"] == [row for row in found["corruptions"] if row["severity"] == 5]


@pytest.mark.usefixtures("undrawn")
def test_images_are_spread_over_a_data_set_and_unlabelled_ones_left_out(
    models, normalisation, tmp_path
):
    used: set[int] = set()

    class Watched(Dataset):
        def __len__(self) -> int:
            return 90

        def __getitem__(self, index: int):
            used.add(index)
            image, label = data().val[index]
            return image, torch.tensor(-1) if index == 18 else label

    options = {**SHORT, "severities": (), "epsilons": (), "number": 10}
    result = robustness(*models, Watched(), tmp_path, normalisation=normalisation, **options)
    assert used == set(range(0, 90, 9))
    assert result.setting["images"] == 9
    assert result.setting["data"] == "Watched"


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_study_goes_on(models, tmp_path):
    whole, lines = told(models, tmp_path / "whole")

    def stop(line: str) -> None:
        if line == "jpeg 5":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        told(models, tmp_path / "run", tell=stop)
    assert not (tmp_path / "run" / "robustness.json").exists()
    with (tmp_path / "run" / TRIALS).open("a") as file:
        file.write('{"name": "jpeg", "stren')  # killed while it wrote
    found, rest = told(models, tmp_path / "run")
    assert found == whole
    assert rest == lines[lines.index("jpeg 5") :]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("field", "options"),
    [("seed", {"seed": 1}), ("number", {"number": 8}), ("pgd_steps", {"steps": 3})],
)
def test_another_setting_is_an_error_that_names_it(field, options, models, tmp_path):
    quick = {"severities": (), "epsilons": ()}
    told(models, tmp_path, **quick)
    with pytest.raises(SurgeryError, match=rf"{field} \(then"):
        told(models, tmp_path, **quick, **options)


@pytest.mark.usefixtures("undrawn")
def test_other_models_are_an_error(models, tmp_path):
    quick = {"severities": (), "epsilons": ()}
    told(models, tmp_path, **quick)
    with pytest.raises(SurgeryError, match=r"converted \(then"):
        told((models[0], models[0]), tmp_path, **quick)
    (tmp_path / TRIALS).write_text('{"step": 0}\n')
    with pytest.raises(SurgeryError, match="not of this study"):
        told(models, tmp_path, **quick)


@pytest.mark.usefixtures("undrawn")
def test_images_must_be_labelled(models, tmp_path):
    images = torch.zeros(2, 3, 32, 32)
    for place, wrong in enumerate(([images], TensorDataset(images, torch.tensor([-1, -1])))):
        with pytest.raises(DataError, match="label"):
            robustness(*models, wrong, tmp_path / str(place), number=2)


def test_no_picture_without_maps(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    found, _ = told((model, model), tmp_path, severities=(), epsilons=())
    assert found["gradcam"] is None
    assert not (tmp_path / "gradcam.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_command(cli, tmp_path):
    weights, fast = tmp_path / "weights.safetensors", tmp_path / "fast"
    out = tmp_path / "rob [" / "b] x"  # [/b] is markup of Rich
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), weights)
    small = ("--model", "test_resnet", "--num-classes", 10, "--checkpoint", weights)
    cli("convert", *small, "-p", "avgpool_deep", "--out", fast)
    args = ("study", "robustness", "--model", fast, "--data", "digits", "--out", out)
    asked = cli(*args, "--images", 2)
    assert asked.code == 2
    assert "--checkpoint FILE" in asked.err
    result = cli(*args, "--images", 2, "--checkpoint", weights)
    assert result.code == 0, result.err
    for word in (
        "gaussian_noise",
        "severity 5",
        "epsilon 8/255",
        "pgd",
        "converted",
        "mean",
        str(out),
    ):
        assert word in result.out
    found = json.loads(cli(*args, "--images", 2, "--checkpoint", weights, "--json").out)
    assert found == json.loads((out / "robustness.json").read_text())
    assert (len(found["corruptions"]), len(found["attacks"])) == (25, 8)
    run = read_run(out)
    assert run.model == "test_resnet"
    assert run.command.startswith("pfsurgery study robustness --model ")
    wrong = cli(*args, "--images", 3, "--checkpoint", weights)
    assert wrong.code == 2
    assert "number (then 2, now 3)" in wrong.err
    unconverted = cli(*args[:2], *small[:2], *args[4:])
    assert unconverted.code == 2
    helped = cli("study", "robustness", "--help")
    assert "Example: pfsurgery study robustness" in " ".join(helped.out.split())
