"""The converted model is a normal model, and the original is left alone."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import timm
import torch
import torchvision
from torch import fx, nn

import pfsurgery
from pfsurgery import Plan, Policy, Rule, convert, convert_, plan, record
from pfsurgery.errors import (
    NoEffectWarning,
    PatternError,
    PolicyError,
    RecordMismatchError,
    SurgeryError,
    UnknownNameError,
    UnsupportedSiteError,
    WrappedModelError,
)
from pfsurgery.measure import count
from tests import zoo

SIZES = (192, 208, 224, 232, 240, 256)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(name: str = "test_resnet", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs).eval()


@pytest.mark.parametrize(
    "make", [lambda: timm.create_model("resnet50"), torchvision.models.resnet50]
)
@pytest.mark.parametrize(
    ("policy", "expected", "gmacs"),
    [("eff_max", 14_232_232, 2.239), ("eff_hybrid", 17_330_600, 2.586)],
)
def test_the_papers_networks_are_exact(make, policy, expected, gmacs):
    model = make()
    assert parameters(model) == 25_557_032
    fast = convert(model, policy).eval()
    assert parameters(fast) == expected
    assert count(fast, torch.zeros(1, 3, 224, 224)).macs / 1e9 == pytest.approx(gmacs, abs=6e-4)
    chosen = record(fast).plans[0]
    assert sum(d.parameters_saved for d in chosen) == 25_557_032 - expected
    with torch.no_grad():
        assert fast(torch.zeros(1, 3, 208, 208)).shape == (1, 1000)
        fast.to("meta")
        for size in SIZES:
            assert fast(torch.zeros(1, 3, size, size, device="meta")).shape == (1, 1000)


def test_a_converted_model_keeps_class_methods_names_and_values():
    model = small()
    fast = convert(model, "maxpool_all")
    assert type(fast) is type(model)
    assert fast.pretrained_cfg == model.pretrained_cfg
    assert fast.get_classifier() is fast.fc
    x = torch.randn(1, 3, 64, 64)
    assert fast.forward_features(x).shape == model.forward_features(x).shape
    state, kept = model.state_dict(), fast.state_dict()
    replaced = {d.site.name for d in record(fast).plans[0].replaced}
    touched = {key for key in state if key.rpartition(".")[0] in replaced}
    assert set(state) - set(kept) == touched
    assert all(torch.equal(state[key], kept[key]) for key in set(state) & set(kept))
    fast.reset_classifier(3)
    assert fast(x).shape == (1, 3)


def test_hooks_of_the_user_are_kept_and_fire():
    model = small()
    seen = []
    block, site = "layer2.0", "layer2.0.conv1"
    model.get_submodule(block).register_forward_hook(lambda *_: seen.append("block"))
    model.get_submodule(site).register_forward_hook(lambda *_: seen.append("site"))
    fast = convert(model, "maxpool_all")
    assert seen == []
    fast(torch.zeros(1, 3, 64, 64))
    assert seen == ["site", "block"]


def test_full_backward_hooks_of_the_user_fire():
    model = small()
    seen = []
    model.layer2[0].conv1.register_full_backward_hook(lambda *_: seen.append("site"))
    fast = convert(model, "maxpool_all")
    fast(torch.randn(1, 3, 64, 64)).sum().backward()
    assert seen == ["site"]


@pytest.mark.parametrize("policy", ["maxpool_all", "shift_all", "eff_hybrid"])
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_convnext"])
def test_it_trains_copies_and_converts_twice_alike(name, policy):
    model = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        fast, again = convert(model, policy), convert(model, policy)
    x = torch.randn(2, 3, 64, 64)
    assert record(fast) == record(again)
    assert torch.equal(fast(x), again(x))
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    fast.train()
    assert all(m.training for m in fast.modules())
    fast(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())
    assert not any(m.training for m in fast.eval().modules())


def test_converting_a_second_time_changes_nothing():
    fast = convert(small(), "maxpool_all")
    with pytest.warns(NoEffectWarning, match="changes nothing"):
        again = convert(fast, "maxpool_all")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fast(x), again(x))


def test_it_compiles_and_exports():
    fast = convert(small(), "maxpool_all")
    x = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(x), fast(x))
    exported = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(exported(x), fast(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", zoo.TRAPS)
def test_no_trap_catches_it(make, training):
    torch.manual_seed(0)
    model = make().train(training)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    fast = convert(model, "maxpool_all", example=zoo.EXAMPLE)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training == training
    assert all(m.training == training for m in fast.modules())
    x = torch.randn(2, 3, 16, 16)
    made, meant = fast(x), model(x)
    assert type(made) is type(meant)
    if isinstance(made, torch.Tensor):
        assert made.shape == meant.shape
        made.sum().backward()


def test_identity_does_not_let_an_in_place_activation_reach_the_shortcut():
    model = zoo.InPlaceAfter().eval()
    fast = convert(model, lambda site: None if site.stem else "identity", example=zoo.EXAMPLE)
    x = torch.randn(1, 3, 16, 16)
    stem = fast.stem(x)
    torch.testing.assert_close(fast(x), fast.head(stem.relu() + stem))


def test_a_shared_activation_is_not_dropped():
    fast = convert(zoo.SharedActivation(), "eff_max", example=zoo.EXAMPLE)
    assert isinstance(fast.relu, nn.ReLU)
    assert isinstance(fast.norm2, nn.Identity)


def test_an_alias_stays_one_module():
    fast = convert(zoo.Aliased(), "maxpool_all", example=zoo.EXAMPLE)
    assert fast.dense is fast.again
    assert fast.dense[0] is fast.again[0]


class Listed(nn.Module):
    """Runs its layers from a plain container, as Hugging Face's MaskFormer does."""

    def __init__(self, container: type) -> None:
        super().__init__()
        self.stem = zoo.conv_norm_act(3, 8)
        layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)]
        for place, layer in enumerate(layers):
            self.add_module(str(place), layer)
        self.layers = dict(enumerate(layers)) if container is dict else container(layers)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers.values() if isinstance(self.layers, dict) else self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("container", [list, tuple, dict])
