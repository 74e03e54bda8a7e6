"""Self-attention as a site: found, kept with a reason, or turned into the efficient layer."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import pfsurgery
from pfsurgery.errors import PolicyError, ShapeError, UnsupportedSiteError
from pfsurgery.measure.count import count
from pfsurgery.ops.eff_attention import EffAttention
from pfsurgery.sites import Site

VIT = "test_vit"  # six blocks, 10x10 patches and a class token
SWIN = "swin_tiny_patch4_window7_224"


def small(name: str) -> nn.Module:
    """A timm model; Swin is made smaller, with four windows of 4x4 tokens in the first stage."""
    sizes = {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (1, 2),
    }
    model = timm.create_model(name, **(sizes if name == SWIN else {})).eval()
    if name == SWIN:
        model.pretrained_cfg["input_size"] = (3, 32, 32)
    return model


def attentions(model: nn.Module, example=None) -> dict[str, Site]:
    sites = pfsurgery.scan(model, example, attention=True)
    return {site.name: site for site in sites if site.kind == "attention"}


def image(model: nn.Module, number: int = 2) -> torch.Tensor:
    return torch.randn(number, *model.pretrained_cfg["input_size"])


@torch.no_grad()
def reference(layer: EffAttention, x: torch.Tensor) -> torch.Tensor:
    """The paper's layer, token by token."""
    (rows, columns), prefix = layer.grid, layer.prefix
    hidden = F.gelu(x @ layer.qkv.weight.T + layer.qkv.bias)
    pooled = hidden.clone()
    for row in range(rows):
        for column in range(columns):
            near = [
                hidden[:, prefix + i * columns + j]
                for i in range(max(row - 1, 0), min(row + 2, rows))
                for j in range(max(column - 1, 0), min(column + 2, columns))
            ]
            pooled[:, prefix + row * columns + column] = torch.stack(near).amax(0)
    return F.gelu(pooled) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize(
    ("name", "grids", "prefix"),
    [
        (VIT, {(10, 10)}, 1),
        ("deit_tiny_distilled_patch16_224", {(14, 14)}, 2),
        ("pit_ti_224", {(27, 27), (14, 14), (7, 7)}, 1),
        ("swin_tiny_patch4_window7_224", {(7, 7)}, 0),
        ("swinv2_cr_tiny_224", {(7, 7)}, 0),
        ("test_vit_relpos", {(10, 10)}, 0),
        ("vit_tiny_patch16_dinov3_qkvb", {(16, 16)}, 5),
    ],
)
def test_attentions_are_found_with_their_grid(name, grids, prefix):
    model = timm.create_model(name)
    found = attentions(model)
    assert set(found) == {n for n, _ in model.named_modules() if n.split(".")[-1] == "attn"}
    assert {site.geometry.grid for site in found.values()} == grids
    assert {site.geometry.prefix for site in found.values()} == {prefix}
    assert all(site.blocked is None for site in found.values())


def test_blocks_are_counted_anew_in_each_stage():
    blocks = [site.geometry.block for site in attentions(timm.create_model("pit_ti_224")).values()]
    assert blocks == [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_without_being_asked_for_attention_is_no_site():
    model = timm.create_model(VIT)
    assert [site.name for site in pfsurgery.scan(model)] == ["patch_embed.proj"]
    assert [d.site.name for d in pfsurgery.plan(model, "maxpool_all")] == ["patch_embed.proj"]


def test_register_tokens_stand_in_front_of_the_grid():
    found = attentions(timm.create_model(VIT, reg_tokens=4))
    assert {(site.geometry.grid, site.geometry.prefix) for site in found.values()} == {
        ((10, 10), 5)
    }


def test_a_rectangular_image_has_a_rectangular_grid():
    model = timm.create_model(VIT, img_size=(64, 160))
    found = attentions(model, torch.zeros(1, 3, 64, 160))
    assert {site.geometry.grid for site in found.values()} == {(4, 10)}


@pytest.mark.parametrize("name", [VIT, "pit_ti_distilled_224", SWIN])
def test_every_second_block_changes_and_the_plan_knows_what_that_saves(name):
    model = small(name)
    fast = pfsurgery.convert(model, "eff_transformer")
    plan = pfsurgery.record(fast).plans[0]
    changed = {n for n, module in fast.named_modules() if isinstance(module, EffAttention)}
    odd = {n for n, site in attentions(model).items() if site.geometry.block % 2}
    assert changed == odd == {d.site.name for d in plan.replaced}
    before, after = count(model), count(fast)
    assert sum(d.parameters_saved for d in plan) == before.parameters - after.parameters
    assert sum(d.macs_saved for d in plan) == before.macs - after.macs


def test_a_converted_layer_computes_what_the_paper_says():
    fast = pfsurgery.convert(timm.create_model("pit_ti_distilled_224").eval(), "eff_transformer")
    for layer in (fast.transformers[1].blocks[1].attn, fast.transformers[2].blocks[3].attn):
        nn.init.normal_(layer.proj.weight)
        rows, columns = layer.grid
        x = torch.randn(2, rows * columns + layer.prefix, layer.qkv.in_features)
        torch.testing.assert_close(layer(x), reference(layer, x), atol=1e-3, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 3), st.integers(1, 3))
