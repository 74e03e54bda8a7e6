"""Bottlenecks fitted to images: exact where it can be, within budget, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

import pfsurgery
from pfsurgery import Plan, budget, convert, convert_, load, plan, reconstruct, record, save
from pfsurgery.errors import (
    DataError,
    NoSitesError,
    PolicyError,
    RecordMismatchError,
    UnsupportedSiteError,
)
from pfsurgery.measure import count
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.ops.columns import Columns
from pfsurgery.recover import refit_layers
from pfsurgery.recover.columns import operations
from pfsurgery.recover.target import site_window
from pfsurgery.sites import Geometry, Site
from pfsurgery.structure import Run
from tests import zoo
from tests.columns import column_planes


class Net(nn.Module):
    """Stem, a residual block of two dense convolutions, a strided one, a classifier."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = zoo.conv_norm_act(3, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.down = zoo.conv_norm_act(width, 2 * width, stride=2)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.head(self.down(self.act2(x + y)).mean((2, 3)))


def trained_like(seed: int = 0) -> Net:
    """Random weights, norms that know their statistics, affine parameters as after training."""
    torch.manual_seed(seed)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    for _ in range(20):
        model(torch.randn(16, 3, 16, 16))
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


@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize("share", [30, 60])
def test_the_budget_is_kept_and_well_spent(images, share, thin):
    model = trained_like()
    before = copy.deepcopy(model.state_dict())
    fast = convert(model, budget(macs=f"{share}%", thin=thin), images=images)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    one = images[0][:1]
    assert count(fast, one).macs <= share / 100 * count(model, one).macs
    chosen = record(fast).plans[0]
    assert sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in fast.parameters()
    ) == sum(d.parameters_saved for d in chosen)
    assert count(model, one).macs - count(fast, one).macs == sum(d.macs_saved for d in chosen)
    if not thin:
        assert all(d.op == "mixed" for d in chosen.replaced)
    pooled = convert(model, "avgpool_all", example=one)
    assert distance(model, fast, images) < distance(model, pooled, images) / 2
    assert type(fast) is Net
    assert chosen["stem.0"].reason.startswith("stem")


def test_more_budget_is_closer_to_the_original(images):
    model = trained_like()
    away = [
        distance(model, convert(model, budget(macs=f"{share}%"), images=images), images)
        for share in (25, 50, 75)
    ]
    assert away == sorted(away, reverse=True)
    assert away[-1] < 0.02


def test_parameters_may_be_the_limit(images):
    model = trained_like()
    fast = convert(model, budget(params="50%"), images=images)
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in fast.parameters()) <= total / 2


def test_a_convolution_that_is_a_few_shifts_is_found_exactly(images):
    model = trained_like()
    sparse = torch.zeros(12, 12, 3, 3)
    for out in range(12):
        sparse[out, (5 * out) % 12, out % 3, (out // 3) % 3] = 1.5
    for conv in (model.conv1, model.conv2):
        with torch.no_grad():
            conv.weight.copy_(sparse)
    fast = convert(model, budget(macs="55%", thin=False), images=images, include=["conv1", "conv2"])
    assert {d.site.name for d in record(fast).plans[0].replaced} == {"conv1", "conv2"}
    with torch.no_grad():
        torch.testing.assert_close(fast(images[0]), model(images[0]), atol=1e-5, rtol=1e-4)


def test_images_may_come_one_by_one(images):
    """As large ones do, of which a batch holds one."""
    model, one_by_one = trained_like(), torch.cat(images).split(1)
    fast = convert(model, budget(macs="50%"), images=one_by_one)
    together = convert(model, budget(macs="50%"), images=images)
    assert distance(model, fast, images) < 1.5 * distance(model, together, images)


def test_the_same_images_give_the_same_model(images):
    model = trained_like()
    one, two = (convert(model, budget(macs="40%"), images=images) for _ in range(2))
    assert record(one) == record(two)
    assert torch.equal(one(images[0]), two(images[0]))


def test_it_saves_loads_trains_and_exports(images, tmp_path):
    model = trained_like()
    fast = convert(model, budget(macs="35%", thin=False), images=images)
    x = images[0][:4]
    again = load(save(fast, tmp_path), base=Net)
    assert torch.equal(again(x), fast(x))
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), fast(x))
    fast.train()
    fast(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())


