"""What is particular to surgery: matched blocks, ramps, rates of changed sites, giving back."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pfsurgery
from pfsurgery.digits import digits
from pfsurgery.errors import DataError, TrainingError, UnknownNameError
from pfsurgery.recover import Accuracy, FinetuneConfig, evaluate, finetune
from pfsurgery.recover.blocks import changed_blocks, changed_parameters
from pfsurgery.recover.give_back import give_back
from pfsurgery.recover.match import match_blocks, match_stages
from pfsurgery.recover.optimizer import parameter_groups
from pfsurgery.recover.ramp import Ramp

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pair(policy: str = "maxpool_deep", name: str = "resnet26d") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    small = {"channels": [16, 32, 64, 128]} if name == "resnet26d" else {}
    original = timm.create_model(name, num_classes=10, **small).eval()
    return original, pfsurgery.convert(original, policy, example=IMAGES[:1])


def few(number: int = 96, part: str = "train") -> TensorDataset:
    return TensorDataset(*(tensor[:number] for tensor in getattr(digits(), part).tensors))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that knows its digits."""
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=10)
    finetune(model, train=digits().train, config=FinetuneConfig(epochs=4, lr=3e-3))
    return model.eval()


def test_blocks_are_residual_branches_or_sites_with_their_tails():
    _, fast = pair("maxpool_all")
    blocks = {block.output: block for block in changed_blocks(fast)}
    assert blocks["layer1.0"].modules == ("layer1.0",)
    assert blocks["conv1.5"].modules == ("conv1.3", "conv1.4", "conv1.5")
    names = changed_parameters(fast)
    assert "layer1.0.conv1.weight" in names
    assert "fc.weight" not in names
    assert changed_blocks(timm.create_model("test_resnet")) == ()


def test_the_match_is_the_normalised_error_of_block_outputs():
    original, fast = pair()
    with match_blocks(fast, original).watching() as match, torch.no_grad():
        fast.eval()(IMAGES)
        original(IMAGES)
        loss = match.loss()
    outputs: dict[str, list[Tensor]] = {block.output: [] for block in changed_blocks(fast)}
    for model in (fast, original):
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda _, __, out, path=path: outputs[path].append(out)
            )
            for path in outputs
        ]
        with torch.no_grad():
            model(IMAGES)
        for handle in handles:
            handle.remove()
    errors = [(s - t).pow(2).sum() / t.pow(2).sum() for s, t in outputs.values()]
    assert float(loss) == pytest.approx(float(sum(errors) / len(errors)), rel=1e-5)
    assert not any(m._forward_hooks for m in fast.modules())


def test_blending_does_not_change_what_is_matched():
    """The ramp runs the teacher's layers on the student's inputs; that is not what they gave."""
    torch.manual_seed(0)
    original = timm.create_model("test_efficientnet", num_classes=10)
    fast = pfsurgery.convert(original, "eff_max", example=IMAGES[:1])
    paths = [block.output for block in changed_blocks(fast)]
    assert set(paths) & {name for name, _ in original.named_modules()}
    wanted: dict[str, Tensor] = {}
    for path in paths:
        original.get_submodule(path).register_forward_hook(
            lambda _, __, out, path=path: wanted.__setitem__(path, out)
        )
    ramp = Ramp(fast, original, steps=10)
    with ramp.blending(), torch.no_grad():
        ramp.at(3)
        original(IMAGES)
        given = dict(wanted)
        fast.train()(IMAGES)
    assert all(wanted[path] is given[path] for path in paths)


def test_a_model_matches_itself():
    original, fast = pair()
    with match_blocks(fast, fast).watching() as match, torch.no_grad():
        fast.eval()(IMAGES)
        assert float(match.loss()) == 0
    del original


def test_matching_brings_blocks_nearer(trained):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])

    def error(model: nn.Module) -> float:
        with match_blocks(model, trained).watching() as match, torch.no_grad():
            model.eval()(digits().val.tensors[0][:64])
            trained(digits().val.tensors[0][:64])
            return float(match.loss())

    before, config = error(fast), FinetuneConfig(max_steps=30, match_weight=10.0, lr=3e-3)
    finetune(fast, train=digits().train, teacher=trained, config=config)
    assert error(fast) < 0.7 * before


