"""Convolutions of every kind: converted, or kept with a reason that is true of that kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod

import pytest
import torch
import torchvision
from timm.layers import (
    BlurPool2d,
    CondConv2d,
    Conv2dSame,
    ConvNormAct,
    MixedConv2d,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import pfsurgery
from pfsurgery import convert, load, plan, record, save, scan
from pfsurgery.errors import ShapeError, SurgeryError
from tests.closed_list import reason_of

EXAMPLE = torch.zeros(1, 3, 17, 17)


class Net(nn.Module):
    """A stem, what is tested, a pointwise convolution and a classifier."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.site = site
        self.mix = nn.LazyConv2d(8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.site(self.stem(x))).mean((2, 3)))


def net(site: nn.Module) -> Net:
    torch.manual_seed(0)
    made = Net(site)
    with torch.no_grad():  # tensors with a history, which old weight norms keep, cannot be copied
        made(EXAMPLE)
    return made


@pytest.mark.parametrize("make", [StdConv2d, ScaledStdConv2d])
@pytest.mark.parametrize("op", ["avg_pool", "avg_down"])
def test_weights_count_as_the_class_applies_them(make, op):
    original = net(make(8, 16, 3, stride=2 if op == "avg_down" else 1, padding=1)).eval()
    fast = convert(original, lambda site: op if site.name == "site" else None, example=EXAMPLE)
    assert record(fast).plans[-1].replaced
    flat = torch.ones(1, 8, 17, 17)
    with torch.no_grad():
        meant, made = original.site(flat), fast.site(flat)
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(made[inside], meant[inside])


def test_a_refit_of_a_layer_that_standardises_its_weight_is_measured_as_it_acts():
    original = net(nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()
    original.mix = StdConv2d(8, 8, 1, bias=True)
    images = torch.randn(64, 3, 17, 17)
    policy = {"site": "avg_pool"}.get
    fast = convert(original, lambda site: policy(site.name), example=images[:1])
    (refit,) = pfsurgery.reconstruct(fast, original, images)
    assert refit.layer == "mix"
    with torch.no_grad():
        seen = [net.mix(net.site(net.stem(images))) for net in (original, fast)]
    meant, made = (x.movedim(1, -1).flatten(0, -2) for x in seen)
    error = (made - meant).square().sum() / (meant - meant.mean(0)).square().sum()
    assert refit.after == pytest.approx(float(error), rel=0.05)
    assert refit.after <= refit.before


CONVERTED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Conv2dSame": (lambda: Conv2dSame(8, 8, 3, 2), ["max_pool"]),
    "StdConv2d": (lambda: StdConv2d(8, 8, 3, padding=1), ["max_pool"]),
    "StdConv2dSame": (lambda: StdConv2dSame(8, 8, 3, 2), ["max_pool"]),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(8, 16, 3, padding=1), ["max_pool+pointwise"]),
    "ScaledStdConv2dSame": (lambda: ScaledStdConv2dSame(8, 8, 3, 2, padding="SAME"), ["max_pool"]),
    "MixedConv2d": (
        lambda: MixedConv2d(8, 8, [3, 5], padding="", depthwise=True),
        ["max_pool", "max_pool"],
    ),
    "MixedConv2d same": (
        lambda: MixedConv2d(8, 8, [3, 5, 7], stride=2, padding="same", depthwise=True),
        ["max_pool"] * 3,
    ),
    "ConvNormAct": (lambda: ConvNormAct(8, 8, 3, stride=2), ["max_pool"]),
    "Conv2dNormActivation": (
        lambda: torchvision.ops.misc.Conv2dNormActivation(8, 8, 5, 2, groups=8),
        ["max_pool"],
    ),
    "in front of a BlurPool": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), BlurPool2d(8)),
        ["max_pool", "keep"],
    ),
    "1x7 and 7x1": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, (1, 7), padding=(0, 3)), nn.Conv2d(8, 8, (7, 1), padding=(3, 0))
        ),
        ["max_pool+pointwise", "max_pool"],
    ),
    "even": (lambda: nn.Conv2d(8, 8, 2, 2), ["max_pool"]),
    "dilated": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2), ["max_pool"]),
    "strided and dilated": (lambda: nn.Conv2d(8, 8, 3, 2, 3, dilation=3), ["max_pool"]),
    "reflect": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), ["max_pool"]),
    "circular": (lambda: nn.Conv2d(8, 8, 5, padding=2, padding_mode="circular"), ["max_pool"]),
    "same": (lambda: nn.Conv2d(8, 8, 4, padding="same"), ["max_pool"]),
    "valid": (lambda: nn.Conv2d(8, 8, 3, padding="valid"), ["max_pool"]),
    "grouped": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=4), ["max_pool+pointwise"]),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("kind", CONVERTED)
