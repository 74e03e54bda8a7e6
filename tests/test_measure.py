import json
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from pfsurgery.errors import RecordMismatchError, ShapeError, SurgeryError
from pfsurgery.measure import (
    Comparison,
    Measurement,
    compare,
    count,
    latency,
    measure,
    peak_memory,
)

KB = torch.zeros(1, 4, 8, 8)  # 1,024 bytes


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would drown every difference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def resnet18():
    return timm.create_model("resnet18").eval()


@pytest.fixture(scope="module")
def comparison(resnet18):
    small = timm.create_model("test_resnet").eval()
    return compare(small, resnet18, torch.zeros(1, 3, 160, 160), repeats=5, warmup=1)


def test_resnet50_counts_are_exact():
    counted = count(timm.create_model("resnet50"))
    assert counted.parameters == 25_557_032
    assert counted.macs == 4_089_184_256
    assert counted.activations == 11_114_984
    assert not counted.uncounted


def test_macs_are_those_of_the_hooked_layers(resnet18):
    seen = []

    def hook(module, args, output):
        seen.append(output.numel() * module.weight[0].numel())

    layers = [m for m in resnet18.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        resnet18(torch.zeros(2, 3, 96, 96))
    for handle in handles:
        handle.remove()
    assert count(resnet18, torch.zeros(2, 3, 96, 96)).macs == sum(seen)


@pytest.mark.parametrize(
    ("layer", "operations"),
    [
        (nn.MaxPool2d(3, 1, 1), 256 * 8),
        (nn.MaxPool2d((1, 2)), 128),
        (nn.AvgPool2d(3, 1, 1), 256 * 9),
        (nn.AdaptiveAvgPool2d(1), 256),
        (nn.AdaptiveAvgPool2d(3), 4 * (4 + 3 + 3) ** 2),
        (nn.AdaptiveMaxPool2d(2), 256 - 16),
        (nn.ZeroPad2d(1), 400),
        (nn.ReflectionPad2d(1), 400),
        (nn.ReLU(inplace=True), 256),
        (nn.BatchNorm2d(4), 512),
        (nn.GroupNorm(2, 4), 1280),
        (nn.Softmax(1), 1024),
        (nn.Identity(), 0),
        (nn.Flatten(), 0),
        (Call(lambda x: x + x), 256),
        (Call(lambda x: x.roll(1, -1)), 256),
        (Call(lambda x: torch.cat([x, x])), 512),
        (Call(lambda x: x.mean((2, 3))), 256),
        (Call(lambda x: x.view(x.shape[0] * x.shape[1], -1)), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_pooling_and_the_like_are_element_operations(layer, operations):
    counted = count(layer, KB.clone())
    assert (counted.element_ops, counted.macs, dict(counted.uncounted)) == (operations, 0, {})


@pytest.mark.parametrize(
    ("model", "args", "macs"),
    [
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (KB,), 16 * 6 * 2 * 9),
        (nn.Conv2d(4, 6, (2, 3), padding="same"), (KB,), 64 * 6 * 4 * 6),
        (nn.ConvTranspose2d(4, 6, 3), (KB,), 64 * 4 * 6 * 9),
        (nn.Linear(8, 3), (KB,), 32 * 8 * 3),
        (Call(torch.matmul), (torch.zeros(2, 3, 4), torch.zeros(4, 5)), 2 * 3 * 4 * 5),
        (Call(torch.bmm), (torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)), 2 * 3 * 4 * 5),
        (Call(torch.addmm), (torch.zeros(5), torch.zeros(3, 4), torch.zeros(4, 5)), 60),
        (
            Call(lambda a, b: torch.einsum("...ij,jk", a, b)),
            (torch.zeros(2, 3, 4), torch.zeros(4, 5)),
            2 * 3 * 4 * 5,
        ),
        (
            Call(lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c)),
            (torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(5, 6)),
            3 * 4 * 5 + 3 * 5 * 6,
        ),
        (
            Call(nn.functional.scaled_dot_product_attention),
            (torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 4)),
            2 * 3 * 5 * 7 * (8 + 4),
        ),
    ],
)
def test_multiply_adds(model, args, macs):
    counted = count(model, args)
    assert (counted.macs, dict(counted.uncounted)) == (macs, {})


def test_shared_parameters_count_once():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    tied = nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = layer.weight
    model = nn.Sequential(layer, layer, tied)
    counted = count(model, KB)
    assert counted.parameters == 4 * 4 * 9 + 4 + 4
    assert counted.macs == 3 * 256 * 36
    assert peak_memory(model, KB).parameter_bytes == 4 * counted.parameters


def test_an_operator_without_a_count_is_listed():
    counted = count(Call(lambda x: torch.cumprod(x + 1, 1)), KB)
    assert counted.uncounted == {"aten::cumprod": 1}
    assert "aten::cumprod (1x)" in str(measure(Call(lambda x: x.cumprod(1)), KB, repeats=2))


