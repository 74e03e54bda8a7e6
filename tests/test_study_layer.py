"""The layer-level study: networks, images, trainings that go on, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from pfsurgery.errors import DataError, SurgeryError, UnsupportedSiteError
from pfsurgery.measure import count
from pfsurgery.recover import evaluate
from pfsurgery.run_folder import read_run
from pfsurgery.study import layer
from pfsurgery.study.images import AugmentedBatches, Labelled, study_images
from pfsurgery.study.layer import LayerSetting, layer_study
from pfsurgery.study.networks import bottlenecks, dense_network, with_operations
from tests import test_cli

cli, folder = test_cli.cli, test_cli.folder

TINY = LayerSetting(
    images=24,
    val_images=12,
    size=16,
    layers=(2, 1),
    width=9,
    epochs=1,
    batch_size=8,
    seeds=1,
    ops=("depthwise", "mixed"),
)
EXAMPLE = torch.zeros(1, 3, 16, 16)


def batches(number: int, classes: int = 3, size: int = 16) -> list[tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    labels = torch.arange(number) % classes
    return [(torch.randn(number, 3, size, size) + labels[:, None, None, None], labels)]


def network(op, seed=0):
    dense = dense_network(TINY, channels=3, classes=3, seed=seed)
    sites = [site for site in bottlenecks(dense, EXAMPLE) if not site.geometry.strided]
    return with_operations(dense, sites, [op] * len(sites), EXAMPLE, seed=seed)


@pytest.mark.parametrize("op", LayerSetting(images=None, val_images=None).ops)
def test_networks_of_one_seed_share_all_other_weights(op):
    dense, made = network("dense"), network(op)
    kept = made.state_dict()
    assert made.eval()(EXAMPLE).shape == (1, 3)
    for name, value in dense.state_dict().items():
        if name in kept and kept[name].shape == value.shape:
            assert torch.equal(kept[name], value), name
    strided = "layer2.0.conv2.weight"
    assert torch.equal(kept[strided], dense.state_dict()[strided])
    assert ("layer1.0.conv2.weight" in kept) == (op in ("dense", "depthwise"))
    assert ("layer1.0.bn2.weight" in kept) == (op in ("dense", "depthwise"))


def test_mixed_gives_each_operation_its_share():
    op = network("mixed").layer1[0].conv2
    x = torch.randn(2, 9, 8, 8)
    made = op(x)
    largest, mean = torch.nn.MaxPool2d(3, 1, 1)(x), torch.nn.AvgPool2d(3, 1, 1, False, False)(x)
    assert torch.equal(made[:, :3], largest[:, :3])
    assert torch.allclose(made[:, 3:6], mean[:, 3:6], atol=1e-6)
    assert torch.equal(made[:, 6], x[:, 6])
    assert torch.equal(made[:, 7, 1:, 1:], x[:, 7, :-1, :-1])


def test_a_single_bottleneck_and_wrong_ops():
    dense = dense_network(TINY, channels=3, classes=3, seed=0, single=True)
    (site,) = bottlenecks(dense, EXAMPLE)
    with pytest.raises(UnsupportedSiteError, match="avg_down"):
        with_operations(dense, [site], ["avg_down"], EXAMPLE, seed=0)
    with pytest.raises(SurgeryError, match="No op is named 'max'"):
        with_operations(dense, [site], ["max"], EXAMPLE, seed=0)
    assert count(dense, EXAMPLE).parameters < count(network("dense"), EXAMPLE).parameters


def test_augmented_images_are_moved_and_mirrored():
    pixels = torch.arange(16.0).expand(200, 1, 16, 16)
    images = Labelled(pixels, torch.zeros(200, dtype=torch.long))
    (made, _), (again, _) = (next(iter(AugmentedBatches(images, 100, flip=f))) for f in (0, 1))
    steps = made[:, 0, 8, 5:11].diff()
    assert (steps == 1).all()
    offsets = {float(image[0, 8, 8]) for image in made}
    assert offsets == {6.0, 7.0, 8.0, 9.0, 10.0}
    mirrored = (again[:, 0, 8, 5:11].diff() == -1).all(1)
    assert 20 < int(mirrored.sum()) < 80


def test_images_at_a_path_are_read_as_many_of_each_class(folder):
    setting = replace(TINY, images=6, val_images=4)
    images = study_images(folder, folder, setting)
    assert images.train.pixels.shape == (6, 3, 16, 16)
    assert images.train.labels.bincount().tolist() == [3, 3]
    assert images.val.labels.bincount().tolist() == [2, 2]
    assert images.flip
    halves = images.train.halves()
    assert [half.labels.bincount().tolist() for half in halves] == [[2, 2], [1, 1]]
    assert not study_images("digits", "digits", setting).flip


def test_wrong_images_are_refused(tmp_path, folder):
    train, val = batches(24), batches(12)
    for wrong, message in (
        (batches(12, size=8), "in one size"),
        (batches(12, classes=4), "the label 3, which"),
        ([val[0][0]], "needs labels"),
        ([], "no labelled validation"),
        ([(val[0][0], val[0][1].float())], "one class index"),
    ):
        with pytest.raises(DataError, match=message):
            study_images(train, wrong, TINY)
    with pytest.raises(DataError, match="at least two classes"):
        study_images(batches(12, classes=1), val, TINY)
    with pytest.raises(DataError, match="There is no"):
        layer_study(tmp_path / "none", tmp_path / "none", tmp_path / "out", setting=TINY)
    (tmp_path / "file").touch()
    with pytest.raises(SurgeryError, match="cannot be written"):
        layer_study(train, val, tmp_path / "file", setting=TINY)


@pytest.mark.parametrize(
    "wrong",
    [{"images": 1}, {"val_images": 0}, {"layers": (1, 0)}, {"seeds": 0}, {"lr": 0}, {"ops": ()}],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(SurgeryError, match=next(iter(wrong))):
        replace(TINY, **wrong)


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch):
    train, val = batches(24), batches(12)
    result = layer_study(train, val, tmp_path, setting=TINY)
    assert [(row.place, row.op) for row in result.rows] == [
        (place, op) for place in layer.PLACES for op in TINY.ops
    ]
    written = json.loads((tmp_path / "layer.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert set(written["rows"][0]) == {"place", "op", "top1", "params", "macs", "ms"}
    assert read_run(tmp_path).kind == "layer"

    # Killed in the middle of a line: that training is done again, with the same outcome
    log = tmp_path / "trainings.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:2]) + "\n" + lines[2][:10])
    trained = []
    real = layer.Trainings.top1

    def noted(self, name, make, seed):
        return real(self, name, lambda: trained.append(name) or make(), seed)

    monkeypatch.setattr(layer.Trainings, "top1", noted)
    again = layer_study(train, val, tmp_path, setting=TINY)
    assert trained == ["several-depthwise-0", "several-mixed-0"]
    assert [row.top1 for row in again.rows] == [row.top1 for row in result.rows]
    assert log.read_text().splitlines() == lines

    with pytest.raises(SurgeryError, match=r"different are: epochs \(then 1, now 2\)"):
        layer_study(train, val, tmp_path, setting=replace(TINY, epochs=2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("setting.json", "[1]"),
        ("trainings.jsonl", '{"nme": 1}\n'),
        ("trainings.jsonl", '{"name": "a", "top1": null}\n'),
        ("trainings.jsonl", "5\n"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(SurgeryError, match=name):
        layer_study(batches(24), batches(12), tmp_path, setting=TINY)


def test_a_diverging_training_is_named(tmp_path):
    train = batches(24)
    train[0][0][:] = float("nan")
    with pytest.raises(SurgeryError, match="Training single-depthwise-0: The loss is nan"):
        layer_study(train, batches(12), tmp_path, setting=TINY)


def test_digits_are_learnt(tmp_path):
    setting = replace(
        *(TINY,),
        images=480,
        val_images=200,
        size=32,
        layers=(1, 1),
        stem_stride=4,
        epochs=3,
        batch_size=16,
        ops=("max_pool", "identity"),
    )
    result = layer_study("digits", "digits", tmp_path, setting=setting)
    reached = {(row.place, row.op): row.mean for row in result.rows}
    assert min(reached.values()) > 20
    assert len(set(reached.values())) > 1
    assert all(row.deviation == 0 and row.ms > 0 for row in result.rows)
    assert "max_pool" in str(result)


def test_the_command(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(
        import_module("pfsurgery.cli.study.layer"), "SMALL", replace(TINY, ops=("max_pool",))
    )
    options = ("--images", 20, "--epochs", 2, "--seeds", 1, "--out", tmp_path)
    result = cli("study", "layer", *options)
    assert result.code == 0, result.err
    assert "max_pool" in result.out
    # A second seed is added, the first is not trained again
    more = json.loads(cli("study", "layer", *options, "--seeds", 2, "--json").out)
    assert more["setting"]["images"] == 20
    assert more["setting"]["epochs"] == 2
    assert [len(row["top1"]) for row in more["rows"]] == [2, 2]
    assert len((tmp_path / "trainings.jsonl").read_text().splitlines()) == 4
    changed = cli("study", "layer", *options[2:])
    assert changed.code == 2
    assert "images (then 20, now 24)" in " ".join(changed.err.split())
    assert "Example: pfsurgery" in " ".join(cli("study", "layer", "--help").out.split())


def test_the_augmented_batches_serve_evaluation_too():
    images = Labelled(batches(12)[0][0], batches(12)[0][1])
    assert evaluate(network("shift"), AugmentedBatches(images, 4, flip=False)).images == 12
