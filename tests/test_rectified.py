"""Layers refitted to what the ReLU behind them lets through, norms that training starts from."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torchvision.models import resnet18

import pfsurgery
from pfsurgery.graph import view
from pfsurgery.neighbours import is_rectified, neighbours_of_module
from pfsurgery.policy import Policy, Rule
from pfsurgery.recover import refit, site_fit
from pfsurgery.recover.norms import recalibrate, settle
from pfsurgery.recover.readout import Readout, visible
from pfsurgery.recover.refit import layer_aim


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_step_towards_the_visible_rows_raises_the_error_behind_the_relu(seed, added, dead):
    """The distance to the rows bounds it, and is equal to it where the signs agree."""
    torch.manual_seed(seed)
    scale, shift = torch.randn(6), torch.randn(6)
    if dead:
        scale[2] = 0
    weights = scale.abs().double()
    goal, made, step = torch.randn(3, 50, 6).unbind()
    shortcut = torch.randn(50, 6) if added else None
    how = Readout(scale, shift, weights, None, None, rectified=True)
    wanted = visible(goal, made, shortcut, how)
    here = shift if shortcut is None else shift + shortcut

    def raised(rows):
        return (rows * scale + here).clamp_min(0)

    live = scale.abs() > 0
    right = live & ~((made * scale + here <= 0) & (goal * scale + here > 0))
    now = ((wanted - made) * scale).square()
    torch.testing.assert_close(
        now[right], (raised(goal) - raised(made)).square()[right], atol=1e-4, rtol=1e-4
    )
    moved = ((wanted - made - step) * scale).square()
    behind = (raised(goal) - raised(made + step)).square()
    assert bool((moved + 1e-4 >= behind)[live.expand_as(moved)].all())
    assert torch.equal(wanted[:, ~live], goal[:, ~live])


@pytest.mark.parametrize(
    ("make", "layer", "expected"),
    [
        (lambda: timm.create_model("test_resnet"), "layer1.0.conv1", True),
        (lambda: timm.create_model("test_resnet"), "layer1.0.conv2", True),  # behind the shortcut
        (lambda: timm.create_model("resnetv2_18"), "stages.0.blocks.0.conv2", False),  # read twice
        (lambda: timm.create_model("test_vit"), "blocks.0.mlp.fc1", False),  # a GELU
        (lambda: timm.create_model("mobilenetv2_035"), "blocks.1.0.conv_pw", False),  # a ReLU6
        (lambda: timm.create_model("mobilenetv2_035"), "blocks.1.0.conv_pwl", False),  # linear
        (lambda: timm.create_model("vgg11"), "features.3", True),  # no norm
        (lambda: timm.create_model("regnetx_002"), "s1.b1.conv1.conv", True),  # inside of the norm
        (lambda: timm.create_model("regnetx_002"), "s1.b1.conv3.conv", True),
        (resnet18, "layer1.0.conv1", True),  # one ReLU for the whole block
        (resnet18, "layer1.0.conv2", False),  # whose sum cannot be told from its other calls
    ],
)
def test_which_layers_a_relu_reads(make, layer, expected):
    with torch.device("meta"):
        model = make().eval()
    seen = view(model, (torch.zeros(1, 3, 64, 64),))
    around = neighbours_of_module(layer, seen)
    assert is_rectified(layer, around.norm, around.merge, seen) is expected


class Functional(nn.Module):
    """A norm without a module of its own, in a block whose activation is used elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        mean, variance = torch.zeros(4, device=x.device), torch.ones(4, device=x.device)
        return self.last(nn.functional.batch_norm(self.conv(self.act(x)), mean, variance))


class Inside(nn.BatchNorm2d):
    """A norm that ends in an activation which is no module."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.functional.gelu

    def forward(self, x):
        return self.act(super().forward(x))


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), Inside(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


@pytest.mark.parametrize("model", [Functional(), Summed()])
def test_activations_that_are_somewhere_else(model):
    seen = view(model.eval(), (torch.zeros(1, 3, 8, 8),))
    around = neighbours_of_module("conv", seen)
    assert around.merge is None
    assert around.activation is None or isinstance(model, Summed)
    assert not is_rectified("conv", around.norm, around.merge, seen)


class TwoNorms(nn.Module):
    """A convolution that is called twice, with a norm of its own behind each call."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x)).relu())).relu()