def test_layers_in_a_plain_container_are_replaced_there_too(container):
    model = Listed(container).eval()
    fast = convert(model, "maxpool_all", example=zoo.EXAMPLE)
    assert [d.site.name for d in record(fast).plans[-1].replaced] == ["0"]
    first = next(iter(fast.layers.values())) if container is dict else fast.layers[0]
    assert first is fast.get_submodule("0")
    assert not isinstance(first, nn.Conv2d)
    assert count(fast, zoo.EXAMPLE).macs < count(model, zoo.EXAMPLE).macs


class Nested(Listed):
    """Runs its layers from a container within a container, which surgery does not look into."""

    def __init__(self) -> None:
        super().__init__(list)
        self.layers = [[layer] for layer in self.layers]

    def forward(self, x):
        x = self.stem(x)
        for (layer,) in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def test_a_convolution_that_is_run_from_elsewhere_is_refused():
    model = Nested().eval()
    with pytest.raises(UnsupportedSiteError, match="0: the code of Nested would still run"):
        convert_(model, "maxpool_all", example=zoo.EXAMPLE)
    assert isinstance(model.get_submodule("0"), nn.Conv2d)


def test_channels_that_change_get_a_pointwise_convolution_that_is_named():
    model = zoo.Plain()
    chosen = plan(model, "maxpool_all", example=zoo.EXAMPLE)
    assert chosen["down.0"].label == "max_pool+pointwise"
    assert chosen["dense.0"].label == "max_pool+pointwise"
    assert chosen["stem.0"].label == "keep"
    never = plan(model, "maxpool_all", example=zoo.EXAMPLE, mixing="never")
    assert not never.replaced
    fast = convert(model, chosen, example=zoo.EXAMPLE)
    assert fast.down[0].pointwise.weight.shape == (16, 8, 1, 1)
    assert chosen["down.0"].parameters_saved == 16 * 8 * 8
    assert parameters(model) - parameters(fast) == sum(d.parameters_saved for d in chosen)


def test_on_a_constant_image_average_and_pointwise_do_what_the_convolution_did():
    model = zoo.Plain().eval()
    fast = convert(model, "avgpool_all", example=zoo.EXAMPLE)
    x = torch.full((1, 8, 16, 16), 0.7)
    torch.testing.assert_close(
        fast.dense[0](x)[..., 4:-4, 4:-4], model.dense[0](x)[..., 4:-4, 4:-4]
    )


def test_in_place_conversion_returns_the_model_itself():
    model = small()
    assert convert_(model, "maxpool_all") is model
    assert record(model).plans[0].policy == "maxpool_all"


@pytest.mark.parametrize("make", [convert, convert_])
def test_a_failed_conversion_leaves_the_model_as_it_was(make):
    model = zoo.Plain()
    broken = plan(model, "maxpool_all", example=zoo.EXAMPLE).to_dict()
    broken["decisions"][2]["site"]["output_shape"][-1] = 5
    before = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    with pytest.raises(UnsupportedSiteError, match=r"down\.0"):
        make(model, Plan.from_dict(broken), example=zoo.EXAMPLE)
    assert list(model.modules()) == modules
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(RecordMismatchError):
        record(model)


