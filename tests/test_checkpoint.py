"""What was saved comes back bit for bit; what was damaged is refused by name."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from pfsurgery import Base, Policy, Rule, convert, convert_, load, record, save, set_base
from pfsurgery.errors import RecordMismatchError, SurgeryError, UnknownNameError
from pfsurgery.models import open_original
from pfsurgery.zoo import resnet50_max
from tests import zoo


@pytest.fixture(scope="module")
def fast() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7, in_chans=1).eval()
    return convert(convert(model, "maxpool_deep"), "shift_all")


@pytest.fixture
def saved(fast, tmp_path) -> Path:
    return save(fast, tmp_path / "saved")


def test_outputs_and_record_come_back(fast, saved):
    again = load(saved)
    x = torch.randn(2, 1, 64, 64)
    assert type(again) is type(fast)
    assert torch.equal(again(x), fast(x))
    assert [p.replaced for p in record(again).plans] == [p.replaced for p in record(fast).plans]
    assert not again.training
    twice = load(save(again, saved.parent / "again"))
    assert torch.equal(twice(x), fast(x))


def test_the_folder_is_json_and_safetensors_that_timm_users_recognise(saved):
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["num_classes"] == 7


@pytest.mark.parametrize("make", zoo.TRAPS)
def test_models_of_the_users_own_come_back_with_their_base(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    converted = convert(model, "maxpool_all", example=zoo.EXAMPLE)
    folder = save(converted, tmp_path)
    again = load(folder, base=make)
    x = torch.randn(1, 3, 16, 16)
    made, meant = again(x), converted(x)
    if isinstance(made, dict):
        made, meant = made["out"], meant["out"]
    assert torch.equal(made, meant)


def test_torchvision_models_come_back_by_name(tmp_path):
    model = torchvision.models.mobilenet_v3_small(num_classes=5).eval()
    set_base(model, Base("torchvision", "mobilenet_v3_small", {"num_classes": 5}))
    converted = convert(model, "avgpool_depthwise")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(save(converted, tmp_path))(x), converted(x))


def test_a_base_that_cannot_be_built_without_values_comes_back(tmp_path):
    model = torchvision.models.regnet_y_400mf(num_classes=5).eval()
    set_base(model, Base("torchvision", "regnet_y_400mf", {"num_classes": 5}))
    x = torch.randn(1, 3, 64, 64)
    converted = convert(model, "maxpool_all", example=x)
    assert torch.equal(load(save(converted, tmp_path))(x), converted(x))


def test_the_original_is_asked_for_with_the_weights_that_were_converted(tmp_path):
    fast = convert(timm.create_model("resnet18.tv_in1k"), "shift_all")
    with pytest.raises(SurgeryError, match=r"trained weights of resnet18\.tv_in1k"):
        open_original(load(save(fast, tmp_path)))


def test_without_a_base_it_asks_for_one(tmp_path):
    converted = convert(zoo.Plain(), "maxpool_all", example=zoo.EXAMPLE)
    with pytest.raises(RecordMismatchError, match="base="):
        load(save(converted, tmp_path))


def test_arguments_that_are_not_json_ask_for_the_base(tmp_path):
    kwargs = {"norm_layer": nn.BatchNorm2d, "layers": (1, 1, 1, 1), "num_classes": 3}
    made = resnet50_max(**kwargs).eval()
    save(made, tmp_path)
    with pytest.raises(RecordMismatchError, match="base="):
        load(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    again = load(tmp_path, base=lambda: timm.create_model("resnet50", **kwargs))
    assert torch.equal(again(x), made(x))


def test_extra_state_that_is_no_tensor_is_named(tmp_path):
    class Extra(zoo.Plain):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 1}

    converted = convert(Extra(), "maxpool_all", example=zoo.EXAMPLE)
    with pytest.raises(SurgeryError, match=r"'_extra_state' .* is a dict"):
        save(converted, tmp_path)


def test_an_unconverted_model_is_not_saved(tmp_path):
    with pytest.raises(RecordMismatchError, match="carries no record"):
        save(zoo.Plain(), tmp_path)


def test_another_head_is_named(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7)
    converted = convert(model, "maxpool_all")
    converted.fc = nn.Sequential(nn.Linear(converted.fc.in_features, 7))
    with pytest.raises(RecordMismatchError, match=r"fc"):
        load(save(converted, tmp_path))


@pytest.mark.parametrize("size", [0, 10, 1000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_files_are_named(saved, name, size):
    path = saved / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RecordMismatchError, match=name):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(RecordMismatchError, match=name):
        load(saved)


def test_edited_files_are_named(saved):
    weights = saved / "model.safetensors"
    state = load_file(weights)
    state["fc.bias"] += 1
    original = weights.read_bytes()
    save_file(state, weights)
    with pytest.raises(RecordMismatchError, match=r"model\.safetensors.*changed"):
        load(saved)
    weights.write_bytes(original)
    config = saved / "config.json"
    config.write_text(config.read_text().replace("shift", "blur"))
    with pytest.raises(RecordMismatchError, match=r"config\.json was changed"):
        load(saved)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"pfsurgery": 3}', '{"pfsurgery": {"format": 99}}']
)
def test_foreign_configs_are_refused(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(RecordMismatchError, match=r"config\.json"):
        load(saved)


def test_an_unknown_architecture_is_named(fast, tmp_path):
    folder = save(fast, tmp_path, base=Base("timm", "resnet5000"))
    with pytest.raises(UnknownNameError, match="resnet50"):
        load(folder)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"act_layer": "silu"},
        {"global_pool": "max", "num_classes": 0},
        {"layers": (1, 2, 1, 1)},
        {"output_stride": 8},
    ],
)
def test_arguments_that_weights_do_not_show_are_not_forgotten(kwargs, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", **kwargs).eval()
    converted = convert(model, Policy("first", (Rule("max_pool", name="layer1.*"),)))
    folder = save(converted, tmp_path)
    x = torch.randn(1, 3, 64, 64)
    with contextlib.suppress(RecordMismatchError):
        assert torch.equal(load(folder)(x), converted(x))
    again = load(folder, base=lambda: timm.create_model("test_resnet", **kwargs))
    assert torch.equal(again(x), converted(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_comes_back(dtype, tmp_path):
    model = timm.create_model("test_resnet").to(dtype).eval()
    converted = convert(model, "maxpool_all")
    again = load(save(converted, tmp_path))
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    assert torch.equal(again(x), converted(x))


def test_a_new_head_after_loading_is_saved_again(saved, tmp_path):
    again = load(saved)
    again.reset_classifier(3)
    assert load(save(again, tmp_path)).num_classes == 3


def test_features_only_asks_for_its_base(tmp_path):
    def make():
        return timm.create_model("test_resnet", features_only=True).eval()

    torch.manual_seed(0)
    converted = convert(make(), "maxpool_all")
    folder = save(converted, tmp_path)
    with pytest.raises(RecordMismatchError, match="base="):
        load(folder)
    x = torch.randn(1, 3, 64, 64)
    made, meant = load(folder, base=make)(x), converted(x)
    assert all(torch.equal(a, b) for a, b in zip(made, meant, strict=True))


def test_a_base_that_does_not_fit_is_left_as_it_was(saved):
    base = timm.create_model("test_resnet", num_classes=9, in_chans=1)
    modules = list(base.modules())
    with pytest.raises(RecordMismatchError, match="fc"):
        load(saved, base=base)
    assert list(base.modules()) == modules


def test_a_part_that_was_converted_on_its_own_is_not_saved_half(tmp_path):
    outer = nn.Sequential(timm.create_model("test_resnet", num_classes=4))
    convert_(outer[0], "maxpool_deep")
    converted = convert(outer, "shift_all", example=torch.zeros(1, 3, 64, 64))
    with pytest.raises(RecordMismatchError, match="on its own"):
        save(converted, tmp_path)


def test_an_unwritable_directory_is_an_error(fast, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SurgeryError, match="cannot be written"):
        save(fast, tmp_path / "file" / "folder")


@pytest.mark.skipif(os.name == "nt", reason="there is no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o007, 0o660)])
def test_files_have_the_mode_that_the_umask_leaves(fast, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(fast, tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_shared_tensors_are_saved(tmp_path):
    class Tied(zoo.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.second_head = nn.Linear(16, 5)
            self.second_head.weight = self.head.weight

    converted = convert(Tied(), "maxpool_all", example=zoo.EXAMPLE).eval()
    again = load(save(converted, tmp_path), base=Tied)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(x), converted(x))
    assert again.second_head.weight is again.head.weight
