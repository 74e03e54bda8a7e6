"""Copies for inference: the same outputs, no norms left where they can be folded."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import pfsurgery
from pfsurgery import fuse
from pfsurgery.cli import app
from pfsurgery.errors import RecordMismatchError, SurgeryError, WrappedModelError
from pfsurgery.fold import with_folded_norms
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.ops.pool import AvgPool, MaxPool
from pfsurgery.ops.window import Window
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure

SAME = Window((3, 3), (1, 1), (1, 1))


def trained(model: nn.Module) -> nn.Module:
    """Norms with statistics and weights as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -1.0),
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.bias, -1.0),
            ):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_model_in_bfloat16_stays_as_near_to_float32():
    torch.manual_seed(0)
    model = trained(timm.create_model("resnet10t"))
    x = torch.randn(8, 3, 64, 64)
    narrow = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        wanted = model(x)
        fast = pfsurgery.optimize(narrow, x.bfloat16(), memory_format="channels_last")
        errors = [(m(x.bfloat16()) - wanted).norm() / wanted.norm() for m in (fast, narrow)]
    assert errors[0] < 1.5 * errors[1] < 0.1


@pytest.mark.parametrize(
    ("name", "policy"),
    [("test_resnet", "maxpool_all"), ("test_efficientnet", "avgpool_all"), ("test_byobnet", None)],
)
def test_outputs_stay_and_norms_go(name, policy):
    model = trained(timm.create_model(name))
    if policy:
        model = trained(pfsurgery.convert(model, policy))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = model(x)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        fast = pfsurgery.optimize(model, x)
        torch.testing.assert_close(fast(x), before, rtol=1e-3, atol=1e-4)
    assert type(fast) is type(model)
    assert len(norms(fast)) < len(norms(model)) / 2
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("pool", [MaxPool(SAME), AvgPool(SAME)])
def test_a_norm_is_folded_through_a_pool(pool):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2, 3, 9, 9)
    fast = pfsurgery.optimize(model, x, memory_format="contiguous")
    assert not norms(fast)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_maximum_is_not_crossed_by_a_negative_scale():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), MaxPool(SAME), nn.BatchNorm2d(8)))
    model[2].weight.data[3] = -1
    assert norms(pfsurgery.optimize(model, torch.randn(1, 3, 9, 9))) == ["2"]


def test_a_norm_in_front_of_a_pointwise_convolution_is_folded_into_it():
    model = trained(nn.Sequential(MaxPool(SAME), nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1)))
    x = torch.randn(2, 3, 9, 9)
    fast = pfsurgery.optimize(model, x, memory_format="contiguous")
    assert not norms(fast)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_dead_channel_leaves_no_denormal_weights():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    model[1].weight.data[2] = 1e-39
    fast = pfsurgery.optimize(model, torch.randn(1, 3, 9, 9))
    weight = fast[0].weight
    assert (weight[2] == 0).all()
    assert not ((weight != 0) & (weight.abs() < torch.finfo(torch.float32).tiny)).any()