def test_these_are_converted(kind):
    make, labels = CONVERTED[kind]
    model = net(make())
    fast = convert(model, "maxpool_all", example=EXAMPLE)
    decided = [d for d in record(fast).plans[0] if d.site.name.startswith("site")]
    assert [d.label for d in decided] == labels
    x = torch.randn(2, 3, 23, 18)
    assert fast.site(torch.randn(2, 8, 23, 18)).shape == model.site(torch.zeros(2, 8, 23, 18)).shape
    fast(x).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


def old_weight_norm(conv: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: parametrizations.weight_norm(conv()), "its weight is parametrised"),
    "weight norm, by hooks": (lambda: old_weight_norm(conv()), "its weight is parametrised"),
    "spectral norm": (lambda: parametrizations.spectral_norm(conv()), "its weight is parametrised"),
    "spectral norm, by hooks": (lambda: nn.utils.spectral_norm(conv()), "weight is parametrised"),
    "orthogonal": (lambda: parametrizations.orthogonal(conv()), "its weight is parametrised"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 2, 2), "transposed: it enlarges its input"),
    "transposed, stride 1": (lambda: nn.ConvTranspose2d(8, 8, 3, padding=1), "the flipped kernel"),
    "even, dilated, same": (lambda: nn.Conv2d(8, 8, 2, padding="same", dilation=2), "every pixel"),
    "padded beyond its reach": (lambda: nn.Conv2d(8, 8, 3, padding=3), "nothing but padding"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore::pfsurgery.errors.NoEffectWarning")
@pytest.mark.parametrize("kind", KEPT)
def test_these_are_kept_and_the_reason_is_theirs(kind):
    make, reason = KEPT[kind]
    model = net(make()).eval()
    decision = plan(model, "maxpool_all", example=EXAMPLE)["site"]
    assert decision.op == "keep"
    assert reason in decision.reason
    assert reason_of(decision.reason)
    fast = convert(model, "maxpool_all", example=EXAMPLE)
    x = torch.randn(1, 3, 17, 17)
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_copied_is_explained():
    model = net(nn.Sequential(conv(), old_weight_norm(conv())))
    model(EXAMPLE)
    with pytest.raises(SurgeryError, match=r"cannot be copied.*torch\.no_grad"):
        convert(model, "maxpool_all", example=EXAMPLE)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore::pfsurgery.errors.NoEffectWarning")
def test_filters_that_are_mixed_for_each_image_are_kept():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route, self.conv = nn.Linear(8, 4), CondConv2d(8, 8, 3, padding=1, num_experts=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x, self.route(x.mean((2, 3))).sigmoid())

    (decision,) = [
        d for d in plan(net(Routed()), "maxpool_all", example=EXAMPLE) if "site" in d.site.name
    ]
    assert "mixed anew for each image" in decision.reason
    assert reason_of(decision.reason)


def test_a_lazy_convolution_is_an_error_that_says_what_to_do():
    with pytest.raises(ShapeError, match=r"site is lazy.*run the model on one batch"):
        scan(Net(nn.LazyConv2d(8, 3)), EXAMPLE)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::pfsurgery.errors.NoEffectWarning")
@pytest.mark.parametrize("aware", [True, False])
def test_quantised_convolutions_are_kept(aware):
    from torch.ao import quantization

    stub = (quantization.QuantStub(), conv(), nn.ReLU(), quantization.DeQuantStub())
    model = net(nn.Sequential(*stub)).train(aware)
    config = quantization.get_default_qat_qconfig if aware else quantization.get_default_qconfig
    model.site.qconfig = config("fbgemm")
    (quantization.prepare_qat if aware else quantization.prepare)(model, inplace=True)
    model(torch.randn(2, 3, 17, 17))
    if not aware:
        quantization.convert(model, inplace=True)
    decision = plan(model.eval(), "maxpool_all", example=EXAMPLE)["site.1"]
    assert decision.site.geometry.kernel_size == (3, 3)
    assert "it is quantised; convert the floating-point model" in decision.reason
    assert reason_of(decision.reason)
    x = torch.randn(1, 3, 17, 17)
    torch.testing.assert_close(convert(model, "maxpool_all", example=EXAMPLE)(x), model(x))


class Signal(nn.Module):
    """A 1-D or 3-D network, as for sound or film: stem, depthwise, dense and strided sites."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        cls = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
        self.stem = nn.Sequential(cls(2, 16, 3, padding=1), norm(16), nn.ReLU(inplace=True))
        self.depthwise = nn.Sequential(cls(16, 16, 5, padding=2, groups=16), norm(16), nn.ReLU())
        self.mix = cls(16, 16, 1)
        self.dense = cls(16, 16, 3, padding="same", dilation=2)
        self.down = nn.Sequential(cls(16, 24, 3, stride=2, padding=1), norm(24), nn.ReLU())
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(self.mix(self.depthwise(self.stem(x))))
        return self.head(self.down(x).flatten(2).mean(2))


def signal(dims: int) -> Signal:
    torch.manual_seed(0)
    return Signal(dims).eval()


SIZES = {1: (2, 41), 3: (2, 7, 9, 8)}


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes_are_scanned(dims):
    sites = {s.name: s for s in scan(signal(dims), torch.zeros(1, *SIZES[dims]))}
    assert list(sites) == ["stem.0", "depthwise.0", "dense", "down.0"]
    assert sites["stem.0"].stem
    depthwise = sites["depthwise.0"]
    assert depthwise.kind == "depthwise"
    assert depthwise.neighbours.norm == "depthwise.1"
    assert depthwise.neighbours.pointwise_after == "mix"
    assert sites["down.0"].geometry.stride == (2,) * dims
    output = sites["down.0"].output_shape
    assert sites["down.0"].positions == prod(output[2:])
    weights = sum(p.numel() for p in signal(dims).down[0].parameters()) - 24
    assert sites["down.0"].macs == weights * prod(output[2:])


@pytest.mark.parametrize("op", ["max_pool", "avg_pool", "shift", "identity", "blur"])
@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes_are_converted(dims, op, tmp_path):
    model, example = signal(dims), torch.zeros(1, *SIZES[dims])
    fast = convert(model, lambda site: op, example=example)
    kept = {"stem.0", "dense"} if op == "avg_pool" else {"stem.0"}  # it has no dilation
    assert {d.site.name for d in record(fast).plans[0] if not d.replaced} == kept
    x = torch.randn(2, *SIZES[dims])
    assert fast(x).shape == model(x).shape
    again = load(save(fast, tmp_path), base=lambda: Signal(dims))
    torch.testing.assert_close(again(x), fast(x))
    fast.train()(x).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())
    torch.testing.assert_close(torch.export.export(again, (x,)).module()(x), again(x))


@pytest.mark.parametrize("dims", [1, 3])
def test_a_max_pool_of_any_dimension_is_the_stock_one(dims):
    pool = {1: F.max_pool1d, 3: F.max_pool3d}[dims]
    fast = convert(signal(dims), "maxpool_all", example=torch.zeros(1, *SIZES[dims]))
    x = torch.randn(2, 16, *SIZES[dims][1:])
    torch.testing.assert_close(fast.depthwise[0](x), pool(x, 5, 1, 2))


@pytest.mark.parametrize("dims", [1, 3])
def test_what_is_fitted_to_images_leaves_signals_and_volumes_alone(dims):
    chosen = pfsurgery.budget(macs="50%")
    sites = scan(signal(dims), torch.zeros(1, *SIZES[dims]))
    from pfsurgery.plan import make_plan

    for decision in make_plan(sites, chosen):
        if not decision.site.stem:
            assert "fitted bottlenecks are for images" in decision.reason


def test_films_from_torchvision_are_converted():
    model = torchvision.models.video.r2plus1d_18(num_classes=4).eval()
    example = torch.zeros(1, 3, 4, 24, 24)
    fast = convert(model, "maxpool_all", example=example)
    sites = [d.site for d in record(fast).plans[0]]
    assert {s.geometry.dims for s in sites} == {3}
    assert len(record(fast).plans[0].replaced) == len(sites) - 1
    assert fast(example).shape == (1, 4)


def test_a_gate_over_channels_is_kept_and_does_not_count_as_a_stage():
    import timm

    plain = {s.name: s for s in scan(timm.create_model("test_resnet"))}
    gated = scan(timm.create_model("test_resnet", block_args={"attn_layer": "eca"}))
    gates = [s for s in gated if s.geometry.dims == 1]
    assert gates
    assert all("channel attention" in s.blocked for s in gates)
    for s in gated:
        if s.name in plain:
            assert s.depth == plain[s.name].depth


class Loose(nn.Module):
    """Functional convolutions on weights that have no module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.filters = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.shared_bias = nn.Parameter(torch.randn(8))
        self.twice = nn.Parameter(torch.randn(8, 1, 5, 5))
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.stem, padding=1)
        x = F.conv2d(x, self.filters, self.shared_bias, padding="same").relu()
        for _ in range(2):
            x = F.conv2d(x, self.twice, self.shared_bias, padding=2, groups=8).relu()
        x = F.conv2d(x, self.blur, padding=1, groups=8)
        return self.head(x.mean((2, 3)))