def test_a_fitted_plan_survives_json_and_can_be_edited(images):
    fast = convert(trained_like(), budget(macs="35%"), images=images)
    chosen = record(fast).plans[0]
    assert Plan.from_json(chosen.to_json()) == chosen
    assert "relative error" in str(chosen)
    edited = convert(trained_like(), chosen.keep("conv1"), example=images[0][:1])
    assert isinstance(edited.conv1, nn.Conv2d)
    assert isinstance(edited.conv2, Bottleneck)


def test_in_place(images):
    model = trained_like()
    fast = convert(model, budget(macs="40%"), images=images)
    assert convert_(model, budget(macs="40%"), images=images) is model
    assert torch.equal(model(images[0]), fast(images[0]))


def test_train_flags_and_gradients_are_those_of_the_model(images):
    model = trained_like().train()
    model.head.requires_grad_(False)
    fast = convert(model, budget(macs="40%"), images=images)
    assert all(m.training for m in fast.modules())
    assert not fast.head.weight.requires_grad
    assert fast.stem[0].weight.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.randn(1, 3, 16, 16)],
        lambda: [torch.full((8, 3, 16, 16), 0.3)],
        lambda: torch.randn(20, 3, 16, 16),
        lambda: iter([(torch.randn(8, 3, 16, 16), torch.zeros(8))]),
    ],
)
def test_few_or_constant_images_give_a_finite_model(make):
    torch.manual_seed(3)
    model = trained_like()
    with torch.no_grad():
        model.norm1.weight[3] = 1e-20  # a dead channel
    fast = convert(model, budget(macs="40%"), images=make())
    assert fast(torch.randn(2, 3, 16, 16)).isfinite().all()
    assert all(p.isfinite().all() for p in fast.parameters())
    fitted = [m for m in fast.modules() if isinstance(m, Bottleneck)]
    weights = torch.cat([p.detach().flatten() for m in fitted for p in m.parameters()])
    assert weights[weights != 0].abs().min() > 1e-31  # no denormal numbers, which are slow