def test_where_zero_lies_is_known_of_batch_norms_alone():
    for norm, expected in ((nn.GroupNorm(2, 8), False), (nn.BatchNorm2d(8), True)):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU()).eval()
        seen = view(model, (torch.zeros(1, 3, 8, 8),))
        assert layer_aim(model, model, "0", "0", "0", seen).how.rectified is expected


def test_where_zero_lies_is_not_known_behind_several_norms():
    model = TwoNorms().eval()
    seen = view(model, (torch.zeros(1, 3, 8, 8),))
    assert not layer_aim(model, model, "conv", "conv", "conv", seen).how.rectified


def calibrated(number):
    """A network whose norms know the images, and so many images."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7, zero_init_last=False).eval()
    images = torch.randn(number, 3, 64, 64)
    pfsurgery.recalibrate(model, images)
    return model, images


def left_behind(fast: nn.Module, model: nn.Module, images: torch.Tensor, path: str) -> float:
    """Squared difference of the outputs of the module at `path`."""
    found = []
    for net in (fast, model):
        handle = net.get_submodule(path).register_forward_hook(
            lambda _, __, out: found.append(out.clone())
        )
        with torch.no_grad():
            net(images)
        handle.remove()
    return float((found[0] - found[1]).square().mean())


def test_what_the_relu_lets_through_is_nearer(monkeypatch):
    model, images = calibrated(64)
    left = {}
    for rounds in (0, refit._ROUNDS):
        monkeypatch.setattr(refit, "_ROUNDS", rounds)
        for path, act in (("conv1", "act1"), ("conv2", "act2")):
            fast = pfsurgery.convert(model, "maxpool_all", include=f"layer2.0.{path}")
            (done,) = pfsurgery.reconstruct(fast, model, images)
            assert done.after < done.before
            left[rounds, path] = left_behind(fast, model, images, f"layer2.0.{act}")
    for path in ("conv1", "conv2"):
        assert left[refit._ROUNDS, path] < left[0, path]


@pytest.mark.parametrize(
    ("path", "act"), [("conv1", "act1"), ("conv2", "act2")], ids=["norm", "shortcut"]
)
@pytest.mark.parametrize("thin", [True, False])
def test_what_the_relu_lets_through_is_nearer_in_a_budget(monkeypatch, path, act, thin):
    model, images = calibrated(64)
    left = {}
    for rounds in (0, site_fit._VISIBLE_ROUNDS):
        monkeypatch.setattr(site_fit, "_VISIBLE_ROUNDS", rounds)
        policy = pfsurgery.budget(macs="97%", thin=thin)
        fast = pfsurgery.convert(model, policy, include=f"layer2.0.{path}", images=images)
        assert len(pfsurgery.record(fast).replaced) == 1
        left[rounds] = left_behind(fast, model, images, f"layer2.0.{act}")
    assert 0 < left[rounds] < left[0]


class Recurrent(nn.Module):
    """A convolution that reads what it made, three times in all."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.conv(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["test_resnet", "recurrent"])
def test_what_a_site_reads_need_not_be_held(monkeypatch, name):
    torch.manual_seed(0)
    model, include, share = Recurrent().eval(), "conv", "60%"
    if name == "test_resnet":
        model = timm.create_model(name, num_classes=7, zero_init_last=False).eval()
        include, share = "layer2.0.*", "95%"
    images = torch.randn(32, 3, 64, 64)
    pfsurgery.recalibrate(model, images)
    policy = pfsurgery.budget(macs=share, thin=False)
    held = pfsurgery.convert(model, policy, include=include, images=images)
    monkeypatch.setattr(site_fit, "_MEMORY", 0)
    anew = pfsurgery.convert(model, policy, include=include, images=images)
    assert pfsurgery.record(anew).replaced
    torch.testing.assert_close(anew(images), held(images))


