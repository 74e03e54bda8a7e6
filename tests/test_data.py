from __future__ import annotations

import io
import logging
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pfsurgery
from pfsurgery.batches import open_images, skipped_images, unlabelled_images
from pfsurgery.data import Augmentation, in_any_order, open_data
from pfsurgery.digits import digits
from pfsurgery.errors import DataError, MissingExtraError
from pfsurgery.images import CheckedImages
from pfsurgery.recover import FinetuneConfig, evaluate
from pfsurgery.recover.source import opened

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def jpeg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 36), (shade, shade, shade)).save(stream, format="JPEG")
    return stream.getvalue()


def fill(folder: Path, classes: int = 2, images: int = 12) -> Path:
    """Class folders c0, c1, ... of grey images; the shade is 100 times the class index."""
    for label in range(classes):
        (folder / f"c{label}").mkdir(parents=True)
        for index in range(images):
            (folder / f"c{label}" / f"{index:03}.jpg").write_bytes(jpeg(100 * label))
    return folder


def tar(folder: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    return path


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=2).eval()


def test_digits_split_is_fixed_stratified_and_disjoint():
    data, again = digits(), digits()
    assert len(data.train) + len(data.val) == 1797
    assert data.num_classes == 10
    images, labels = data.val.tensors
    assert images.shape[1:] == data.input_size == (3, 32, 32)
    assert torch.equal(images, again.val.tensors[0])
    assert torch.bincount(labels).min() >= 43
    train_images = data.train.tensors[0]
    assert abs(float(train_images.mean())) < 1e-3
    assert abs(float(train_images.std()) - 1) < 1e-3


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "pfsurgery\[demo\]"'):
        digits()


@pytest.mark.parametrize("val_name", ["val", "validation", "test"])
def test_folders_with_parts(tmp_path, model, val_name):
    fill(tmp_path / "train", images=10)
    fill(tmp_path / val_name, images=3)
    data = open_data(tmp_path, {**CONFIG, "num_classes": 2}, batch_size=4, workers=0)
    assert data.classes == ("c0", "c1")
    batches = list(data.train)
    assert [len(labels) for _, labels in batches] == [4] * 5
    assert batches[0][0].shape == (4, 3, 32, 32)
    images = torch.cat([images for images, _ in data.val])
    labels = torch.cat([labels for _, labels in data.val])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = (labels * 100 / 255 - 0.5) / 0.5
    assert torch.allclose(images.mean(dim=(1, 2, 3)), expected, atol=0.02)


def test_size_and_normalisation_come_from_the_model(tmp_path, model):
    fill(tmp_path, images=10)
    data = open_data(tmp_path, model, workers=0)
    assert data.input_size == model.pretrained_cfg["input_size"]
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    black = next(iter(data.val))[0][0, 0]
    assert torch.allclose(black, torch.full_like(black, -mean / std), atol=0.02)