class PooledNorm(Net):
    """A norm of 1x1 maps before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.BatchNorm2d(24)

    def forward(self, x):
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(self.stem(x))))))
        return self.head(self.pooled(self.down(y).mean((2, 3), keepdim=True)).flatten(1))


def test_one_image_is_enough_for_a_norm_of_1x1_maps():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 16, 16)
    fast = convert(PooledNorm().eval(), budget(macs="50%"), images=image)
    assert fast(image).isfinite().all()


def test_mixing_is_for_rules(images):
    with pytest.raises(PolicyError, match="mixing='never' is for policies of rules"):
        convert(trained_like(), budget(macs="50%"), images=images, mixing="never")


def test_what_cannot_be_done_is_said_and_changes_nothing(images):
    model = trained_like()
    before = copy.deepcopy(model.state_dict())
    broken = [images[0].clone()]
    broken[0][3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        convert_(model, budget(macs="40%"), images=broken)
    with pytest.raises(DataError, match="images="):
        convert_(model, budget(macs="40%"))
    with pytest.raises(DataError, match="no batch"):
        convert_(model, budget(macs="40%"), images=[])
    with pytest.raises(NoSitesError):
        convert_(nn.ReLU(), budget(macs="40%"), images=images)
    fixed = sum(d.site.macs for d in plan(model, "maxpool_all", example=images[0][:1]).replaced)
    rest = count(model, images[0][:1]).macs - fixed
    with pytest.raises(PolicyError, match="least"):
        convert_(model, budget(macs=rest + 10), images=images)
    with pytest.raises(PolicyError, match="costs"):
        convert_(model, budget(macs=10), images=images)
    for wrong in ({}, {"macs": 1, "params": 1}, {"macs": "x"}, {"macs": "-3%"}, {"macs": 0}):
        with pytest.raises(PolicyError, match="budget"):
            budget(**wrong)
    with pytest.raises(UnsupportedSiteError, match="budget"):
        plan(model, "maxpool_all", example=images[0][:1]).set("conv1", "mixed")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@st.composite
def windows(draw):
    kernel = draw(st.sampled_from([(3, 3), (1, 3), (5, 5), (2, 2), (3, 5)]))
    return Geometry(
        6,
        6,
        kernel,
        stride=draw(st.sampled_from([(1, 1), (2, 2), (2, 1)])),
        padding=(kernel[0] // 2, kernel[1] // 2),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(windows(), st.data())
def test_columns_are_those_of_the_reference(geometry, data):
    x = torch.randn(2, 6, 9, 8).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(6, 6, geometry.kernel_size, geometry.stride, geometry.padding)
    site = Site("s", ("s",), "", geometry, tuple(x.shape), tuple(conv(x).shape))
    window = site_window(site)
    ops = operations(window)
    picked = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, len(ops) - 1),
                st.lists(st.integers(0, 5), min_size=1, unique=True).map(sorted),
            ),
            min_size=1,
            unique_by=lambda pick: pick[0],
        ).map(sorted)
    )
    runs = tuple(
        Run(o.kind, o.top, o.left, o.height, o.width, tuple(channels))
        for o, channels in ((ops[place], channels) for place, channels in picked)
    )
    every = column_planes(x, window, ops)
    index = [place * 6 + c for place, channels in picked for c in channels]
    made = Columns(geometry, runs)(x)
    torch.testing.assert_close(made, every[:, index])
    assert made.shape[-2:] == conv(x).shape[-2:]


@pytest.mark.parametrize("policy", ["maxpool_all", "avgpool_all", "shift_all", "eff_max"])
def test_reconstruct_brings_a_converted_model_closer(images, policy):
    model = trained_like()
    fast = convert(model, policy, example=images[0][:1]) if policy != "eff_max" else None
    if fast is None:
        torch.manual_seed(0)
        model = zoo.SharedActivation().eval()
        fast = convert(model, policy, example=images[0][:1])
    before = copy.deepcopy(model.state_dict())
    away = distance(model, fast, images)
    refits = reconstruct(fast, model, images)
    assert distance(model, fast, images) < away
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {r.site for r in refits} == {d.site.name for d in record(fast).plans[0].replaced}
    assert all(r.after <= r.before + 1e-6 for r in refits if r.layer)


@pytest.mark.parametrize("refit", [reconstruct, refit_layers])
def test_a_teacher_of_other_classes_is_refused_at_once(images, refit):
    model, told = trained_like(), []
    fast = convert(model, "shift_all", example=images[0][:1])
    before = copy.deepcopy(fast.state_dict())
    model.head = nn.Linear(24, 7)
    with pytest.raises(RecordMismatchError, match=r"model gives \(1, 5\) and the teacher \(1, 7\)"):
        refit(fast, model, images, tell=told.append)
    assert not told
    assert all(torch.equal(before[key], value) for key, value in fast.state_dict().items())


@pytest.mark.parametrize("refit", [reconstruct, refit_layers])
def test_a_teacher_may_have_another_dtype(images, refit):
    model = trained_like()
    fast = convert(model, "shift_all", example=images[0][:1])
    other = copy.deepcopy(fast)
    refit(fast, model, images)
    model.double()
    before = copy.deepcopy(model.state_dict())
    refit(other, model, images)
    assert all(torch.equal(fast.state_dict()[key], v) for key, v in other.state_dict().items())
    after = model.state_dict()
    assert all(
        v.dtype == after[key].dtype and torch.equal(v, after[key]) for key, v in before.items()
    )


def test_reconstruct_keeps_the_state_dict_names(images, tmp_path):
    model = trained_like()
    fast = convert(model, "shift_all", example=images[0][:1])
    names = list(fast.state_dict())
    reconstruct(fast, model, images)
    assert list(fast.state_dict()) == names
    again = load(save(fast, tmp_path), base=Net)
    assert torch.equal(again(images[0]), fast(images[0]))


def test_layers_whose_norm_was_fused_are_not_refitted(images):
    model = trained_like()
    edited = copy.deepcopy(model)
    edited.conv1 = fuse_conv_bn_eval(edited.conv1, edited.norm1)
    edited.norm1 = nn.Identity()
    refits = {refit.site: refit for refit in refit_layers(edited, model, images)}
    assert refits["conv1"].layer is None
    assert refits["conv1"].reason == "the edited network has no batch norm at norm1"
    assert refits["conv2"].layer == "conv2"
    assert distance(model, edited, images) < 1e-3


def test_layers_that_pad_otherwise_are_not_refitted(images):
    model = trained_like()
    model.conv1 = nn.Conv2d(12, 12, 3, padding=1, bias=False, padding_mode="reflect")
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.conv2.weight[:, 0] = 0
    refits = {refit.site: refit for refit in refit_layers(edited, model, images)}
    assert refits["conv1"].reason == "its padding is reflect, not zeros"
    assert torch.equal(edited.conv1.weight, model.conv1.weight)
    assert refits["conv2"].after < refits["conv2"].before
    ring = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(RecordMismatchError, match=r"maps onto .* \(0: its padding is circular"):
        refit_layers(ring, ring, images)


def test_a_latency_budget_is_spent_on_this_device(images):
    model, told = trained_like(), []
    policy = budget(latency="1000%", batch=4)
    fast = convert(model, policy, images=images, tell=told.append)
    assert any("of the original's time" in line for line in told)
    decided = record(fast).plans[-1]
    assert all("ms" in d.reason for d in decided.replaced)
    assert distance(fast, model, images) < 0.05
    with pytest.raises(PolicyError, match="cannot be met"):
        convert(model, budget(latency="1%", batch=4), images=images)


def test_the_time_of_the_original_can_always_be_met():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).eval()
    images = [torch.randn(2, 3, 6, 6) for _ in range(8)]
    for _ in range(3):
        fast = convert(net, budget(latency="100%", batch=1), images=images)
        assert record(fast).plans[-1].policy == "budget(latency=100%)"


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(
    ("macs", "message"),
    [(25, r"asks for 25 of .* A share is written as"), ("250%", "the model has no more than")],
)
def test_impossible_budgets_are_refused_before_fitting(images, macs, message, search):
    told: list[str] = []
    work = pfsurgery.search if search else convert
    with pytest.raises(PolicyError, match=message):
        work(trained_like(), budget(macs=macs), images=images, tell=told.append)
    assert not any("forms" in line for line in told)


def test_a_latency_budget_is_one_limit():
    with pytest.raises(PolicyError, match="one limit"):
        budget(macs="50%", latency="50%")
    with pytest.raises(PolicyError, match="batch"):
        budget(latency="50%", batch=0)


def test_a_conversion_draws_no_random_numbers_of_the_callers():
    model, images = Net().eval(), [torch.randn(16, 3, 16, 16)]
    before = torch.get_rng_state()
    pfsurgery.convert(model, pfsurgery.budget(macs="60%"), images=images, example=images[0])
    assert torch.equal(before, torch.get_rng_state())


def test_images_of_different_channels_are_told():
    images = [torch.randn(4, 3, 16, 16), torch.randn(4, 1, 16, 16)]
    with pytest.raises(DataError, match=r"\[1, 3\] channels"):
        pfsurgery.convert(Net().eval(), pfsurgery.budget(macs="60%"), images=images)