def test_a_plan_of_another_model_is_refused():
    chosen = plan(small(), "maxpool_all")
    with pytest.raises(RecordMismatchError, match="the plan was made for"):
        convert(small(in_chans=3, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32)), chosen)
    with pytest.raises(RecordMismatchError, match="has no module"):
        convert(zoo.Plain(), chosen, example=zoo.EXAMPLE)


def test_selection():
    model = small()
    names = {s.name for s in pfsurgery.scan(model)}

    def changed(**kwargs) -> set[str]:
        return {d.site.name for d in plan(model, "maxpool_all", **kwargs).replaced}

    layer2 = {name for name in names if name.startswith("layer2")}
    assert changed(include="layer2.*") == layer2
    assert changed(exclude=["re:layer[13].*", "layer4.*", "conv1.*"]) == layer2
    assert changed(where=lambda site: "layer2" in site.name) == layer2
    assert "conv1.0" not in changed()
    assert changed(include=["conv1.0"]) == {"conv1.0"}
    with pytest.raises(PatternError, match=r"layer9.*matches no site.*layer"):
        plan(model, "maxpool_all", exclude=["layer9.*"])
    with pytest.raises(PatternError, match="not a regular expression"):
        plan(model, "maxpool_all", include="re:(")
    for wrong in (3, [3]):
        with pytest.raises(PatternError, match="not by the int 3"):
            plan(model, "maxpool_all", include=wrong)


def test_errors_name_what_was_meant():
    model = zoo.Plain()
    with pytest.raises(UnknownNameError, match="maxpool_deep"):
        convert(model, "maxpool_dep", example=zoo.EXAMPLE)
    with pytest.raises(WrappedModelError):
        convert(torch.compile(model), "maxpool_all")
    chosen = plan(model, "maxpool_all", example=zoo.EXAMPLE)
    with pytest.raises(PolicyError, match="carried out as it stands"):
        convert(model, chosen, example=zoo.EXAMPLE, exclude="dense.0")
    with pytest.raises(SurgeryError, match="mixing"):
        plan(model, "maxpool_all", example=zoo.EXAMPLE, mixing="sometimes")
    with pytest.raises(UnknownNameError, match="max_pool"):
        convert(model, lambda site: "maxpol", example=zoo.EXAMPLE)


def test_a_traced_graph_module_is_rewritten():
    model = small()
    traced = fx.symbolic_trace(model)
    fast = convert(traced, "maxpool_all", example=torch.zeros(1, 3, 64, 64))
    assert isinstance(fast, fx.GraphModule)
    x = torch.randn(1, 3, 64, 64)
    meant = convert(model, "maxpool_all", example=torch.zeros(1, 3, 64, 64))(x)
    torch.testing.assert_close(fast(x), meant)
    torch.testing.assert_close(copy.deepcopy(fast)(x), meant)
    assert record(copy.deepcopy(fast)) == record(fast)


class FunctionalGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.site = nn.Module()
        self.site.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.site.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = nn.functional.conv2d(x, self.inner.weight, padding=1).relu()
        x = nn.functional.conv2d(x, self.site.weight, bias=self.site.bias, padding=1)
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "how", [fx.symbolic_trace, lambda m: torch.export.export(m, (zoo.EXAMPLE,)).module()]
)
def test_functional_convolutions_of_a_graph_become_sites(how):
    model = FunctionalGraph().eval()
    traced = how(model)
    keys = set(traced.state_dict())
    assert {s.name for s in pfsurgery.scan(traced, zoo.EXAMPLE)} == {"inner", "site"}
    assert set(traced.state_dict()) == keys
    fast = convert(traced, "avgpool_all", example=zoo.EXAMPLE)
    assert [d.label for d in record(fast).plans[0]] == ["keep", "avg_pool+pointwise"]
    assert fast(torch.randn(1, 3, 16, 16)).shape == (1, 8)
    torch.testing.assert_close(traced(zoo.EXAMPLE), model(zoo.EXAMPLE))


def test_a_policy_of_rules_first_match_wins():
    policy = Policy(
        "mine",
        (
            Rule("keep", name="layer1.*"),
            Rule("shift", stride=True),
            Rule("avg_pool", depth="deep"),
            Rule("blur"),
        ),
    )
    for d in plan(small(), policy):
        if d.site.stem or d.site.name.startswith("layer1"):
            assert d.op == "keep"
        elif d.site.geometry.stride != (1, 1):
            assert d.op == "shift"
        else:
            assert d.op == ("avg_pool" if d.site.depth >= 0.5 else "blur")