def test_one_folder_is_split_by_class(tmp_path):
    fill(tmp_path, images=20)
    data = open_data(tmp_path, CONFIG, batch_size=4, workers=0)
    train, val = data.train.dataset, data.val.dataset
    assert (len(train), len(val)) == (36, 4)
    assert not set(train.indices) & set(val.indices)
    assert sorted(val.labels) == [0, 0, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_tars(tmp_path, workers):
    tar(fill(tmp_path / "a", images=8), tmp_path / "data" / "train.tar")
    tar(fill(tmp_path / "b", images=6), tmp_path / "data" / "val.tar")
    data = open_data(tmp_path / "data", CONFIG, batch_size=3, workers=workers)
    data.val.dataset[0]  # workers forked after a read in this process must not share its position
    for _ in range(2):
        images = torch.cat([images for images, _ in data.val])
        labels = torch.cat([labels for _, labels in data.val])
        assert torch.allclose(images.mean(dim=(1, 2, 3)), (labels * 100 / 255 - 0.5) * 2, atol=0.02)
    assert len(list(data.train)) == 5


def test_fewer_images_than_a_batch(tmp_path):
    fill(tmp_path / "train", images=2)
    fill(tmp_path / "val", images=2)
    data = open_data(tmp_path, CONFIG, batch_size=64, workers=0)
    assert [len(labels) for _, labels in data.train] == [4]


def no_class_folders(path: Path) -> None:
    path.mkdir()
    (path / "loose.jpg").write_bytes(jpeg(0))


def loose_image(path: Path) -> None:
    fill(path)
    (path / "loose.jpg").write_bytes(jpeg(0))


def truncated_tar(path: Path) -> None:
    tar(fill(path / "a"), path / "train.tar")
    (path / "val.tar").write_bytes((path / "train.tar").read_bytes()[:100])


def differing_parts(path: Path) -> None:
    fill(path / "train", classes=3)
    fill(path / "val", classes=2)


def val_only(path: Path) -> None:
    fill(path / "val")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "There is no"),
        (lambda path: path.mkdir(), "holds no images"),
        (lambda path: path.write_text("x"), "neither a folder nor a .tar file"),
        (no_class_folders, "no class folders.*loose.jpg"),
        (loose_image, "images outside of them.*loose.jpg"),
        (truncated_tar, "val.tar cannot be read"),
        (differing_parts, r"c2 \(training\)"),
        (val_only, "no training part"),
        (lambda path: fill(path, images=3), "too few to hold some out"),
    ],
)
def test_what_cannot_be_opened(tmp_path, make: Callable[[Path], object], message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "data", CONFIG, workers=0)


def test_class_count_must_fit(tmp_path, model):
    fill(tmp_path, classes=3)
    with pytest.raises(DataError, match=r"3 classes, but the model gives 2.*num_classes=3"):
        open_data(tmp_path, model)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 5))
    with pytest.raises(DataError, match="the model gives 5"):
        evaluate(plain, tmp_path)


