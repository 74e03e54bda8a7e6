"""Fitted forms beside dense bottlenecks: bare, grouped, depthwise and pointwise sites."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from pfsurgery import bare, budget, convert, load, plan, reconstruct, record, save, scan
from pfsurgery.errors import DataError, NoEffectWarning, UnsupportedSiteError
from pfsurgery.measure import count
from pfsurgery.ops.columns import Columns
from tests import zoo


class Inverted(nn.Module):
    """An inverted residual around a depthwise convolution, and a classifier."""

    def __init__(self, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem = zoo.conv_norm_act(3, 8)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(24)
        self.act1 = act()
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.norm2 = nn.BatchNorm2d(24)
        self.act2 = act()
        self.project = nn.Conv2d(24, 8, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.act2(self.norm2(self.depthwise(self.act1(self.norm1(self.expand(x))))))
        return self.head((x + self.norm3(self.project(y))).mean((2, 3)))


def settled(model: nn.Module, size: int = 16, seed: int = 0) -> nn.Module:
    """A model whose norms know their statistics and have uneven affine parameters."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    for _ in range(20):
        model(torch.randn(8, 3, size, size))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 16, 16, generator=generator) for _ in range(3)]


def distance(one: nn.Module, other: nn.Module, images: list[torch.Tensor]) -> float:
    with torch.no_grad():
        y = torch.cat([one(batch) for batch in images])
        z = torch.cat([other(batch) for batch in images])
    return float((y - z).square().mean() / y.var())


def test_a_pointwise_layer_with_padding_is_not_refitted():
    padded = nn.Conv2d(8, 8, 1, padding=1)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), padded).eval()
    with pytest.warns(NoEffectWarning):
        fast = convert(model, bare(), images=[torch.randn(16, 8, 24, 24)] * 2, include="0")
    assert isinstance(fast[0], nn.Conv2d)


