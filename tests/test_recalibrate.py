from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pfsurgery
from pfsurgery.errors import DataError, ShapeError, TrainingError
from pfsurgery.recover import recalibrate


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(size, 3, 32, 32, generator=generator) + 1 for size in sizes]


def test_equals_the_statistics_of_all_values_pooled():
    conv = nn.Conv2d(3, 5, 3)
    model = nn.Sequential(conv, nn.BatchNorm2d(5, momentum=0.3))
    images = batches(8, 8, 3)
    assert recalibrate(model, images) == 1
    with torch.no_grad():
        values = conv(torch.cat(images)).double().transpose(0, 1).flatten(1)
    assert torch.allclose(model[1].running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(model[1].running_var.double(), values.var(1), rtol=1e-5, atol=1e-6)


def test_a_batch_of_one_image_joins_another():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    for sizes in ((8, 8, 1), (1, 8), (1, 1, 1, 1, 1)):
        images = batches(*sizes)
        recalibrate(model, images)
        values = torch.cat(images).mean((2, 3))
        assert torch.allclose(model[1].running_mean, values.mean(0), atol=1e-6)
        assert torch.allclose(model[1].running_var, values.var(0), rtol=1e-4)


def test_one_image_says_nothing_of_1x1_maps():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    before = state(model)
    for images in (batches(1), [torch.randn(1, 3, size, size) for size in (32, 24)]):
        with pytest.raises(DataError, match=r"norm '1' sees one value .* two images"):
            recalibrate(model, images)
        assert same(before, state(model))
    assert recalibrate(nn.BatchNorm2d(3), batches(1)) == 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_empty_batch_is_skipped(at):
    model = timm.create_model("test_resnet", num_classes=10)
    images = batches(8, 8)
    recalibrate(model, images)
    wanted = state(model)
    images.insert(at, torch.zeros(0, 3, 32, 32))
    recalibrate(model, images)
    assert same(wanted, state(model))
    with pytest.raises(DataError, match="no batch"):
        recalibrate(model, torch.zeros(0, 3, 32, 32))


def test_a_norm_that_is_called_twice_pools_both_calls():
    norm = nn.BatchNorm1d(4, affine=False)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.mean((2, 3)).repeat(1, 2)[:, :4]
            return self.norm(self.norm(x) * 3)

    (images,) = batches(16)
    recalibrate(Twice(), [images])
    first = images.mean((2, 3)).repeat(1, 2)[:, :4]
    second = 3 * (first - first.mean(0)) / (first.var(0, correction=0) + norm.eps).sqrt()
    values = torch.cat([first, second])
    assert torch.allclose(norm.running_mean, values.mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, values.var(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_everything_but_the_statistics_is_left_as_found(name):
    model = timm.create_model(name, num_classes=10, drop_rate=0.3)
    model.eval()
    model.conv_stem.train() if hasattr(model, "conv_stem") else model.conv1.train()
    flags = [module.training for module in model.modules()]
    momenta = [getattr(module, "momentum", None) for module in model.modules()]
    before, random = state(model), torch.get_rng_state()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())

    loader = DataLoader(TensorDataset(torch.cat(batches(16, 16))), batch_size=8, shuffle=True)
    assert recalibrate(model, loader) == norms

    assert [module.training for module in model.modules()] == flags
    assert [getattr(module, "momentum", None) for module in model.modules()] == momenta
    assert torch.equal(torch.get_rng_state(), random)
    after = state(model)
    changed = {key.rsplit(".")[-1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"running_mean", "running_var"}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_stays_off():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    (images,) = batches(8)
    recalibrate(model, [images])
    assert torch.allclose(model[1].running_mean, images.mean((0, 2, 3)), atol=1e-5)


def test_the_result_does_not_depend_on_what_the_statistics_were():
    model = timm.create_model("test_resnet", num_classes=10)
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(7)
            module.running_var.fill_(0.01)
    recalibrate(model, batches(16, 8))
    recalibrate(other, batches(16, 8))
    assert same(state(model), state(other))


def test_failure_restores_the_statistics():
    model = timm.create_model("test_resnet", num_classes=10)
    before = state(model)
    flags = [module.training for module in model.modules()]

    def broken():
        yield from batches(8, 8)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        recalibrate(model, broken())
    assert same(before, state(model))

    (images,) = batches(8)
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"norm 'conv1\.1' are not finite"):
        recalibrate(model, [images])
    assert same(before, state(model))
    assert [module.training for module in model.modules()] == flags


def test_no_batch_is_an_error():
    with pytest.raises(DataError, match="no batch"):
        recalibrate(timm.create_model("test_resnet"), [])


def test_a_model_without_batch_norm_is_left_alone():
    assert recalibrate(timm.create_model("test_convnext"), []) == 0
    assert recalibrate(nn.BatchNorm2d(3, track_running_stats=False), []) == 0


def test_half_precision_and_double_models():
    for dtype in (torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(dtype)
        assert recalibrate(model, batches(8)) == 1
        assert model[1].running_var.dtype == dtype


def test_a_channel_that_is_constant_keeps_its_variance():
    model = timm.create_model("test_resnet").eval()
    fast = pfsurgery.convert(model, "maxpool_all")
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        largest = float(fast(x).abs().max())
        recalibrate(fast, [torch.zeros(16, 3, 64, 64)])
        assert float(fast(x).abs().max()) < 100 * max(1.0, largest)


def test_images_that_the_model_does_not_take_are_told():
    model = timm.create_model("test_resnet").eval()
    fast = pfsurgery.convert(model, "maxpool_all")
    grey = [torch.randn(4, 1, 64, 64)]
    with pytest.raises(ShapeError, match=r"does not run on .*\(4, 1, 64, 64\)"):
        recalibrate(fast, grey)
    with pytest.raises(ShapeError, match="does not run on"):
        pfsurgery.reconstruct(fast, model, grey)


def test_models_that_return_no_tensor_are_refused_before_anything_is_fitted():
    @dataclass
    class Output:
        logits: torch.Tensor

    class Model(nn.Sequential):
        def forward(self, input):
            return Output(super().forward(input))

    layers = (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    model = Model(*layers, nn.Conv2d(8, 8, 1)).eval()
    fast = pfsurgery.convert(model, "maxpool_all", example=torch.zeros(1, 3, 16, 16))
    told = []
    with pytest.raises(ShapeError, match="no tensor is found"):
        pfsurgery.reconstruct(fast, model, [torch.randn(16, 3, 16, 16)], tell=told.append)
    assert not told