def test_a_remembered_teacher_is_asked_once_for_each_image(trained):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    seen: list[int] = []

    def weights(**settings) -> list[Tensor]:
        model = copy.deepcopy(fast)
        seen.clear()
        config = FinetuneConfig(**{"batch_size": 32, "epochs": 3, **settings})
        finetune(model, train=few(), teacher=trained, config=config)
        return [p.detach() for p in model.parameters()]

    handle = trained.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    try:
        meant = weights()
        assert sum(seen) == 3 * 96
        for made, wanted in zip(weights(teacher_cache=True), meant, strict=True):
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
        assert sum(seen) == 96
        weights(teacher_cache=True, match_weight=0.5)
        assert sum(seen) == 3 * 96, "matched blocks need the teacher itself"
        weights(teacher_cache=True, batch_size=40)
        assert 80 < sum(seen) <= 80 + 2 * 16, "16 are left out of the first epoch's batches"
    finally:
        handle.remove()


def test_stages_are_those_that_timm_names(trained):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    assert match_stages(fast, trained).outputs == [f"stages.{i}" for i in range(4)]
    with match_stages(fast, fast).watching() as match, torch.no_grad():
        fast.eval()(IMAGES)
        assert float(match.loss()) == 0

    def error(model: nn.Module) -> float:
        with match_stages(model, trained).watching() as match, torch.no_grad():
            model.eval()(digits().val.tensors[0][:64])
            trained(digits().val.tensors[0][:64])
            return float(match.loss())

    before, config = error(fast), FinetuneConfig(max_steps=30, stage_weight=10.0, lr=3e-3)
    finetune(fast, train=digits().train, teacher=trained, config=config)
    assert error(fast) < 0.8 * before
    with pytest.raises(TrainingError, match="Sequential does not name its stages"):
        match_stages(nn.Sequential(fast), trained)


def test_stages_that_give_several_maps_are_refused():
    model = timm.create_model("hrnet_w18_small", num_classes=10)
    fast = pfsurgery.convert(model, "maxpool_deep", example=IMAGES[:1])
    config = FinetuneConfig(max_steps=1, stage_weight=1.0, batch_size=8)
    with pytest.raises(TrainingError, match="gives a list, not a tensor"):
        finetune(fast, train=few(8), teacher=model, config=config)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_changed_blocks_are_trained_at_first(trained, optimizer):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    before = {name: p.detach().clone() for name, p in fast.named_parameters()}
    changed = changed_parameters(fast)

    def moved(freeze: float) -> set[str]:
        model = copy.deepcopy(fast)
        config = FinetuneConfig(batch_size=32, max_steps=4, freeze=freeze, optimizer=optimizer)
        finetune(model, train=few(), teacher=trained, config=config)
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    assert moved(1.0) == changed
    assert moved(0.5) > changed
    with pytest.raises(TrainingError, match="no replaced site to train"):
        finetune(copy.deepcopy(trained), train=few(), config=FinetuneConfig(freeze=0.5))


def test_a_ramp_begins_with_the_original():
    for policy in ("maxpool_all", "eff_max"):
        original, fast = pair(policy)
        for module in fast.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        ramp = Ramp(fast, original, steps=10)
        with ramp.blending(), torch.no_grad():
            ramp.at(0)
            fast.eval()
            for site in pfsurgery.record(fast).plans[-1].replaced:
                fast.get_submodule(site.site.name).train()
            assert torch.allclose(fast(IMAGES), original(IMAGES), atol=1e-4)
            ramp.at(10)
            fast.eval()
            end = fast(IMAGES)
        assert torch.equal(end, fast(IMAGES))


def test_a_ramp_that_is_gone_back_to_blends_again():
    original, fast = pair("maxpool_all")
    ramp = Ramp(fast.train(), original, steps=10)
    with ramp.blending(), torch.no_grad():
        ramp.at(0)
        blended = fast(IMAGES)
        ramp.at(10)
        assert not torch.equal(fast(IMAGES), blended)
        ramp.at(0)
        torch.testing.assert_close(fast(IMAGES), blended)


def test_a_ramp_blends_what_earlier_conversions_replaced():
    original, once = pair("maxpool_deep")
    twice = pfsurgery.convert(once, "maxpool_all", example=IMAGES[:1])
    plans = pfsurgery.record(twice).plans
    assert all(plan.replaced for plan in plans)
    ramp = Ramp(twice.train(), original, steps=10)
    with ramp.blending():
        for plan in plans:
            assert all(twice.get_submodule(d.site.name)._forward_hooks for d in plan.replaced)


