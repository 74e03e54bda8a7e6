"""Layers are refitted one after another without running what lies before them again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pfsurgery
from pfsurgery.errors import UnsupportedSiteError
from pfsurgery.measure import count
from pfsurgery.recover import front

runs: list[str] = []


class Block(nn.Module):
    def __init__(self, name: str, width: int = 8) -> None:
        super().__init__()
        self.name = name
        self.reduce = nn.Conv2d(width, width, 1)
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.expand = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        runs.append(self.name)
        return F.relu(x + self.expand(F.relu(self.spatial(F.relu(self.reduce(x))))))


class Split(nn.Module):
    """Returns more than one tensor, one of them integers."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, int]]:
        return x, (torch.arange(x.shape[-1]), x.shape[-1])


class Winding(nn.Module):
    """Functions, in-place ones too, a shared module and a long skip between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.first, self.second = Block("first"), Block("second")
        self.inner, self.last = Block("inner"), Block("last")
        self.split = Split()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x)) * self.scale
        x = self.act(self.first(x).sub_(0.1))
        x, (index, size) = self.split(x)
        x = x[..., index] / size
        x = self.act(self.second(x) - 0.01)
        skip = x
        x = self.inner(x)
        x += skip
        return self.head(self.last(x).mean((2, 3)))


def images(size: int) -> list[Tensor]:
    return list(torch.randn(20, 3, size, size, generator=torch.Generator().manual_seed(0)).split(8))


def reconstructed(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    fast = pfsurgery.convert(model, "maxpool_all", example=batches[0][:1])
    assert any(refit.layer for refit in pfsurgery.reconstruct(fast, model, batches))
    return fast


def fitted(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    policy = pfsurgery.budget(macs="80%")
    return pfsurgery.convert(model, policy, images=batches, example=batches[0][:1])


def bare(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    return pfsurgery.convert(model, pfsurgery.bare(), images=batches, example=batches[0][:1])


def densenet() -> nn.Module:
    return timm.create_model("densenet121", growth_rate=8, block_config=(2, 2, 2, 2))


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (Winding, reconstructed),
        (Winding, fitted),
        (Winding, bare),
        (densenet, reconstructed),
        (lambda: timm.create_model("test_resnet"), reconstructed),
        (lambda: timm.create_model("test_efficientnet"), bare),
    ],
)
def test_same_as_running_everything_again(
    build: Callable[[], nn.Module],
    make: Callable[[nn.Module, list[Tensor]], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    batches = images(32)
    resumed = make(model, batches).state_dict()
    monkeypatch.setattr(front, "_MEMORY", 0)
    again = make(model, batches).state_dict()
    assert resumed.keys() == again.keys()
    assert all(torch.equal(resumed[name], again[name]) for name in resumed)


class TwoSizes(nn.Module):
    """One pool, called with two sizes of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.relu = nn.AvgPool2d(2), nn.ReLU()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first, self.second = (nn.Conv2d(8, 8, 3, 2, 1) for _ in range(2))
        self.third, self.fourth = (nn.Conv2d(8, 8, 3, 1, 1) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(x) + self.first(x)
        x = self.relu(self.down(x) + self.second(x))
        x = self.fourth(self.third(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def test_a_module_that_gives_several_sizes_is_run() -> None:
    torch.manual_seed(0)
    fast = pfsurgery.convert(TwoSizes().eval(), pfsurgery.budget(macs="60%"), images=images(32))
    assert fast(images(32)[0]).shape == (8, 5)


class Tiles(TwoSizes):
    """Each image is cut into four, which are run as a batch."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tiles = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5)
        made = super().forward(tiles.reshape(4 * n, c, h // 2, w // 2))
        return made.reshape(n, 4, 5).mean(1)


@pytest.mark.parametrize("example", [None, torch.zeros(3, 3, 64, 64)])
def test_a_budget_counts_all_tiles_of_an_image(example: Tensor | None) -> None:
    torch.manual_seed(0)
    model, image = Tiles().eval(), torch.zeros(1, 3, 64, 64)
    sites = pfsurgery.scan(model, example if example is not None else image)
    assert {site.images for site in sites} == {1 if example is None else 3}
    assert {site.input_shape[0] // site.images for site in sites} == {4}
    fast = pfsurgery.convert(
        model, pfsurgery.budget(macs="60%"), images=images(64), example=example
    )
    before, after = (count(m, image).macs for m in (model, fast))
    assert 0.5 * before < after <= 0.6 * before


class SeveralScales(TwoSizes):
    """One convolution, called with two sizes of maps."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = self.third(x).mean((2, 3)) + self.third(self.down(x)).mean((2, 3))
        return self.head(x)


def test_a_convolution_of_several_scales_is_named() -> None:
    torch.manual_seed(0)
    model = SeveralScales().eval()
    with pytest.raises(UnsupportedSiteError, match="third is called with images of several sizes"):
        pfsurgery.convert(model, pfsurgery.budget(macs="95%"), images=images(32))


class Heads(TwoSizes):
    """A head for training alone comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 5)


def test_a_head_for_training_alone_is_left() -> None:
    torch.manual_seed(0)
    model = Heads().eval()
    fast = pfsurgery.convert(model, pfsurgery.budget(macs="95%"), images=images(32))
    assert torch.equal(fast.auxiliary.weight, model.auxiliary.weight)


def test_what_lies_before_a_layer_is_not_run_for_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    model = nn.Sequential(stem, *(Block(str(i)) for i in range(6)), nn.Flatten()).eval()
    batches = images(8)
    fast = pfsurgery.convert(model, "maxpool_all", example=batches[0][:1])
    more_often = []
    for memory in (front._MEMORY, 0):
        monkeypatch.setattr(front, "_MEMORY", memory)
        runs.clear()
        pfsurgery.reconstruct(copy.deepcopy(fast), model, batches)
        more_often.append((runs.count("0") - runs.count("5")) / len(batches))
    assert more_often == [1, 5]  # the last block is run for itself alone