def export(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (EXAMPLE,)).module()


def decompose(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (EXAMPLE,)).run_decompositions().module()


@pytest.mark.parametrize("how", [torch.fx.symbolic_trace, export, decompose])
def test_loose_weights_of_a_graph_become_sites(how, tmp_path):
    torch.manual_seed(0)
    model = Loose().eval()
    graph = how(model)
    keys = list(graph.state_dict())
    fast = convert(graph, "maxpool_all", example=EXAMPLE)
    assert list(graph.state_dict()) == keys
    decided = {d.site.name: d for d in record(fast).plans[0]}
    assert decided["filters_conv"].label == "max_pool+pointwise"
    assert decided["twice_conv"].label == "max_pool"
    assert decided["twice_conv"].site.calls == 2
    assert decided["stem_conv"].site.stem
    (fixed,) = (d for name, d in decided.items() if ":" in name)
    assert "never trains" in fixed.reason
    assert {"stem", "head.weight", "blur"} <= set(fast.state_dict())
    assert not {"filters", "twice"} & set(fast.state_dict())
    x = torch.randn(1, 3, 17, 17)
    assert fast(x).shape == (1, 5)
    torch.testing.assert_close(graph(x), model(x))
    again = load(save(fast, tmp_path), base=lambda: how(Loose().eval()))
    torch.testing.assert_close(again(x), fast(x))


def test_outside_of_a_graph_they_are_kept_with_the_way_out():
    decided = plan(Loose(), "maxpool_all", example=EXAMPLE)
    assert not decided.replaced
    assert "torch.export.export" in decided["model:conv2d"].reason


@pytest.mark.parametrize("padding", [None, "same"])
def test_hugging_faces_own_convolutions_are_known(padding):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "num_groups": 4}
    bit = transformers.BitConfig(**small, global_padding=padding, layer_type="bottleneck")
    efficient = transformers.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320
    )
    for model, size in (
        (transformers.BitModel(bit).eval(), 75),
        (transformers.EfficientNetModel(efficient).eval(), 64),
    ):
        x = torch.randn(1, 3, size, size)
        fast = convert(model, "maxpool_all", example=x)
        assert all(d.replaced or d.site.stem for d in record(fast).plans[0])
        with torch.no_grad():
            meant, made = (network(x).last_hidden_state for network in (model, fast))
        assert made.shape == meant.shape