def test_any_rectangle_with_tokens_in_front(rows, columns, prefix, number):
    layer = EffAttention(4, 12, (rows, columns), prefix)
    x = torch.randn(number, rows * columns + prefix, 4)
    torch.testing.assert_close(layer(x), reference(layer, x))
    bigger = EffAttention(4, 12, (2 * rows, 2 * columns), prefix)
    bigger.load_state_dict(layer.state_dict())
    x = torch.randn(number, 4 * rows * columns + prefix, 4)
    torch.testing.assert_close(layer(x), bigger(x))


def test_tokens_in_front_pass_around_the_maximum():
    layer = EffAttention(4, 12, (3, 4), 2)
    x = torch.randn(1, 14, 4)
    changed = x.clone()
    changed[:, 2:] += 1
    assert torch.equal(layer(x)[:, :2], layer(changed)[:, :2])
    changed = x.clone()
    changed[:, :2] += 1
    torch.testing.assert_close(layer(x)[:, 2:], layer(changed)[:, 2:])


def test_tokens_that_form_no_grid_are_refused():
    with pytest.raises(ShapeError, match="15 tokens do not form a grid with sides 4:4"):
        EffAttention(4, 12, (4, 4), 1)(torch.randn(1, 16, 4))


def test_a_mask_of_tokens_is_refused_and_not_ignored():
    fast = pfsurgery.convert(timm.create_model(VIT, depth=2).eval(), "eff_transformer")
    x = image(fast, 1)
    assert fast.forward_features(x).shape == (1, 101, 64)
    with pytest.raises(UnsupportedSiteError, match="cannot respect a mask"):
        fast.forward_features(x, attn_mask=torch.ones(101, 101, dtype=torch.bool))


def test_shifted_windows_do_not_look_across_the_edge_of_the_image():
    """Tokens that a shift brought together must not see each other, as in the attention."""
    model = small(SWIN)
    fast = pfsurgery.convert(model, "eff_transformer")
    block = fast.layers[0].blocks[1]
    assert any(block.shift_size)
    nn.init.normal_(block.attn.proj.weight)
    x = torch.randn(1, 8, 8, 16)
    changed = x.clone()
    changed[:, 0] += 3  # rolled to the bottom, next to rows 6 and 7
    with torch.no_grad():
        before, after = (block._attn(y) for y in (x, changed))
    assert torch.equal(before[:, 2:], after[:, 2:])
    assert not torch.equal(before[:, 1], after[:, 1])
    windows = torch.randn(8, 16, 16)
    nothing_hidden = torch.zeros_like(block.attn_mask)
    torch.testing.assert_close(block.attn(windows, mask=nothing_hidden), block.attn(windows))


def test_what_can_be_copied_is():
    model = timm.create_model(VIT).eval()
    fast = pfsurgery.convert(model, "eff_transformer")
    old, new = model.blocks[1].attn, fast.blocks[1].attn
    assert torch.equal(old.qkv.weight, new.qkv.weight)
    assert torch.equal(old.qkv.bias, new.qkv.bias)
    assert torch.equal(old.proj.weight, new.proj.weight[:, -64:])
    assert not new.proj.weight[:, :-64].any()
    assert torch.equal(old.proj.bias, new.proj.bias)
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (1,)}
    swin = timm.create_model("swinv2_tiny_window8_256", **sizes).eval()
    old = swin.layers[0].blocks[1].attn
    nn.init.normal_(old.q_bias)
    nn.init.normal_(old.v_bias)
    fast = pfsurgery.convert(swin, "eff_transformer", example=torch.zeros(1, 3, 32, 32))
    new = fast.layers[0].blocks[1].attn
    torch.testing.assert_close(new.qkv.bias, torch.cat([old.q_bias, 0 * old.q_bias, old.v_bias]))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("beit_base_patch16_224", {"embed_dim": 32, "num_heads": 2}),
        ("vit_small_patch16_dinov3", {"embed_dim": 32, "num_heads": 2}),
        ("vit_tiny_patch16_dinov3_qkvb", {"embed_dim": 32, "num_heads": 2, "qkv_fused": False}),
    ],
)
def test_query_key_and_value_are_copied_however_they_are_kept(name, kwargs):
    model = timm.create_model(name, img_size=32, depth=2, **kwargs).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    fast = pfsurgery.convert(model, "eff_transformer", example=torch.zeros(1, 3, 32, 32))
    old, new = model.blocks[1].attn, fast.blocks[1].attn
    x = torch.randn(1, new.prefix + 4, 32)
    if old.qkv is None:
        expected = torch.cat([old.q_proj(x), old.k_proj(x), old.v_proj(x)], dim=-1)
    elif getattr(old, "q_bias", None) is not None:
        zeros = torch.zeros_like(old.q_bias)
        expected = F.linear(x, old.qkv.weight, torch.cat([old.q_bias, zeros, old.v_bias]))
    else:
        expected = old.qkv(x)
    torch.testing.assert_close(new.qkv(x), expected)