def test_outputs_and_arguments_may_be_nested():
    def forward(x, options):
        return {"out": [torch.relu(x) * options["scale"]]}

    assert count(Call(forward), (KB, {"scale": 2.0})).element_ops == 512


@pytest.mark.parametrize("measured", [count, peak_memory, measure])
def test_the_model_and_the_random_state_are_untouched(measured):
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), Call(lambda x: x + torch.rand(1))
    ).train()
    model[2].eval()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    measured(model, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_forward_caches_stays_fit_for_training():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)
            self.grid = None

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.ones(8, 8)
            return self.layer(x) * self.grid

    model = Cached()
    latency({"a": model}, KB, repeats=2)
    model(KB).sum().backward()


def test_a_failed_forward_names_the_example_and_restores(resnet18):
    resnet18.train()
    for measured in (count, peak_memory, measure):
        with pytest.raises(ShapeError, match=r"\(1, 1, 64, 64\) float32"):
            measured(resnet18, torch.zeros(1, 1, 64, 64))
    assert resnet18.training
    resnet18.eval()


def test_peak_memory_follows_live_storages():
    assert peak_memory(nn.Sequential(*[nn.ReLU() for _ in range(5)]), KB).activation_bytes == 2048
    assert peak_memory(nn.ReLU(inplace=True), KB.clone()).activation_bytes == 0
    assert peak_memory(Call(lambda x: [x + i for i in range(5)]), KB).activation_bytes == 5120
    # with the indices that max-pool writes: 64 outputs of 4 + 8 bytes
    assert peak_memory(nn.MaxPool2d(2), KB).activation_bytes == 64 * 12


def test_latency_states_its_setting(resnet18):
    example = torch.zeros(2, 3, 64, 64)
    taken = latency({"a": resnet18}, example, repeats=3, warmup=0, memory_format="channels_last")
    setting = taken["a"].setting
    assert (setting.memory_format, setting.dtype, setting.batch) == ("channels_last", "float32", 2)
    assert setting.threads == torch.get_num_threads()
    assert len(taken["a"].times_ms) == 3
    assert taken["a"].median_ms > 0 <= taken["a"].iqr_ms
    assert resnet18.conv1.weight.is_contiguous()
    assert latency({"a": resnet18}, example, repeats=2)["a"].setting.memory_format == "contiguous"


def test_volumes_are_timed_in_channels_last():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten(1, 2), nn.Conv2d(8, 2, 3))
    example = torch.zeros(1, 3, 4, 8, 8)
    taken = latency({"a": model}, example, repeats=2, warmup=0, memory_format="channels_last")
    assert taken["a"].setting.memory_format == "channels_last"
    assert compare(model, model, example, repeats=2, warmup=0, memory_format="channels_last")


def test_impossible_options_are_refused(resnet18):
    with pytest.raises(SurgeryError, match="at least 2"):
        latency({"a": resnet18}, KB, repeats=1)
    with pytest.raises(SurgeryError, match="contiguous, channels_last"):
        measure(resnet18, memory_format="nhwc")
    with pytest.raises(SurgeryError, match="at least one"):
        latency({}, KB)


def test_a_slower_model_is_called_slower(comparison):
    assert "slower" in comparison.verdict
    assert "slower" in comparison.to_markdown()
    swapped = Comparison(before=comparison.after, after=comparison.before)
    assert "faster" in swapped.verdict


def test_noise_is_called_noise(comparison):
    assert "within the noise" in Comparison(comparison.before, comparison.before).verdict


def test_fewer_macs_without_less_time_are_called_out(comparison):
    slow = Measurement(comparison.before.count, comparison.after.latency, comparison.before.memory)
    fast = Measurement(comparison.after.count, comparison.before.latency, comparison.after.memory)
    assert "fewer MACs do not show" in Comparison(fast, slow).verdict


def test_json_round_trip(comparison):
    data = json.loads(comparison.to_json())
    assert Comparison.from_dict(data) == comparison
    assert data["ratios"]["macs"] > 1
    assert data["units"]["latency"] == "ms"
    with pytest.raises(RecordMismatchError, match="after"):
        Comparison.from_dict({"before": data["before"]})
    del data["after"]["count"]["macs"]
    with pytest.raises(RecordMismatchError, match="macs"):
        Comparison.from_dict(data)


def test_tables_state_units_and_setting(comparison):
    for shown in (comparison.to_markdown(), str(comparison), str(comparison.before)):
        for word in ("MACs", " ms", " MB", "multiply-add", "float32", "batch 1", "contiguous"):
            assert word in shown
    assert all(len(line) <= 100 for line in str(comparison).splitlines())


def test_figure_is_a_png(comparison, tmp_path):
    comparison.figure(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_import_is_light():
    code = (
        "import sys, pfsurgery.measure; "
        "print([m for m in ('fvcore', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
def test_on_a_gpu():
    model = timm.create_model("resnet18", device="cuda")
    taken = measure(model, repeats=5)
    assert taken.latency.setting.device == torch.cuda.get_device_name()
    assert taken.memory.activation_bytes > 2_000_000
    assert taken.count.macs == count(model.cpu()).macs
