"""The base networks of the benchmarks on CIFAR-10: kept in `bases/`, or trained and cached.

Run as a script to train what is missing; import `load_net` and `load_images` to use them:

    python benchmarks/base_nets.py --data DIR --cache DIR --net basic

`DIR` of the data holds `train.tar` and `val.tar`, JPEG files in one folder a class. Accuracy is
counted on all 10,000 validation images. A core needs ten minutes to an hour a network, so they
are kept in `bases/`, kernels in float16, by `--keep`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

CACHE = Path(__file__).parent / "cache"
KEPT = Path(__file__).parent / "bases"
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
BATCH = 128
# Cycles of training: peak rate, side of the random crops in each epoch (small ones are faster).
CYCLES: dict[str, tuple[tuple[float, tuple[int, ...]], ...]] = {
    "basic": ((0.15, (24, 24, 24, 24, 32, 32)), (0.1, (32, 32, 32, 32, 32))),
    "bottleneck": ((0.15, (24, 24, 24, 24, 32, 32)), (0.1, (32, 32, 32, 32, 32, 32))),
    "depthwise": ((0.15, (24, 24, 24, 24, 32, 32)), (0.1, (24, 24, 32, 32))),
}
# A narrow MobileNetV2 for small images, in timm's notation.
INVERTED_RESIDUALS = (
    "ds_r1_k3_s1_c16",
    "ir_r2_k3_s1_e3_c24",
    "ir_r2_k3_s2_e3_c48",
    "ir_r2_k3_s2_e3_c96",
)


def build(net: str) -> nn.Module:
    """An untrained base network for (N, 3, 32, 32) images and 10 classes."""
    if net == "depthwise":
        return EfficientNet(
            decode_arch_def([[stage] for stage in INVERTED_RESIDUALS]),
            num_classes=10,
            num_features=256,
            stem_size=32,
            act_layer=nn.ReLU6,
        )
    if net == "basic":
        model = ResNet(BasicBlock, (2, 2, 2, 1), num_classes=10, channels=(64, 96, 128, 256))
    elif net == "bottleneck":
        model = ResNet(Bottleneck, (2, 2, 2, 1), num_classes=10, channels=(32, 64, 128, 256))
    else:
        raise SystemExit(f"no base network {net!r}: there are {', '.join(CYCLES)}")
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _decode(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) of a tar file with one folder a class."""
    with tarfile.open(path) as tar:
        names = sorted(m.name for m in tar.getmembers() if m.isfile())
        classes = sorted({Path(name).parts[-2] for name in names})
        images = np.empty((len(names), 3, 32, 32), dtype=np.uint8)
        labels = torch.empty(len(names), dtype=torch.long)
        place = {name: i for i, name in enumerate(names)}
        for member in tar:
            if not member.isfile():
                continue
            i = place[member.name]
            file = tar.extractfile(member)
            assert file is not None
            with Image.open(io.BytesIO(file.read())) as image:
                images[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            labels[i] = classes.index(Path(member.name).parts[-2])
    return torch.from_numpy(images), labels


def load_images(split: str, data: Path | None = None, cache: Path = CACHE) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) of `split` ("train" or "val"), shuffled once."""
    stored = cache / f"cifar10_{split}.pt"
    if not stored.exists():
        if data is None:
            raise SystemExit(f"{stored} is not there yet: say where CIFAR-10 is (--data DIR)")
        cache.mkdir(parents=True, exist_ok=True)
        images, labels = _decode(data / f"{split}.tar")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        torch.save({"images": images[order], "labels": labels[order]}, stored)
    both = torch.load(stored)
    return both["images"], both["labels"]


def fingerprint(model: nn.Module) -> str:
    """Tells networks of other weights apart."""
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()[:12]


def normalise(images: Tensor) -> Tensor:
    """Float images (N, 3, H, W), channels last, zero mean and unit variance, of uint8 images."""
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    scaled = images.float().div_(255).sub_(mean).div_(std)
    return scaled.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1 accuracy in percent on uint8 images."""
    model.eval()
    right = sum(
        int((model(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return 100 * right / len(labels)


def augment(images: Tensor, size: int, generator: torch.Generator, pad: int = 2) -> Tensor:
    """Random crops (N, 3, size, size) of zero-padded uint8 images, half of them mirrored."""
    n, _, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = torch.randint(0, h + 2 * pad - size + 1, (n, 1), generator=generator)
    columns = torch.randint(0, w + 2 * pad - size + 1, (n, 1), generator=generator)
    rows, columns = rows + torch.arange(size), columns + torch.arange(size)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    image = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def autocast(model: nn.Module) -> torch.autocast:
    """bfloat16 where the processor multiplies in it, but for networks with depthwise layers."""
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
    multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    enabled = multiplies and not depthwise
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def decayed(model: nn.Module) -> list[dict[str, object]]:
    """Parameter groups: weight decay for kernels, none for norms and biases."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": 5e-4}, {"params": rest, "weight_decay": 0.0}]


def train(net: str, data: Path | None = None, cache: Path = CACHE) -> nn.Module:
    """Trains base network `net` and stores it; its accuracy goes into a JSON file beside it.

    Each cycle is SGD with a one-cycle schedule, an epoch for each crop size. A training that was
    killed goes on behind its last epoch.
    """
    torch.manual_seed(0)
    images, labels = load_images("train", data, cache)
    val = load_images("val", data, cache)
    model = build(net).to(memory_format=torch.channels_last)
    seconds, before = 0.0, 0
    for cycle, (rate, sizes) in enumerate(CYCLES[net]):
        steps = len(labels) // BATCH
        optimiser = torch.optim.SGD(decayed(model), lr=rate, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, rate, total_steps=steps * len(sizes), pct_start=0.25
        )
        generator = torch.Generator().manual_seed(cycle)
        saved = cache / f"{net}.cycle{cycle}.pt"
        first = 0
        if saved.exists():
            kept = torch.load(saved)
            model.load_state_dict(kept["model"])
            optimiser.load_state_dict(kept["optimiser"])
            schedule.load_state_dict(kept["schedule"])
            generator.set_state(kept["generator"])
            first, seconds = kept["epochs"], kept["seconds"]
        for epoch in range(first, len(sizes)):
            start = time.perf_counter()
            loss = _epoch(model, images, labels, sizes[epoch], optimiser, schedule, generator)
            seconds += time.perf_counter() - start
            print(
                f"{net}, epoch {before + epoch + 1}, loss {loss:.3f}, {seconds:.0f} s", flush=True
            )
            kept = {"epochs": epoch + 1, "seconds": seconds, "generator": generator.get_state()}
            kept |= {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(kept | {"schedule": schedule.state_dict()}, saved)
        before += len(sizes)
    top1 = accuracy(model, *val)
    torch.save(model.state_dict(), cache / f"{net}.pt")
    facts = {"top1": top1, "epochs": before, "seconds": seconds}
    (cache / f"{net}.json").write_text(json.dumps(facts, indent=1))
    for cycle in range(len(CYCLES[net])):
        (cache / f"{net}.cycle{cycle}.pt").unlink()
    print(f"{net}: {top1:.2f} % of {len(val[1])} validation images", flush=True)
    return model.eval()


def _epoch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    size: int,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> float:
    """One epoch on crops of `size` pixels; returns the mean loss."""
    model.train()
    steps = len(labels) // BATCH
    total = 0.0
    order = torch.randperm(len(labels), generator=generator)
    for index in order[: steps * BATCH].split(BATCH):
        x = normalise(augment(images[index], size, generator))
        with autocast(model):
            scores = model(x)
        loss = F.cross_entropy(scores.float(), labels[index], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
    return total / steps


def load_net(net: str, data: Path | None = None, cache: Path = CACHE) -> nn.Module:
    """The trained base network `net` in eval mode: the cached one, the kept one, or trained now."""
    model, stored, kept = build(net), cache / f"{net}.pt", KEPT / f"{net}.safetensors"
    if stored.exists():
        model.load_state_dict(torch.load(stored))
    elif kept.exists():
        model.load_state_dict(load_file(kept))  # into float32
    else:
        return train(net, data, cache)
    return model.to(memory_format=torch.channels_last).eval()


def facts_of(net: str, cache: Path = CACHE) -> dict[str, float]:
    """Accuracy of what `load_net` loads, and how long it was trained."""
    cached = cache / f"{net}.json"
    text = (cached if cached.exists() else KEPT / f"{net}.json").read_text()
    return dict(json.loads(text))


def keep(net: str, data: Path | None, cache: Path = CACHE) -> None:
    """Puts the cached network into `bases/`, with the accuracy that its rounded weights have."""
    state = torch.load(cache / f"{net}.pt")
    rounded = {
        name: value.half().contiguous() if value.ndim > 1 else value
        for name, value in state.items()
    }
    KEPT.mkdir(exist_ok=True)
    save_file(rounded, KEPT / f"{net}.safetensors")
    model = build(net)
    model.load_state_dict(rounded)
    top1 = accuracy(model, *load_images("val", data, cache))
    facts = {"top1": top1, "epochs": facts_of(net, cache)["epochs"]}
    (KEPT / f"{net}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{net}: {top1:.2f} % as kept", flush=True)


def main() -> None:
    """Trains the named base networks that are not in the cache yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--net", choices=list(CYCLES), action="append")
    parser.add_argument("--keep", action="store_true", help="put what is cached into bases/")
    args = parser.parse_args()
    for net in args.net or list(CYCLES):
        load_net(net, args.data, args.cache)
        if args.keep:
            keep(net, args.data, args.cache)


if __name__ == "__main__":
    main()