def test_conversion_draws_no_random_numbers_and_leaves_the_original_alone():
    model = timm.create_model(VIT).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    first = pfsurgery.convert(model, "eff_transformer")
    second = pfsurgery.convert(model, "eff_transformer")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert first.blocks[1].attn.training


def test_all_parameters_get_gradients():
    fast = pfsurgery.convert(timm.create_model(VIT), "eff_transformer").train()
    fast(image(fast)).square().mean().backward()
    for name, parameter in fast.named_parameters():
        assert parameter.grad is not None, name
        if "blocks.1.attn.proj" in name:
            assert parameter.grad.abs().amax(0).min() > 0


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model = small(name)
    fast = pfsurgery.convert(model, "eff_transformer")
    pfsurgery.save(fast, tmp_path)
    loaded = pfsurgery.load(tmp_path, base=(lambda: small(SWIN)) if name == SWIN else None)
    x = image(model, 1)
    with torch.no_grad():
        expected = fast(x)
        assert torch.equal(loaded(x), expected)
        assert torch.equal(copy.deepcopy(fast)(x), expected)
    plan = pfsurgery.record(fast).plans[0]
    assert pfsurgery.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_it_compiles_as_one_graph_and_exports_with_any_batch(name):
    model = timm.create_model(VIT, depth=2).eval() if name == VIT else small(name)
    fast = pfsurgery.convert(model, "eff_transformer").requires_grad_(False)
    x = image(fast)
    expected = fast(x)
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x), expected, atol=1e-4, rtol=1e-4)
    more = image(fast, 3)
    torch.testing.assert_close(exported(more), fast(more), atol=1e-4, rtol=1e-4)