def test_hooks_on_a_convolution_see_what_it_reads_once(monkeypatch):
    model, images = calibrated(64)
    model.layer2[0].conv1.register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    left = {}
    for rounds in (0, site_fit._VISIBLE_ROUNDS):
        monkeypatch.setattr(site_fit, "_VISIBLE_ROUNDS", rounds)
        policy = pfsurgery.budget(macs="97%")
        fast = pfsurgery.convert(model, policy, include="layer2.0.conv1", images=images)
        left[rounds] = left_behind(fast, model, images, "layer2.0.act1")
    assert 0 < left[rounds] < left[0]


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_035"])
def test_training_starts_from_what_was_refitted(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(32, 3, 64, 64)
    pfsurgery.recalibrate(model, images)
    fast = pfsurgery.convert(model, "maxpool_all")
    pfsurgery.reconstruct(fast, model, images)
    norms = [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        with torch.no_grad():
            norm.running_var.mul_(1.7)
            norm.running_mean.add_(0.3 * norm.running_var.sqrt())
    before = fast(images)
    settle(fast, images.split(16), view(model, (images[:1],)))
    torch.testing.assert_close(fast(images), before, atol=1e-4, rtol=1e-4)
    read = {}
    handles = [
        norm.register_forward_pre_hook(lambda module, args: read.update({module: args[0]}))
        for norm in norms
    ]
    fast(images)
    for handle in handles:
        handle.remove()
    assert len(read) == len(norms) > 3
    for norm, x in read.items():
        variance, mean = torch.var_mean(x, (0, 2, 3))
        varies = variance > norm.eps
        torch.testing.assert_close(norm.running_mean[varies], mean[varies], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(norm.running_var[varies], variance[varies], rtol=1e-2, atol=0)


class Offset(nn.BatchNorm2d):
    """A norm that reads its weight in its own way."""

    def forward(self, x):
        return super().forward(x) * (1 + self.weight[:, None, None])


def test_norms_that_cannot_make_up_for_it_stay():
    norms = [nn.BatchNorm2d(3) for _ in range(7)]
    first, second, third, fourth, bound, foreign, plain = norms
    second.weight, second.bias = first.weight, first.bias
    fourth.running_mean = third.running_mean
    register_parametrization(bound, "weight", nn.Softplus())
    bare, offset = nn.BatchNorm2d(3, affine=False), Offset(3)

    class Model(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * self[7].weight.sum() + self.plain(x)

    model = Model(first, second, third, fourth, bound, bare, offset, foreign)
    model.plain = plain
    model.eval()
    before = copy.deepcopy(model.state_dict())
    seen = view(model, (torch.zeros(1, 3, 5, 5),))
    settle(model, [torch.randn(8, 3, 5, 5) + 2, torch.zeros(0, 3, 5, 5)], seen)
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(before[key], value)}
    assert changed == {
        f"plain.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }


def test_weights_of_16_bits_would_be_rounded_and_stay():
    norm = nn.BatchNorm2d(3).bfloat16().eval()
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(8, 3, 5, 5, dtype=torch.bfloat16) + 2
    settle(norm, [x], view(norm, (x,)))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_an_empty_batch_counts_for_nothing():
    norm = nn.BatchNorm2d(3)
    images = torch.randn(8, 3, 5, 5) + 2
    recalibrate(norm, [images[:0], images])
    torch.testing.assert_close(norm.running_mean, images.mean((0, 2, 3)))


def test_a_product_takes_what_a_dropped_norm_and_activation_gave():
    model, images = calibrated(48)
    policy = Policy("short", (Rule("max_pool", tail="drop", name="layer2.0.*"),))
    fast = pfsurgery.convert(model, policy)
    assert isinstance(fast.layer2[0].bn1, nn.Identity)
    away = left_behind(fast, model, images, "layer2.0.act2")
    refits = pfsurgery.reconstruct(fast, model, images)
    assert [r.layer for r in refits] == [f"layer2.0.conv{i}.pointwise" for i in (1, 2)]
    assert all(r.after < r.before for r in refits)
    assert left_behind(fast, model, images, "layer2.0.act2") < 0.5 * away