def test_attentions_are_not_blended():
    original = timm.create_model("test_vit", img_size=32).eval()
    fast = pfsurgery.convert(original, "eff_transformer", example=IMAGES[:1])
    with pytest.raises(TrainingError, match="only convolutions are blended"):
        Ramp(fast, original, steps=10)


def test_a_ramp_leaves_nothing_behind(trained):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    keys = list(fast.state_dict())
    config = FinetuneConfig(max_steps=4, ramp=1.0, batch_size=32)
    finetune(fast, train=few(), teacher=trained, config=config)
    assert list(fast.state_dict()) == keys
    assert not any(m._forward_hooks for m in (*fast.modules(), *trained.modules()))
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())


def test_rates_of_changed_sites_and_layers():
    original, fast = pair()
    config = FinetuneConfig(changed_lr=5.0, layer_decay=0.5)
    names = {id(p): name for name, p in fast.named_parameters()}
    changed = changed_parameters(fast)
    groups = parameter_groups(fast, config)
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names)
    plain = {
        id(p): group["lr_scale"]
        for group in parameter_groups(fast, FinetuneConfig(layer_decay=0.5))
        for p in group["params"]
    }
    for group in groups:
        for p in group["params"]:
            factor = 5.0 if names[id(p)] in changed else 1.0
            assert group["lr_scale"] == pytest.approx(factor * plain[id(p)])
            assert (group["weight_decay"] == 0) == (p.ndim <= 1)
    assert plain[id(fast.fc.weight)] == 1.0
    assert plain[id(next(fast.conv1.parameters()))] < 0.1
    del original


def test_changed_sites_move_further():
    def moved(factor: float) -> float:
        _, fast = pair()
        before = fast.layer4[0].conv1.weight.detach().clone()
        config = FinetuneConfig(
            optimizer="sgd", lr=1e-3, changed_lr=factor, batch_size=32, max_steps=1, warmup=0.0
        )
        finetune(fast, train=few(), config=config)
        return float((fast.layer4[0].conv1.weight.detach() - before).norm())

    assert moved(4.0) == pytest.approx(4 * moved(1.0), rel=1e-3)


def test_the_average_is_what_is_kept(trained):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    plain, averaged = copy.deepcopy(fast), copy.deepcopy(fast)
    settings = {"max_steps": 8, "batch_size": 32, "lr": 3e-3}
    finetune(plain, train=few(), config=FinetuneConfig(**settings))
    val = few(64, "val")
    config = FinetuneConfig(**settings, ema=0.9)
    result = finetune(averaged, train=few(), val=val, config=config)
    assert not torch.equal(plain.head.fc.weight, averaged.head.fc.weight)
    assert evaluate(averaged, val, batch_size=32) == result.last
    distance = (averaged.head.fc.weight - fast.head.fc.weight).norm()
    assert 0 < distance < (plain.head.fc.weight - fast.head.fc.weight).norm()


def test_accumulated_batches_are_one_large_batch():
    def weights(batch_size: int, accumulate: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = timm.create_model("test_convnext", num_classes=10)
        config = FinetuneConfig(
            batch_size=batch_size, accumulate=accumulate, max_steps=3, optimizer="sgd", lr=0.1
        )
        finetune(model, train=few(), config=config)
        return model.state_dict()

    large, small = weights(32, 1), weights(8, 4)
    assert all(torch.allclose(large[name], small[name], atol=1e-6) for name in large)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixup": 0.5},
        {"cutmix": 1.0},
        {"mixup": 0.5, "cutmix": 1.0, "label_smoothing": 0.1, "kd_weight": 0.0},
        {"mixup": 0.5, "kd_weight": 1.0},
        {"schedule": "step", "decay_epochs": 1, "epochs": 2},
        {"optimizer": "lamb"},
    ],
)
def test_settings_of_timms_recipes_train(trained, settings):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    config = FinetuneConfig(**{"batch_size": 32, "epochs": 1, **settings})
    result = finetune(fast, train=few(), teacher=trained, config=config)
    assert 0 < result.history[-1].loss < 20