def test_a_depthwise_convolution_that_is_scaled_shifts_is_found_exactly(images):
    torch.manual_seed(0)
    model = settled(Inverted())
    kernel = torch.zeros(24, 1, 3, 3)
    for c in range(24):
        kernel[c, 0, c % 3, (c // 3) % 3] = (-1) ** c * (0.3 + 0.1 * c)
    kernel[5] = 0.4 / 9
    with torch.no_grad():
        model.depthwise.weight.copy_(kernel)
        model.depthwise.weight[5] = 0
        model.depthwise.weight[5, 0, 2, 0] = 2.0
    fast = convert(model, bare(), images=images)
    with torch.no_grad():
        torch.testing.assert_close(fast(images[0]), model(images[0]), atol=1e-4, rtol=1e-4)
    (decision,) = record(fast).plans[0].replaced
    assert (decision.op, decision.tail) == ("bare", "keep")
    assert isinstance(fast.depthwise, Columns)
    assert not list(fast.depthwise.parameters())
    assert decision.parameters_saved == 24 * 9


def test_a_bare_dense_site_drops_norm_and_activation(images):
    torch.manual_seed(0)
    model = settled(timm.create_model("resnet26", num_classes=5, block_args={}), size=32)
    batches = [torch.randn(24, 3, 32, 32) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    fast = convert(model, bare(), images=batches, include="layer2.1.*")
    merely = convert(model, "eff_max", example=batches[0][:1], include="layer2.1.*")
    assert distance(model, fast, batches) < distance(model, merely, batches)
    assert isinstance(fast.layer2[1].bn2, nn.Identity)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    chosen = record(fast).plans[0]
    (decision,) = chosen.replaced
    assert decision.label.startswith("bare 128 (")
    one = batches[0][:1]
    assert count(model, one).macs - count(fast, one).macs == sum(d.macs_saved for d in chosen)
    lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in fast.parameters())
    assert lost == sum(d.parameters_saved for d in chosen)
    with torch.no_grad():
        exported = torch.export.export(fast, (one,)).module()(one)
        torch.testing.assert_close(exported, fast(one))


@pytest.mark.parametrize("name", ["mobilenetv2_035", "convnext_atto", "mobilenetv3_small_050"])
def test_depthwise_families_are_closer_than_merely_converted(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(2)]
    if name != "convnext_atto":
        settled(model, size=32)
    deep = {d.site.name for d in plan(model, "avgpool_deep", example=batches[0][:1]).replaced}
    fast = convert(model, bare(), images=batches, where=lambda site: site.name in deep)
    merely = convert(model, "avgpool_deep", example=batches[0][:1])
    assert distance(model, fast, batches) < distance(model, merely, batches)
    again = load(save(fast, tmp_path), base=lambda: timm.create_model(name, num_classes=5))
    assert torch.equal(again(batches[0]), fast(batches[0]))
    fast.train()
    fast(batches[0]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fast.parameters())


def test_a_budget_spends_on_depthwise_and_grouped_sites(images):
    model = settled(Inverted())
    one = images[0][:1]
    whole = count(model, one).macs
    site = next(s for s in scan(model, one) if s.kind == "depthwise")
    fast = convert(model, budget(macs=whole - site.macs), images=images)
    assert record(fast).plans[0]["depthwise"].op == "bare"
    same = convert(model, budget(macs="100%"), images=images)
    assert not record(same).plans[0].replaced

    torch.manual_seed(0)
    grouped = settled(
        ResNet(
            Bottleneck,
            (1, 1, 1, 1),
            num_classes=5,
            channels=(16, 32, 32, 32),
            cardinality=4,
            base_width=32,
        ),
        size=32,
    )
    batches = [torch.randn(24, 3, 32, 32) for _ in range(2)]
    fast = convert(grouped, budget(macs="95%"), images=batches)
    chosen = record(fast).plans[0]
    assert count(fast, batches[0][:1]).macs <= 0.95 * count(grouped, batches[0][:1]).macs
    assert {d.site.kind for d in chosen.replaced} == {"grouped"}
    assert fast(batches[0]).isfinite().all()


def test_a_grouped_convolution_that_is_shifts_is_found_exactly(images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()
    )
    net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(8, 5)).eval()
    with torch.no_grad():
        net[2].weight.zero_()
        for out in range(8):
            net[2].weight[out, out % 4, out % 3, (out + 1) % 3] = 1.0 + out
    fast = convert(net, budget(macs="65%", thin=False), images=images)
    assert [d.site.kind for d in record(fast).plans[0].replaced] == ["grouped"]
    with torch.no_grad():
        torch.testing.assert_close(fast(images[0]), net(images[0]), atol=1e-5, rtol=1e-4)


def test_pointwise_convolutions_share_the_budget(images, tmp_path):
    model = settled(Inverted())
    one = images[0][:1]
    assert all(site.kind != "pointwise" for site in scan(model, one))
    fast = convert(model, budget(macs="60%", pointwise=True), images=images)
    chosen = record(fast).plans[0]
    kinds = {d.site.kind for d in chosen}
    assert "pointwise" in kinds
    assert chosen.policy == "budget(macs=60%, pointwise=True)"
    assert count(fast, one).macs <= 0.6 * count(model, one).macs
    assert count(model, one).macs - count(fast, one).macs == sum(d.macs_saved for d in chosen)
    assert distance(model, fast, images) < 0.5
    again = load(save(fast, tmp_path), base=Inverted)
    assert torch.equal(again(images[0]), fast(images[0]))
    assert any(not r.layer and r.reason for r in reconstruct(fast, model, images))


def test_low_rank_pointwise_layers_are_found_exactly(images):
    torch.manual_seed(0)
    model = settled(Inverted())
    with torch.no_grad():
        model.project.weight.copy_(
            (torch.randn(8, 2) @ torch.randn(2, 24)).view(8, 24, 1, 1) / 24**0.5
        )
    settled(model)
    whole, saved = count(model, images[0][:1]).macs, (8 * 24 - 2 * (8 + 24)) * 256
    policy = budget(macs=whole - saved, pointwise=True)
    fast = convert(model, policy, images=images, include="project")
    assert record(fast).plans[0]["project"].structure.waist == 2
    with torch.no_grad():
        torch.testing.assert_close(fast(images[0]), model(images[0]), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_very_wide_site_is_fitted_on_its_leading_directions():
    torch.manual_seed(0)
    wide = 768
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, wide, 1), nn.ReLU(),
        nn.Conv2d(wide, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    batches = [torch.randn(16, 3, 12, 12)]
    fast = convert(net, budget(macs="40%"), images=batches)
    (decision,) = record(fast).plans[0].replaced
    assert decision.site.geometry.in_channels == wide
    assert count(fast, batches[0][:1]).macs <= 0.4 * count(net, batches[0][:1]).macs
    assert decision.structure.error < 0.1
    assert distance(net, fast, batches) < 0.05
    assert not record(convert(net, bare(), images=batches)).plans[0].replaced


def test_what_bare_cannot_do_is_said(images):
    model = settled(zoo.Plain())
    chosen = plan(model, lambda site: "bare", example=images[0][:1])
    assert all(not d.replaced and d.reason for d in chosen)
    with pytest.raises(DataError, match="images="):
        convert(settled(Inverted()), bare())
    with pytest.raises(UnsupportedSiteError, match="fitted"):
        plan(settled(Inverted()), "maxpool_all", example=images[0][:1]).set("depthwise", "bare")
