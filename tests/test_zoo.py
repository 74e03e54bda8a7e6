"""The paper's models: sizes, names, and a reference that computes what the paper defines."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pfsurgery
from pfsurgery import zoo
from pfsurgery.errors import RecordMismatchError, SurgeryError
from pfsurgery.measure.count import count

# Parameters, and multiply-adds of convolutions, linear layers and attention at 224 px in G.
SIZES = {
    "resnet50_max": (14_232_232, 2.239),
    "resnet50_hybrid": (17_330_600, 2.586),
    "vit_tiny_max": (6_159_400, 1.245),
    "vit_small_max": (23_819_368, 4.744),
    "vit_base_max": (93_644_008, 18.51),
    "pit_tiny_max": (5_174_504, 0.632),
    "pit_small_max": (25_119_784, 2.813),
    "pit_base_max": (79_005_928, 12.43),
}


# An independent reference with the paper's names, for any widths and depths.


class ConvBN(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, relu=True):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, hybrid: bool) -> None:
        super().__init__()
        self.reduction_block = ConvBN(inputs, width)
        if hybrid and stride == 2:
            self.conv_block = nn.Sequential(nn.AvgPool2d(2), ConvBN(width, width, 3))
        else:
            self.conv_block = nn.MaxPool2d(3, stride, 1)
        self.expansion_block = ConvBN(width, 4 * width, relu=False)
        changes = stride == 2 or inputs != 4 * width
        self.downsample = ConvBN(inputs, 4 * width, 1, stride, relu=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.expansion_block(self.conv_block(self.reduction_block(x)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ReferenceResNet(nn.Module):
    def __init__(self, layers: tuple[int, ...], hybrid: bool, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = ConvBN(3, 64, 7, 2)
        inputs = 64
        for stage, depth in enumerate(layers):
            width, blocks = 64 * 2**stage, []
            for block in range(depth):
                blocks.append(Block(inputs, width, 2 if stage and not block else 1, hybrid))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class Mixer(nn.Module):
    """Attention where `heads` is given, else the efficient layer on a square grid."""

    def __init__(self, width: int, heads: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width if heads else 3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        number, length, width = x.shape
        y = self.qkv(x)
        if self.heads:
            q, k, v = y.view(number, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(number, length, width))
        side = math.isqrt(length)
        image = F.gelu(y).transpose(1, 2).reshape(number, 3 * width, side, side)
        return self.proj(F.gelu(F.max_pool2d(image, 3, 1, 1)).flatten(2).transpose(1, 2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Mixer(width, heads)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def layers(width: int, heads: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(Layer(width, None if i % 2 else heads) for i in range(depth)))


class Named(nn.Module):
    """A module under a name of its own."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ReferenceViT(nn.Module):
    def __init__(self, width: int, heads: int, depth: int = 12, size: int = 224) -> None:
        super().__init__()
        self.patch_embed = Named(proj=nn.Conv2d(3, width, 16, 16))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // 16) ** 2, width))
        self.blocks = layers(width, heads, depth)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