class Twice(nn.Module):
    """One norm for two convolutions, and a convolution whose output is read beside its norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.shared, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.shared(self.second(self.shared(self.first(x))))
        x = self.first(x)
        return self.last(x) + x


def test_what_is_shared_or_read_elsewhere_is_left_alone():
    model = trained(Twice())
    x = torch.randn(2, 3, 9, 9)
    fast = pfsurgery.optimize(model, x)
    assert norms(fast) == ["shared", "last"]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


class Alias(nn.Module):
    """Layers that have two names, of which the forward pass uses the second."""

    def __init__(self, first: str) -> None:
        super().__init__()
        stem, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.stem = stem if first == "convolution" else nn.Identity()
        self.norm = norm if first == "norm" else nn.Identity()
        self.body = nn.Sequential(stem, norm, nn.ReLU())

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("first", ["convolution", "norm"])
def test_layers_of_two_names_are_folded_at_both(first):
    model, x = trained(Alias(first)), torch.randn(2, 3, 9, 9)
    wanted = model(x)
    for made in (pfsurgery.optimize(model, x), with_folded_norms(model, x)):
        torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-5)
        assert not norms(made)


def test_a_hook_on_what_holds_a_convolution_sees_what_it_saw():
    inner = nn.Sequential(nn.Conv2d(3, 8, 3))
    model, x = trained(nn.Sequential(inner, nn.BatchNorm2d(8))), torch.randn(2, 3, 9, 9)
    seen: list[torch.Tensor] = []
    inner.register_forward_hook(lambda module, inputs, output: seen.append(output))
    wanted = model(x)
    torch.testing.assert_close(with_folded_norms(model, x)(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[-1], seen[0])
    assert not torch.allclose(seen[0], wanted, atol=1e-2)


def test_a_copy_with_folded_norms_shares_the_rest_and_calls_the_same_hooks():
    model = trained(timm.create_model("test_resnet"))
    x = torch.randn(2, 3, 64, 64)
    seen: list[torch.Tensor] = []
    names = norms(model)
    watched = model.get_submodule(names[3])
    handle = watched.register_forward_hook(lambda module, inputs, output: seen.append(output))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(x)
        copied = with_folded_norms(model, x)
        torch.testing.assert_close(copied(x), before, rtol=1e-3, atol=1e-4)
    handle.remove()
    assert norms(copied) == [names[3]]
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-4)
    assert copied.get_classifier().weight is model.get_classifier().weight
    assert norms(model) == names
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_pointwise_convolutions_take_in_the_relu_behind_them(monkeypatch):
    """Were the kernel faster everywhere."""
    monkeypatch.setattr(fuse, "_is_faster", lambda after, before, x: True)
    model, x = trained(timm.create_model("resnet26", num_classes=7)), torch.randn(2, 3, 64, 64)
    fast = pfsurgery.optimize(model, x, memory_format="channels_last")
    for stage in (1, 2, 3, 4):
        block = fast.get_submodule(f"layer{stage}.1")
        assert isinstance(block.conv1, Bottleneck)
        assert block.conv1.relu
        assert isinstance(block.act1, nn.Identity)
        assert isinstance(block.act2, nn.ReLU)  # behind a 3x3
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        hooked = copy.deepcopy(model)
        seen = []
        hooked.layer1[1].act1.register_forward_hook(lambda module, args, out: seen.append(out))
        watched = pfsurgery.optimize(hooked, x, memory_format="channels_last")
        torch.testing.assert_close(watched(x), model(x), rtol=1e-4, atol=1e-4)
    assert not watched.layer1[1].conv1.relu
    assert len(seen) == 1
    assert seen[0].min() == 0


class Pointwise(nn.Module):
    """A pointwise convolution and a ReLU, as `make` puts them together and `use` calls them."""

    def __init__(self, make, use):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU()
        make(self)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def nothing(module):
    pass


def under_another_name(module):
    module.body = nn.Sequential(module.conv, module.relu)


def in_a_list_elsewhere(module):
    module.block = nn.Sequential(module.conv)
    module.order = [module.conv, module.relu]


def with_another(module):
    module.other = nn.Conv2d(8, 8, 1)


TOGETHER = {
    "another name": (under_another_name, lambda m, x: m.body(x)),
    "a list": (in_a_list_elsewhere, lambda m, x: m.order[1](m.order[0](x))),
    "a choice": (
        with_another,
        lambda m, x: m.relu(m.conv(x) if x.shape[-1] == 12 else m.other(x)),
    ),
    "one image": (nothing, lambda m, x: m.relu(m.conv(x[0]))[None]),
    "read twice": (nothing, lambda m, x: m.relu(y := m.conv(x)) + y),
    "called twice": (nothing, lambda m, x: m.relu(m.conv(m.relu(m.conv(x))))),
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_relu_is_where_it_was(name, memory_format, monkeypatch):
    monkeypatch.setattr(fuse, "_is_faster", lambda after, before, x: True)
    torch.manual_seed(0)
    model = Pointwise(*TOGETHER[name]).eval()
    x = torch.randn(2, 8, 12, 12)
    fast = pfsurgery.optimize(model, x, memory_format=memory_format)
    with torch.no_grad():
        for image in (x, x[..., :9, :9]):
            torch.testing.assert_close(fast(image), model(image))


class Expand(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.expand(x)


def fitted():
    taps = tuple(Run("tap", 1, 1, 1, 1, (channel,)) for channel in range(8))
    geometry = Geometry(8, 8, (3, 3), padding=(1, 1))
    return Bottleneck(geometry, Structure("columns", None, taps, None, 0.0))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(8, 8, 1), nn.ReLU()),
        (Expand(), nn.ReLU()),
        (fitted(), nn.ReLU()),
        (nn.Sequential(fitted()), nn.ReLU()),
        (nn.Conv2d(8, 8, 1), nn.Sequential(nn.Identity()), nn.ReLU()),
        (fitted(), nn.Sequential(nn.Identity()), nn.ReLU()),
    ],
)
def test_hooks_see_what_is_in_front_of_a_relu(layers, monkeypatch):
    monkeypatch.setattr(fuse, "_is_faster", lambda after, before, x: True)
    model, x = nn.Sequential(*copy.deepcopy(layers)).eval(), torch.randn(2, 8, 12, 12)
    seen = []
    model[-2].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with torch.no_grad():
        meant = model(x)
        torch.testing.assert_close(pfsurgery.optimize(model, x)(x), meant)
    assert len(seen) > 1
    for made in seen[1:]:
        torch.testing.assert_close(made, seen[0])


class WithNorm(nn.Module):
    """A convolution and norms, in the hands of `use`."""

    def __init__(self, use, norms=1):
        super().__init__()
        self.conv, self.use = nn.Conv2d(8, 8, 3, padding=1), use
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(norms))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.2, 3)

    def forward(self, x):
        return self.use(self, self.conv(x))


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def test_norms_that_compute_something_else_are_not_folded():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), NormAndReLU(8)).eval()
    x = torch.randn(2, 8, 24, 24)
    torch.testing.assert_close(pfsurgery.optimize(model, x)(x), model(x))
    torch.testing.assert_close(with_folded_norms(model, x)(x), model(x))


def test_norms_whose_weights_are_read_elsewhere_are_not_folded():
    def use(module, x):
        norm = module.norms[0]
        return norm(x) * norm.weight.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)

    model, x = WithNorm(use).eval(), torch.randn(2, 8, 24, 24)
    torch.testing.assert_close(pfsurgery.optimize(model, x)(x), model(x))


def test_norms_beside_one_that_the_example_does_not_reach_are_not_folded():
    model = WithNorm(lambda module, x: module.norms[x.shape[-1] != 24](x), norms=2).eval()
    fast = pfsurgery.optimize(model, torch.zeros(1, 8, 24, 24))
    for size in (24, 16):
        x = torch.randn(2, 8, size, size)
        torch.testing.assert_close(fast(x), model(x))


def test_a_compiled_model_is_refused():
    with pytest.raises(WrappedModelError, match="compile"):
        pfsurgery.optimize(torch.compile(nn.Conv2d(3, 3, 3)), torch.zeros(1, 3, 8, 8))


def test_an_optimized_copy_is_not_saved(tmp_path):
    model = pfsurgery.convert(timm.create_model("test_resnet"), "maxpool_all")
    with pytest.raises(RecordMismatchError, match="no record"):
        pfsurgery.save(pfsurgery.optimize(model), tmp_path)
    pfsurgery.save(model, tmp_path)


def test_compare_optimizes_both_sides():
    model = timm.create_model("test_resnet").eval()
    fast = pfsurgery.convert(model, "maxpool_all")
    x = torch.randn(1, 3, 160, 160)
    plain = pfsurgery.compare(model, fast, x, repeats=2, warmup=1)
    both = pfsurgery.compare(model, fast, x, repeats=2, warmup=1, optimized=True)
    assert both.before.count.macs == plain.before.count.macs
    assert both.before.count.parameters < plain.before.count.parameters
    assert both.after.count.parameters < plain.after.count.parameters


def test_the_command_line_compares_optimized_models():
    command = "compare --model test_resnet --policy maxpool_all --optimized --repeats 2 --json"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ratios"]


class Viewed(nn.Module):
    """A network whose code takes views of feature maps, as LeNets do."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 4)
        return self.fc(x.view(x.shape[0], -1))


def test_a_model_that_takes_views_of_its_maps_stays_contiguous():
    model, x = Viewed().eval(), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pfsurgery.optimize(model, x)(x), model(x), rtol=1e-4, atol=1e-5)
    both = pfsurgery.compare(model, model, x, optimized=True, repeats=2, warmup=1)
    assert both.before.count.macs == both.after.count.macs > 0


def test_an_unknown_memory_format_is_told_with_those_that_there_are():
    with pytest.raises(SurgeryError, match="one of fastest, contiguous, channels_last"):
        pfsurgery.optimize(Viewed(), torch.randn(1, 3, 16, 16), memory_format="NHWC")