def test_a_weight_that_a_graph_reads_twice_with_other_settings_is_left_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.a = nn.Module()
            self.a.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
            self.site = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            y = nn.functional.conv2d(x, self.a.weight, padding=1)
            y = y + nn.functional.conv2d(x, self.a.weight, padding=2, dilation=2)
            return self.site(y).mean((2, 3))

    traced = fx.symbolic_trace(Twice().eval())
    x = torch.randn(1, 3, 16, 16)
    fast = convert(traced, "maxpool_all", example=zoo.EXAMPLE, include="site")
    fast.site = traced.site
    torch.testing.assert_close(fast(x), traced(x))


def test_settings_of_a_users_own_op_are_kept():
    class Shuffle(pfsurgery.Op):
        name = "test_shuffle"
        summary = "test"

        def build(self, site):
            return nn.ChannelShuffle(4)

    from pfsurgery.ops.base import _REGISTRY

    pfsurgery.register_op(Shuffle())
    try:
        depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), depthwise, nn.Conv2d(8, 8, 1))
        fast = convert(model, lambda s: None if s.stem else "test_shuffle", example=zoo.EXAMPLE)
        assert fast[1].groups == 4
    finally:
        _REGISTRY.pop("test_shuffle")


def test_dataclass_outputs_and_sizes_that_depend_on_values():
    @dataclasses.dataclass
    class Out:
        logits: torch.Tensor

    class Wrapped(zoo.Plain):
        def forward(self, x):
            return Out(super().forward(x))

    class Selecting(zoo.Plain):
        def forward(self, x):
            y = super().forward(x)
            return y[y > 0]

    for make in (Wrapped, Selecting):
        assert record(convert(make(), "maxpool_all", example=torch.randn(1, 3, 16, 16)))


def test_a_model_converted_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        fast = convert(zoo.Plain(), "maxpool_all", example=zoo.EXAMPLE)
    fast(torch.randn(2, 3, 16, 16)).sum().backward()


def test_code_that_reads_a_bias_is_noticed():
    class Reads(zoo.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.dense[0] = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.dense(self.stem(x)) + self.dense[0].bias.view(1, -1, 1, 1)
            return self.head(self.down(x).mean((2, 3)))

    assert "also read by" in plan(Reads(), "maxpool_all", example=zoo.EXAMPLE)["dense.0"].reason


def test_a_dropped_tail_goes_at_every_name():
    class Twofold(zoo.SharedActivation):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Sequential(self.norm2)

    fast = convert(Twofold(), "eff_max", example=zoo.EXAMPLE)
    assert isinstance(fast.again[0], nn.Identity)
    assert fast.again[0] is fast.norm2


@pytest.mark.parametrize("policy", ["shift_all", "maxpool_all", "avgpool_all"])
def test_export_with_free_height_and_width(policy):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    fast = convert(model, policy, example=zoo.EXAMPLE, include="1").eval()
    free = {2: torch.export.Dim("h", min=8, max=64), 3: torch.export.Dim("w", min=8, max=64)}
    exported = torch.export.export(fast, (torch.randn(1, 3, 32, 32),), dynamic_shapes=(free,))
    x = torch.randn(1, 3, 17, 24)
    torch.testing.assert_close(exported.module()(x), fast(x))


def test_a_rule_whose_name_matches_nothing_is_an_error():
    policy = Policy("typo", (Rule("keep", name="layer9.*"), Rule("max_pool")))
    with pytest.raises(PatternError, match=r"layer9"):
        plan(small(), policy)


def test_mistakes_of_newcomers_are_explained(tmp_path):
    with pytest.raises(SurgeryError, match="Give a model, not a str"):
        convert("resnet18", "maxpool_all")
    model = timm.create_model("test_resnet").eval()
    with pytest.raises(UnknownNameError, match=r"pfsurgery.budget\(\.\.\.\) and images="):
        convert(model, "budget")
    with pytest.raises(PolicyError, match=r"pfsurgery\.reconstruct"):
        convert(model, "maxpool_all", images=[torch.zeros(2, 3, 160, 160)])
    fast = convert(model, "maxpool_all")
    with pytest.raises(RecordMismatchError, match="save the model before"):
        pfsurgery.save(pfsurgery.optimize(fast), tmp_path / "ready")
    pfsurgery.save(fast, tmp_path / "run" / "model")
    with pytest.raises(RecordMismatchError, match="folder of a run; its model is"):
        pfsurgery.load(tmp_path / "run")