def test_the_step_schedule_falls_to_a_tenth():
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=10)
    config = FinetuneConfig(
        schedule="step", decay_epochs=1, epochs=3, batch_size=32, warmup=0.0, lr=0.01
    )
    result = finetune(model, train=few(), config=config)
    assert [entry.lr for entry in result.history] == pytest.approx([0.01, 0.001, 0.0001])


def test_compiled_models_train_as_the_others_do(trained):
    def loss(backend: str) -> float:
        fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
        config = FinetuneConfig(batch_size=32, max_steps=3, compile=backend, match_weight=1.0)
        result = finetune(fast, train=few(), teacher=trained, config=config)
        assert type(fast).__name__ == "ConvNeXt"
        return result.history[-1].loss

    assert loss("eager") == pytest.approx(loss("no"), rel=1e-4)
    with pytest.raises(UnknownNameError, match="inductor"):
        loss("inducter")


def test_norms_are_re_estimated_at_the_end():
    original, fast = pair()
    without = copy.deepcopy(fast)
    # in the layout that `evaluate` uses: another may differ in the last bit
    settings = {"batch_size": 32, "max_steps": 2, "channels_last": False}
    finetune(without, train=few(), teacher=original, config=FinetuneConfig(**settings))
    config = FinetuneConfig(**settings, norm_images=64)
    result = finetune(fast, train=few(), val=few(64, "val"), teacher=original, config=config)
    assert not torch.equal(fast.bn1.running_mean, without.bn1.running_mean)
    assert torch.equal(fast.fc.weight, without.fc.weight)
    assert result.last == evaluate(fast, few(64, "val"), batch_size=32)


def test_blocks_are_given_back_until_it_is_enough(trained):
    fast = pfsurgery.convert(trained, "maxpool_all", example=IMAGES[:1])
    val = few(128, "val")
    goal = evaluate(trained, val).top1
    config = FinetuneConfig(max_steps=2, lr=1e-6, max_drop=2.0)
    result = finetune(fast, train=digits().train, val=val, teacher=trained, config=config)
    assert result.given_back
    assert result.last is not None
    assert result.last.top1 >= goal - 2.0
    assert result.last == evaluate(fast, val)
    plan = pfsurgery.record(fast).plans[-1]
    for name in result.given_back:
        assert isinstance(fast.get_submodule(name), nn.Conv2d)
        assert "given back" in plan[name].reason
        assert not plan[name].replaced


def test_a_run_that_gave_blocks_back_can_be_continued(trained, tmp_path):
    val = few(64, "val")
    config = FinetuneConfig(
        max_steps=2, batch_size=32, lr=1e-6, max_drop=5.0, norm_images=64, save_every=1
    )
    ends = []
    for _ in range(2):
        fast = pfsurgery.convert(trained, "maxpool_all", example=IMAGES[:1])
        result = finetune(
            fast, train=few(), val=val, teacher=trained, config=config, out=tmp_path, resume=True
        )
        assert result.given_back
        assert result.weights == tmp_path / "final.safetensors"
        fast.load_state_dict(load_file(result.weights))
        ends.append((result.given_back, result.last, fast.state_dict()))
    assert ends[0][:2] == ends[1][:2]
    assert all(torch.equal(ends[0][2][name], value) for name, value in ends[1][2].items())


def test_given_back_blocks_are_in_the_mode_of_the_model(trained):
    fast = pfsurgery.convert(trained.eval(), "maxpool_all", example=IMAGES[:1])
    config = FinetuneConfig(max_steps=1, lr=1e-6, max_drop=2.0)
    result = finetune(fast, train=few(), val=few(128, "val"), teacher=trained, config=config)
    assert result.given_back
    assert not any(module.training for module in fast.modules())


def test_an_error_while_a_block_is_tried_leaves_the_model_alone(trained):
    fast = pfsurgery.convert(trained, "maxpool_all", example=IMAGES[:1])
    before = dict(fast.named_modules())

    def fails() -> Accuracy:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_back(fast, trained, fails, now=Accuracy(0.0, 0.0, 0.0, 1), wanted=100.0)
    assert dict(fast.named_modules()) == before


def test_nothing_is_given_back_within_bounds(trained):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    config = FinetuneConfig(max_steps=2, max_drop=100.0)
    val = few(64, "val")
    result = finetune(fast, train=few(), val=val, teacher=trained, config=config)
    assert result.given_back == ()