class Rotary(nn.Module):
    """An attention of no known class."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Tokens(nn.Module):
    """Patches, a given attention, and a mean."""

    def __init__(self, attention: nn.Module, extra: int = 0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.extra = nn.Parameter(torch.randn(1, extra, 16))
        self.norm = nn.LayerNorm(16)
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(x), -1, -1), tokens], dim=1)
        return (tokens + self.attention(self.norm(tokens))).mean(1)


EXAMPLE = torch.zeros(1, 3, 32, 16)


def reason(model: nn.Module) -> str:
    (site,) = attentions(model, EXAMPLE).values()
    plan = pfsurgery.plan(model, lambda site: "eff_attention", example=EXAMPLE)
    assert plan[site.name].reason == site.blocked
    return site.blocked


def test_what_cannot_be_converted_says_why():
    known = timm.layers.attention.Attention
    assert "Rotary is an attention that may do more" in reason(Tokens(Rotary()))
    assert "its 62 tokens" in reason(Tokens(known(16, 2), extra=30))
    shared = Tokens(known(16, 2))
    shared.other = nn.Linear(16, 48)
    shared.other.weight = shared.attention.qkv.weight
    assert "shared with other" in reason(shared)
    low_rank = Tokens(known(16, 2))
    low_rank.attention.qkv = nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 48))
    assert "its qkv is a" in reason(low_rank)
    normed = Tokens(known(16, 2))
    nn.utils.parametrizations.weight_norm(normed.attention.proj)
    assert "its proj is a" in reason(normed) or "parametrised" in reason(normed)


def test_attention_in_a_graph_is_kept_and_says_why():
    model = timm.create_model(VIT, depth=2).eval()
    graph = torch.export.export(model, (image(model, 1),)).module()
    (site,) = attentions(graph, image(model, 1)).values()
    assert (site.name, site.calls) == ("model:attention", 2)
    assert "no module to replace" in site.blocked


def test_gates_and_classifiers_with_a_softmax_are_no_attention():
    for name in ("skresnet18", "resnest14d"):
        assert not attentions(timm.create_model(name))
    unknown = attentions(timm.create_model("cait_xxs24_224", depth=1))
    assert [site.name for site in unknown.values()] == [
        "blocks.0.attn",
        "blocks_token_only.0.attn",
        "blocks_token_only.1.attn",
    ]


def test_a_registered_attention_is_free():
    class Free(Rotary):
        pass

    model = Tokens(Free(), extra=2).eval()
    assert "Free" in reason(model)
    pfsurgery.register_attention(Free)
    fast = pfsurgery.convert(model, lambda site: "eff_attention", example=EXAMPLE)
    assert fast.attention.grid == (8, 4)
    assert fast.attention.prefix == 2
    assert fast(torch.randn(2, 3, 32, 16)).shape == (2, 16)


def test_ops_for_convolutions_do_not_stand_for_attention_nor_the_other_way_round():
    model = timm.create_model(VIT)
    plan = pfsurgery.plan(model, lambda site: "max_pool")
    assert plan["blocks.0.attn"].reason == "max_pool takes the place of convolutions"
    sites = pfsurgery.scan(timm.create_model("test_resnet"))
    plan = pfsurgery.plan(timm.create_model("test_resnet"), lambda site: "eff_attention")
    assert not plan.replaced
    assert len(plan) == len(sites)
    with pytest.raises(UnsupportedSiteError, match="takes the place of attention"):
        plan.set(sites[1].name, "eff_attention")
    with pytest.raises(PolicyError, match="block must be one of"):
        pfsurgery.Rule("eff_attention", block="second")


def test_torchvision_and_hugging_face():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64
    ).eval()
    example = torch.randn(1, 3, 64, 64)
    found = attentions(model, example)
    assert {site.geometry.grid for site in found.values()} == {(4, 4)}
    fast = pfsurgery.convert(model, "eff_transformer", example=example)
    assert sum(isinstance(m, EffAttention) for m in fast.modules()) == 2
    assert fast(example).shape == (1, 1000)
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
    )
    model = transformers.ViTForImageClassification(config).eval()
    fast = pfsurgery.convert(model, "eff_transformer", example=example)
    assert sum(isinstance(m, EffAttention) for m in fast.modules()) == 2
    assert fast(example).logits.shape == (1, 2)


def test_reconstruct_refits_output_layers_to_what_attention_gave():
    torch.manual_seed(0)
    model = small(SWIN)
    images = F.interpolate(torch.randn(96, 3, 8, 8), size=32, mode="bicubic")
    fast = pfsurgery.convert(model, "eff_transformer")
    first = copy.deepcopy(fast.layers[0].blocks[1].attn.qkv.weight)

    @torch.no_grad()
    def error() -> float:
        goal = model(images[80:])
        return float((fast(images[80:]) - goal).square().mean() / goal.var())

    before = error()
    refits = pfsurgery.reconstruct(fast, model, [images[:40], images[40:80]])
    assert [refit.layer for refit in refits] == [
        "layers.0.blocks.1.attn.proj",
        "layers.1.blocks.1.attn.proj",
    ]
    assert all(refit.after < 0.7 < refit.before for refit in refits)
    assert error() < before / 2
    assert torch.equal(first, fast.layers[0].blocks[1].attn.qkv.weight)


def test_reconstruct_corrects_what_the_sum_with_the_shortcut_lacks():
    """On tokens as on feature maps: of two neighbouring refits the second knows of the first."""
    torch.manual_seed(0)
    model = timm.create_model(VIT, depth=4, img_size=64).eval()
    images = F.interpolate(torch.randn(60, 3, 8, 8), size=64, mode="bicubic")
    fast = pfsurgery.convert(model, "eff_transformer", example=images[:1])
    pfsurgery.reconstruct(fast, model, [images])
    seen = {}
    for name, net in (("fast", fast), ("model", model)):
        net.blocks[3].norm2.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
        with torch.no_grad():
            net(images)
    assert (seen["fast"] - seen["model"]).var() < 0.2 * seen["model"].var()
    with torch.no_grad():
        # Least squares leave no error that a constant could still correct.
        left = (seen["fast"] - seen["model"]).mean((0, 1))
    assert left.abs().max() < 1e-4 * seen["model"].std()


def test_reconstruct_says_where_there_is_nothing_to_refit():
    models = pytest.importorskip("torchvision").models
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    model = models.VisionTransformer(32, 8, **sizes).eval()
    images = torch.randn(4, 3, 32, 32)
    fast = pfsurgery.convert(model, "eff_transformer", example=images[:1])
    (refit,) = pfsurgery.reconstruct(fast, model, [images])
    assert refit.layer is None
    assert "never calls its output layer" in refit.reason