@pytest.mark.parametrize("name", ["hfds/nobody/nothing", "wds/nowhere", "torch/no_such_set"])
def test_names_that_cannot_be_opened(name, tmp_path, capsys):
    with pytest.raises(DataError, match=name):
        open_data(name, CONFIG, root=tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_skipped_and_counted(tmp_path, workers):
    fill(tmp_path / "train", images=10)
    fill(tmp_path / "val", images=10)
    (tmp_path / "val" / "c0" / "004.jpg").write_bytes(b"no image")
    (tmp_path / "val" / "c1" / "002.jpg").write_bytes(jpeg(0)[:300])
    data = open_data(tmp_path, CONFIG, workers=workers)
    labels = torch.cat([labels for _, labels in data.val])
    assert labels.tolist().count(-1) == 2
    assert [Path(name).name for name in skipped_images(data.val)] == ["004.jpg", "002.jpg"]


def test_evaluation_leaves_corrupt_images_out_and_says_so(tmp_path, model, caplog):
    fill(tmp_path, images=10)
    (tmp_path / "c1" / "000.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, logger="pfsurgery"):
        accuracy = evaluate(model, tmp_path)
    assert accuracy.images == 19
    assert "1 images could not be read" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_corrupt_images(tmp_path, workers, model):
    fill(tmp_path / "train", images=10)
    fill(tmp_path / "val", images=10)
    for index in range(4):
        (tmp_path / "val" / "c0" / f"{index:03}.jpg").write_bytes(b"no image")
    data = open_data(tmp_path, CONFIG, workers=workers)
    with pytest.raises(DataError, match=r"^4 of 20 images in .*003\.jpg") as caught:
        evaluate(model, data.val)
    assert "Traceback" not in str(caught.value)


def test_unlabelled_images_from_everything(tmp_path, model):
    images, labels = torch.randn(6, 3, 32, 32), torch.zeros(6, dtype=torch.int64)
    dataset = TensorDataset(images, labels)
    sources = [
        images,
        list(images.split(4)),
        (batch for batch in images.split(4)),
        [(images, labels)],
        [(images, [f"{index}.jpg" for index in range(6)])],  # not needed, so not looked at
        [(images, {"boxes": labels})],
        dataset,
        DataLoader(dataset, batch_size=4),
    ]
    for source in sources:
        assert torch.equal(torch.cat(list(unlabelled_images(source, model, batch_size=4))), images)
    no_class_folders(tmp_path / "flat")
    assert [len(batch) for batch in unlabelled_images(tmp_path / "flat", model)] == [1]


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path, model):
    for label, shade in enumerate((0, 80, 160, 240)):
        for index in range(20):
            path = tmp_path / f"c{label}" / f"{index:02}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (shade,) * 3).save(path)
    first, again = (next(iter(unlabelled_images(tmp_path, model, batch_size=20))) for _ in range(2))
    assert len(first.mean((1, 2, 3)).mul(100).round().unique()) == 4
    assert torch.equal(first, again)


class Endless(Dataset):
    """A million images, those of one shade together."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return image + index / 10**6, 0


@pytest.mark.parametrize("loader", [False, True])
def test_two_thousand_images_of_a_huge_source_are_enough(loader):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Flatten()
    ).eval()
    fast = pfsurgery.convert(model, "maxpool_all", example=torch.zeros(1, 3, 8, 8))
    images = Endless()
    pfsurgery.reconstruct(fast, model, DataLoader(images, batch_size=50) if loader else images)
    assert 1900 <= len(images.read) <= 2100
    assert loader or max(images.read) > 0.9 * 10**6  # not the first ones alone


def test_wrong_batches_are_explained(model):
    with pytest.raises(DataError, match=r"not a tensor of shape \(3, 32, 32\)"):
        list(unlabelled_images([torch.zeros(3, 32, 32)], model))
    with pytest.raises(DataError, match="only once"):
        open_images(iter([]), model, training=True)
    named = [(torch.zeros(2, 3, 32, 32), ["a.jpg", "b.jpg"])]
    with pytest.raises(DataError, match=r"labels of a batch are a list .* class index"):
        evaluate(model, named)
    with pytest.raises(DataError, match="not int"):
        open_images(3, model, training=True)  # type: ignore[arg-type]


def test_digits_by_name():
    model = timm.create_model("test_resnet", num_classes=10)
    data = open_data("digits", model)
    assert sum(len(labels) for _, labels in data.val) == len(digits().val)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_in_memory_are_the_same_and_read_once(tmp_path, workers):
    fill(tmp_path / "train", images=6)
    fill(tmp_path / "val", images=6)
    (tmp_path / "val" / "c0" / "001.jpg").write_bytes(b"no image")
    read = open_data(tmp_path, CONFIG, batch_size=4, workers=workers)
    kept = open_data(tmp_path, CONFIG, batch_size=4, workers=workers, in_memory=True)
    expected = list(read.val)
    assert [Path(name).name for name in skipped_images(kept.val)] == ["001.jpg"]
    for path in (tmp_path / "val").rglob("*.jpg"):
        if path.name != "001.jpg":
            path.unlink()
    for (images, labels), (same_images, same_labels) in zip(expected, kept.val, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_too_many_corrupt_images_in_memory(tmp_path):
    fill(tmp_path / "train", images=10)
    for index in range(4):
        (tmp_path / "train" / "c1" / f"{index:03}.jpg").write_bytes(b"no image")
    fill(tmp_path / "val", images=3)
    with pytest.raises(DataError, match="4 of 20 images"):
        open_data(tmp_path, CONFIG, in_memory=True)


def test_augmentation_is_timms(tmp_path):
    fill(tmp_path / "train", images=6)
    fill(tmp_path / "val", images=6)
    strong = Augmentation(crop_scale=0.9, policy="rand-m9-mstd0.5")
    data = open_data(tmp_path, CONFIG, workers=0, augmentation=strong)
    assert "RandAugment" in repr(data.train.dataset.transform)
    assert "scale=(0.9, 1.0)" in repr(data.train.dataset.transform)
    assert "RandAugment" not in repr(data.val.dataset.transform)
    with pytest.raises(DataError, match=r"rand-m9-mstd0\.5, augmix or 3a"):
        open_data(tmp_path, CONFIG, augmentation=Augmentation(policy="nonsense-m9"))


def test_unlabelled_images_for_training(tmp_path, model):
    fill(tmp_path / "some", images=6)
    for number, path in enumerate(sorted((tmp_path / "some").rglob("*.jpg"))):
        path.rename(tmp_path / f"{number}.jpg")
    loader = open_images(tmp_path, model, training=True, labelled=False, batch_size=4)
    assert [len(images) for images, _ in loader] == [4, 4, 4]
    with pytest.raises(DataError, match="class folders"):
        open_images(tmp_path, model, training=True)


def test_the_training_part_of_a_name_is_not_its_validation_part():
    model = {"num_classes": 10}
    training = [images for images, _ in open_images("digits", model, training=True, labelled=False)]
    assert sum(map(len, training)) == 1352 - 1352 % 64
    held = digits().val.tensors[0]
    calibration = torch.cat(list(unlabelled_images("digits", model)))
    assert torch.equal(calibration, digits().train.tensors[0])
    assert not any(torch.equal(image, held[0]) for image in calibration)


@pytest.mark.parametrize("val", ["held out", None])
def test_where_validation_images_are_apart_all_others_are_trained_on(tmp_path, model, val):
    fill(tmp_path / "held out", images=3)
    source = fill(tmp_path / "all", images=6)
    given = None if val is None else tmp_path / val
    train, held_out = opened(source, given, model, FinetuneConfig(), labelled=True)
    assert len(train.dataset) == 12
    assert held_out is None or len(held_out.dataset) == 6


@pytest.fixture
def mnist(tmp_path, monkeypatch) -> Path:
    """Ten images a part in the files of torchvision's MNIST, which are grey."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    raw = tmp_path / "datasets" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, shade in (("train", 100), ("t10k", 200)):
        images = bytes([shade]) * (10 * 28 * 28)
        header = struct.pack(">iiii", 2051, 10, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images)
        labels = struct.pack(">ii", 2049, 10) + bytes(range(10))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return raw


@pytest.mark.usefixtures("mnist")
def test_images_of_a_name_have_the_colours_of_the_model():
    data = open_data("torch/mnist", {**CONFIG, "num_classes": 10}, workers=0)
    for loader, shade in ((data.train, 100), (data.val, 200)):
        images, _ = next(iter(loader))
        assert images.shape == (10, 3, 32, 32)
        assert torch.allclose(images[0].mean(), torch.tensor((shade / 255 - 0.5) / 0.5), atol=0.02)
    mixed = torch.cat(list(unlabelled_images("torch/mnist", CONFIG)))
    assert mixed.shape == (10, 3, 32, 32)


def test_images_without_known_labels_come_in_any_order(tmp_path):
    """As of readers of hub data sets, which do not tell the labels of all images at once."""
    from timm.data.readers import create_reader

    reader = create_reader("", root=str(fill(tmp_path, images=4)))
    images = CheckedImages(reader, "here", ("c0", "c1"), [], "RGB", training=False)
    mixed = in_any_order(images)
    assert sorted(label for _, label in mixed) == [0] * 4 + [1] * 4
    assert [label for _, label in mixed] != [label for _, label in images]


def test_one_process_reads_where_there_are_no_workers(tmp_path, model):
    fill(tmp_path, images=10)
    assert open_data(tmp_path, model, workers=0).train.persistent_workers is False


def test_no_image_of_one_folder_is_trained_on_and_validated_with(tmp_path, model):
    fill(tmp_path, images=20)
    train, val = opened(str(tmp_path), tmp_path, model, FinetuneConfig(), labelled=True)
    assert [len(loader.dataset) for loader in (train, val)] == [36, 4]