class ReferencePiT(nn.Module):
    def __init__(self, base: int, heads: tuple[int, ...], depth=(2, 6, 4), size: int = 224) -> None:
        super().__init__()
        widths = [base * count for count in heads]
        side = (size - 16) // 8 + 1
        self.patch_embed = Named(conv=nn.Conv2d(3, widths[0], 16, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, widths[0], side, side))
        self.transformers = nn.ModuleList(
            Named(blocks=layers(*stage)) for stage in zip(widths, heads, depth, strict=True)
        )
        self.pools = nn.ModuleList(
            Named(conv=nn.Conv2d(a, b, 3, 2, 1, groups=a)) for a, b in itertools.pairwise(widths)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.conv(x) + self.pos_embed
        for index, stage in enumerate(self.transformers):
            if index:
                x = self.pools[index - 1].conv(x)
            tokens = stage.blocks(x.flatten(2).transpose(1, 2))
            x = tokens.transpose(1, 2).reshape(x.shape)
        return self.head(self.norm(tokens).mean(1))


def randomised(model: nn.Module) -> nn.Module:
    """With norms and biases that matter, as after training."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.ndim == 1 and not name.endswith("norm.weight"):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


SMALL = {
    "resnet50_max": (lambda: ReferenceResNet((2, 1, 2, 1), False), {"layers": (2, 1, 2, 1)}, 64),
    "resnet50_hybrid": (lambda: ReferenceResNet((1, 2, 1, 2), True), {"layers": (1, 2, 1, 2)}, 64),
    "vit_tiny_max": (
        lambda: ReferenceViT(192, 3, depth=4, size=64),
        {"depth": 4, "img_size": 64},
        64,
    ),
    "pit_tiny_max": (
        lambda: ReferencePiT(32, (2, 4, 8), depth=(2, 3, 2), size=96),
        {"depth": (2, 3, 2), "img_size": 96},
        96,
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_paper_checkpoint_gives_the_papers_outputs(name, tmp_path):
    make, kwargs, size = SMALL[name]
    reference = randomised(make())
    torch.save(reference.state_dict(), tmp_path / "paper.pth")
    checkpoint = torch.load(tmp_path / "paper.pth", weights_only=True)
    model = timm.create_model(f"{name}.pf", **kwargs).eval()
    zoo.load_paper_checkpoint(model, checkpoint)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = reference(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    back = zoo.paper_state_dict(model)
    assert set(back) == set(checkpoint)
    assert all(torch.equal(back[key], checkpoint[key]) for key in back)


FULL = {
    "resnet50_max": lambda: ReferenceResNet((3, 4, 6, 3), False),
    "resnet50_hybrid": lambda: ReferenceResNet((3, 4, 6, 3), True),
    "vit_tiny_max": lambda: ReferenceViT(192, 3),
    "vit_small_max": lambda: ReferenceViT(384, 6),
    "pit_tiny_max": lambda: ReferencePiT(32, (2, 4, 8)),
    "pit_small_max": lambda: ReferencePiT(48, (3, 6, 12)),
}


def check_size(name: str) -> nn.Module:
    model = timm.create_model(f"{name}.pf").eval()
    parameters, macs = SIZES[name]
    counted = count(model)
    assert counted.parameters == parameters
    assert counted.macs == pytest.approx(macs * 1e9, rel=0.005)
    config = model.pretrained_cfg
    assert (config["architecture"], config["tag"], config["num_classes"]) == (name, "pf", 1000)
    return model


@pytest.mark.parametrize("name", FULL)
def test_sizes_and_all_names_are_the_papers(name):
    names = zoo.paper_state_dict(check_size(name))
    with torch.device("meta"):
        reference = FULL[name]()
    expected = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {key: tensor.shape for key, tensor in names.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SIZES) - set(FULL)))
def test_sizes_of_the_big_ones_are_the_papers(name):
    check_size(name)


@pytest.mark.parametrize("size", [60, 76, 97])
def test_the_hybrid_takes_odd_sizes(size):
    model = zoo.resnet50_hybrid(layers=(1, 1, 1, 1), num_classes=3).eval()
    assert model(torch.randn(1, 3, size, size + 5)).shape == (1, 3)


def test_a_key_that_does_not_fit_is_named():
    model = zoo.vit_tiny_max(depth=2, img_size=32)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    checkpoint = zoo.paper_state_dict(zoo.vit_tiny_max(depth=2, img_size=32))
    broken = {
        "no place.*Closest: blocks.0.attn.proj.bias": {
            **checkpoint,
            "blocks.0.attn.proj.bia": torch.zeros(1),
        },
        "no key 'head.bias'": {k: v for k, v in checkpoint.items() if k != "head.bias"},
        r"'norm.weight' has shape \(1,\)": {**checkpoint, "norm.weight": torch.zeros(1)},
        "'norm.bias' has shape": {**checkpoint, "norm.bias": "nothing"},
        "'module.pos_embed'": {f"module.{key}": value for key, value in checkpoint.items()},
    }
    for message, state in broken.items():
        with pytest.raises(RecordMismatchError, match=message):
            zoo.load_paper_checkpoint(model, state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(RecordMismatchError, match=r"no key .layer1.0.conv2.weight"):
        zoo.load_paper_checkpoint(timm.create_model("resnet50"), zoo.paper_state_dict(resnet()))
    with pytest.raises(RecordMismatchError, match="The paper has no Linear"):
        zoo.load_paper_checkpoint(nn.Linear(1, 1), {})


def resnet() -> nn.Module:
    return zoo.resnet50_max(layers=(1, 1, 1, 1))


@pytest.mark.parametrize("name", ["resnet50_hybrid", "vit_tiny_max", "pit_tiny_max"])
def test_they_are_saved_and_loaded_like_any_conversion(name, tmp_path):
    _, kwargs, size = SMALL[name]
    model = timm.create_model(f"{name}.pf", num_classes=7, **kwargs).eval()
    pfsurgery.save(model, tmp_path)
    loaded = pfsurgery.load(tmp_path)
    assert type(loaded) is type(model)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(SurgeryError, match="no weights"):
        timm.create_model(f"{name}.pf", pretrained=True)


def test_they_are_timm_models():
    assert set(SIZES) <= set(timm.list_models("*_max", module="zoo")) | set(
        timm.list_models("*_hybrid", module="zoo")
    )
    features = timm.create_model(
        "resnet50_max.pf", features_only=True, out_indices=(1, 2), layers=(1, 1, 1, 1)
    )
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == [256, 512]
    pit = zoo.pit_tiny_max(depth=(1, 2, 1), img_size=64, num_classes=0).eval()
    assert pit(torch.randn(1, 3, 64, 64)).shape == (1, 256)
    pit.reset_classifier(5)
    assert pit(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    _, intermediates = pit.forward_intermediates(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in intermediates] == [64, 128, 256]
    assert pit.no_weight_decay() >= {"pos_embed"}


@pytest.mark.parametrize("name", ["resnet50_max", "vit_tiny_max", "pit_tiny_max"])
def test_a_configuration_is_overlaid(name, tmp_path):
    images = {"input_size": (3, 64, 64), "mean": (0.0, 0.0, 0.0)}
    model = timm.create_model(f"{name}.pf", pretrained_cfg_overlay=images)
    pfsurgery.save(model, tmp_path)
    for made in (model, pfsurgery.load(tmp_path)):
        assert {key: made.pretrained_cfg[key] for key in images} == images
        assert made(torch.zeros(1, *images["input_size"])).shape == (1, 1000)


def test_a_rectangular_vit_of_the_zoo():
    model = zoo.vit_tiny_max(depth=2, img_size=(32, 64), num_classes=3).eval()
    assert model.blocks[1].attn.grid == (2, 4)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 3)