def test_a_bound_that_cannot_be_met_is_said(trained, caplog):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    val = few(64, "val")
    with caplog.at_level(logging.WARNING):
        names, now = give_back(
            fast, trained, lambda: evaluate(fast, val), now=evaluate(fast, val), wanted=101.0
        )
    assert "no block that is given back brings more" in caplog.text
    assert now == evaluate(fast, val)
    saved = {d.site.name for d in pfsurgery.record(fast).plans[-1].replaced}
    assert not saved & set(names)


def test_a_model_with_blocks_given_back_is_saved(trained, tmp_path):
    fast = pfsurgery.convert(trained, "maxpool_all", example=IMAGES[:1])
    val = few(128, "val")
    names, _ = give_back(
        fast, trained, lambda: evaluate(fast, val), now=evaluate(fast, val), wanted=95.0
    )
    assert names
    pfsurgery.save(fast, tmp_path)
    again = pfsurgery.load(tmp_path, base=copy.deepcopy(trained))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), fast.eval()(IMAGES))


class Branch(nn.Module):
    """A shortcut around other branches and a convolution."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(*inside)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.inside(x))


def test_a_block_that_is_given_back_takes_those_inside_along(tmp_path):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 8, 3), Branch(Branch()), nn.Flatten(), nn.Linear(7200, 5))
    fast = pfsurgery.convert(original.eval(), "maxpool_all", example=IMAGES[:1])

    def accuracy() -> Accuracy:
        given_back = isinstance(fast[1].conv, nn.Conv2d)
        return Accuracy(90.0 if given_back else 50.0, 100.0, 0.0, 10)

    names, _ = give_back(fast, original, accuracy, now=accuracy(), wanted=80.0)
    assert set(names) == {"1.conv", "1.inside.0.conv"}
    pfsurgery.save(fast, tmp_path)
    again = pfsurgery.load(tmp_path, base=copy.deepcopy(original))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), original(IMAGES))


def test_the_figure(trained, tmp_path):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    config = FinetuneConfig(epochs=3, batch_size=32)
    result = finetune(fast, train=few(), val=few(64, "val"), teacher=trained, config=config)
    assert result.teacher == evaluate(trained, few(64, "val"), batch_size=32)
    result.figure(tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 1000


@pytest.mark.parametrize("name", ["match_weight", "stage_weight", "ramp", "max_drop"])
def test_what_needs_a_teacher_or_a_site_says_so(name):
    model = timm.create_model("test_convnext", num_classes=10)
    config = FinetuneConfig(**{name: 0.5})
    with pytest.raises(TrainingError, match="needs a teacher"):
        finetune(model, train=few(), val=few(), config=config)
    if name in ("match_weight", "ramp"):
        with pytest.raises(TrainingError, match="no replaced site"):
            finetune(model, train=few(), teacher=copy.deepcopy(model), config=config)


def test_a_teacher_of_another_kind_is_refused_where_blocks_are_needed(trained):
    fast = pfsurgery.convert(trained, "maxpool_deep", example=IMAGES[:1])
    other = timm.create_model("test_resnet", num_classes=10)
    for name in ("match_weight", "stage_weight", "ramp"):
        with pytest.raises(TrainingError, match=f"{name} is set, but the teacher"):
            finetune(fast, train=few(), teacher=other, config=FinetuneConfig(**{name: 0.5}))


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.5}, {"kd_weight": 1.0}])
def test_labels_that_do_not_fit_are_named(settings):
    model = timm.create_model("test_convnext", num_classes=4)
    config = FinetuneConfig(batch_size=32, **settings)
    with pytest.raises(DataError, match="label 9 does not fit the model's 4 classes"):
        finetune(model, train=few(), config=config)


def test_odd_batches_cannot_be_mixed():
    with pytest.raises(TrainingError, match="batch_size=33 must be even"):
        FinetuneConfig(batch_size=33, mixup=0.2)


def test_an_odd_last_batch_is_told_before_training(tmp_path):
    model = timm.create_model("test_convnext", num_classes=10)
    loader = DataLoader(few(63), batch_size=32)
    with pytest.raises(DataError, match="31"):
        finetune(model, train=loader, config=FinetuneConfig(mixup=0.2), out=tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_half_precision_needs_a_gpu():
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    model = timm.create_model("test_convnext", num_classes=10)
    with pytest.raises(TrainingError, match="needs a GPU"):
        finetune(model, train=few(), config=FinetuneConfig(mixed_precision="fp16"))
