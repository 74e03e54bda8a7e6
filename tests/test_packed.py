"""Convolutions with packed weights against those that they were made from."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pfsurgery
from pfsurgery import fuse
from pfsurgery.kernels import disabled
from pfsurgery.packed import PackedConv2d, packed

pytestmark = pytest.mark.skipif(not torch._C._has_mkldnn, reason="this torch has no oneDNN")

LAST = torch.channels_last
PACKED = "mkldnn::_convolution_pointwise"
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.05},
}
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not (torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        reason="oneDNN has no bfloat16 here",
    ),
)


def pair(conv, shape=(2, 8, 12, 12)):
    """A convolution in channels_last, and the same one with packed weights."""
    conv = conv.eval().to(memory_format=LAST)
    return conv, packed(conv, shape)


def image(*shape):
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 8, 12, 12))).contiguous(memory_format=LAST)


def runs_packed(model, x):
    """How often a model uses packed weights, and what it makes."""
    with torch.no_grad(), torch.profiler.profile() as seen:
        made = model(x)
    return sum(event.name == PACKED for event in seen.events()), made


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    inputs, outputs = (groups * draw(st.integers(1, 20)) for _ in range(2))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    dilation = 1 if stride > 1 else dilation  # wrong in torch 2.14 in bfloat16
    asked = draw(st.sampled_from([padding, padding, "valid", "same"]))
    asked = padding if stride > 1 and asked == "same" else asked
    bias = draw(st.booleans())
    return nn.Conv2d(inputs, outputs, kernel, stride, asked, dilation, groups, bias)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_packed_weights_compute_the_same(dtype, data):
    """On images of other sizes than they were packed for, too."""
    conv = data.draw(convolutions())
    sizes = st.tuples(st.integers(1, 4), st.integers(9, 20), st.integers(9, 20))
    (n, height, width), meant = data.draw(sizes), data.draw(sizes)
    conv, fast = pair(conv.to(dtype), (meant[0], conv.in_channels, *meant[1:]))
    x = torch.randn(n, conv.in_channels, height, width).to(dtype, memory_format=LAST)
    with torch.no_grad():
        made, wanted = fast(x), conv(x)
    torch.testing.assert_close(made, wanted, **CLOSE[dtype])
    assert made.is_contiguous() == wanted.is_contiguous()


@pytest.mark.parametrize(
    "x",
    [image(0, 8, 12, 12), image()[0], image().contiguous(), image()[:, :, ::2, 1:]],
    ids=["no images", "one image", "NCHW", "sliced"],
)
def test_inputs_of_other_kinds_go_too(x):
    conv, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), conv(x))


def test_a_wrong_number_of_channels_is_torchs_own_error():
    _, fast = pair(nn.Conv2d(8, 8, 3))
    with torch.no_grad(), pytest.raises(RuntimeError, match="8 channels"):
        fast(image(2, 6, 12, 12))


def test_nan_and_infinity_are_not_lost():
    conv, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    x = image()
    x[0, 3, 4, 4], x[1, 5, 0, 0] = float("nan"), float("inf")
    times, made = runs_packed(fast, x)
    assert times == 1
    with torch.no_grad():
        assert torch.equal(made.isfinite(), conv(x).isfinite())


def test_gradients_are_those_of_the_convolution():
    conv, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    found = []
    for module in (conv, fast):
        x = image().requires_grad_()
        found.append(torch.autograd.grad(module(x).square().sum(), (x, *module.parameters())))
    for made, wanted in zip(*found, strict=True):
        torch.testing.assert_close(made, wanted)
    assert torch.func.jvp(fast.requires_grad_(False), (image(),), (image(),))[1].any()


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_standard_calls_are_made_where_they_are_asked_for():
    conv, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    x = image()
    assert runs_packed(fast, x)[0] == 1
    with disabled():
        assert runs_packed(fast, x)[0] == 0
    with torch.backends.mkldnn.flags(enabled=False):
        assert runs_packed(fast, x)[0] == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_packed(fast, x)[1].dtype == torch.bfloat16
    with torch.no_grad():
        exported = torch.export.export(fast, (x,))
        called = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
        assert called == {"aten.conv2d.default"}
        traced = torch.jit.trace(fast, x)
        assert torch.fx.symbolic_trace(nn.Sequential(fast)).graph
        torch.testing.assert_close(torch.jit.script(fast)(x), conv(x))
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        for made in (exported.module(), traced, compiled):
            torch.testing.assert_close(made(x), conv(x))
        torch.testing.assert_close(torch.func.vmap(fast)(x[None]), conv(x)[None])


def test_copies_and_other_kinds_of_numbers_are_packed_too():
    conv, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    x = image()
    for made in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        times, found = runs_packed(made, x)
        assert times == 1
        assert made.weight is not fast.weight
        torch.testing.assert_close(found, runs_packed(conv, x)[1])
    assert fast.state_dict().keys() == conv.state_dict().keys()
    double = copy.deepcopy(fast).double()
    assert runs_packed(double, x.double())[0] == 0
    back = double.float()
    assert runs_packed(back, x)[0] == 1


def test_several_threads_use_the_same_packed_weights():
    conv, fast = pair(nn.Conv2d(8, 16, 3, padding=1))
    images = [image(n, 8, 12 + n, 12) for n in range(1, 9)]

    def of(module):
        def made(x):
            with torch.no_grad():
                return module(x)

        return made

    with ThreadPoolExecutor(4) as pool:
        for made, wanted in zip(pool.map(of(fast), images), map(of(conv), images), strict=True):
            torch.testing.assert_close(made, wanted)


def test_a_copy_without_storage_is_the_plain_convolution():
    _, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not copy.deepcopy(fast).is_packed
    assert not copy.deepcopy(fast).to("meta").is_packed


CHANGES = {
    "loaded": lambda conv, other: conv.load_state_dict(other.state_dict()),
    "assigned": lambda conv, other: conv.load_state_dict(other.state_dict(), assign=True),
    "set": lambda conv, other: setattr(conv, "weight", other.weight),
    "written over": lambda conv, other: nn.init.constant_(conv.weight, 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change):
    conv, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    other, x = nn.Conv2d(8, 8, 3, padding=1), image()
    assert runs_packed(fast, x)[0] == 1
    CHANGES[change](fast, other)
    CHANGES[change](conv, other)
    times, made = runs_packed(fast, x)
    assert times == 0
    with torch.no_grad():
        torch.testing.assert_close(made, conv(x))
    assert runs_packed(fast.to(torch.float32), x)[0] == 1


def test_other_parameters_for_one_call_are_taken():
    conv, fast = pair(nn.Conv2d(8, 8, 3, padding=1))
    other = {name: torch.randn_like(value) for name, value in conv.state_dict().items()}
    with torch.no_grad():
        made = torch.func.functional_call(fast, other, image())
        torch.testing.assert_close(made, torch.func.functional_call(conv, other, image()))


def test_a_stride_over_a_dilated_window_is_left_to_torch():
    """oneDNN reads beyond narrow inputs, as torch 2.14 has it."""
    conv = nn.Conv2d(16, 16, 2, stride=3, padding=4, dilation=3)
    assert not packed(conv, (1, 16, 4, 2)).is_packed


def test_narrow_inputs_that_onednn_gets_wrong_are_left_to_torch():
    """torch gives it no small batch of one, where oneDNN's numbers are wrong."""
    conv, fast = pair(nn.Conv2d(1, 16, 3, stride=(1, 2)), (8, 1, 32, 32))
    for shape in ((1, 1, 4, 4), (1, 1, 7, 3)):
        x = image(*shape)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), conv(x))


class Flattening(nn.Module):
    """Spectrograms, say: one channel, and what is made of them as one vector."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 64, 5, padding=2)

    def forward(self, x):
        return self.conv(x).relu().view(len(x), -1)


class Carrying(nn.Module):
    """A convolution that carries what its owner uses."""

    def __init__(self, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, kernel_size, padding="same")
        self.conv.gain = 3.0
        self.conv.more = nn.Conv2d(8, 8, 1)
        self.conv.register_buffer("scale", torch.ones(8))

    def forward(self, x):
        return self.conv(x) * self.conv.gain + self.conv.more(x)


def doubled(self, x):
    return 2 * self._conv_forward(x, self.weight, self.bias)


def with_its_own_forward(norm=False):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    conv.forward = MethodType(doubled, conv)
    behind = nn.BatchNorm2d(8)
    nn.init.normal_(behind.running_mean)
    return nn.Sequential(conv, behind) if norm else nn.Sequential(conv)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        pytest.param(Flattening(), image(2, 1, 24, 24), id="one channel"),
        pytest.param(Carrying(3), image(), id="attributes"),
        pytest.param(Carrying(1), image(), id="attributes of a pointwise one"),
        pytest.param(with_its_own_forward(), image(), id="its own forward"),
        pytest.param(with_its_own_forward(True), image(), id="its own forward before a norm"),
    ],
)
def test_what_hangs_on_a_convolution_stays(model, x, monkeypatch):
    monkeypatch.setattr(fuse, "_is_faster", lambda *_: True)
    fast = pfsurgery.optimize(model.eval(), x, memory_format="channels_last")
    lost = model.state_dict().keys() - fast.state_dict().keys()
    assert lost <= {"conv.more.weight", "conv.more.bias"}  # itself in the kernel
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("name", ["resnet26", "mobilenetv2_050", "regnetx_002", "convnext_atto"])
def test_optimized_models_compute_the_same(name, monkeypatch):
    """Were packed weights faster everywhere."""
    monkeypatch.setattr(fuse, "_is_faster", lambda after, *_: isinstance(after, PackedConv2d))
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=7).eval(), image(2, 3, 64, 64)
    fast = pfsurgery.optimize(model, x, memory_format="channels_last")
    with torch.no_grad():
        wanted = model(x)
        times, made = runs_packed(fast, x)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pfsurgery.optimize(fast, x)(x), wanted, rtol=1e-4, atol=1e-4)
    assert times == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_watched_and_shared_convolutions_are_left_alone(monkeypatch):
    monkeypatch.setattr(fuse, "_is_faster", lambda after, *_: isinstance(after, PackedConv2d))
    shared = nn.Conv2d(8, 8, 3, padding=1)
    watched = nn.Conv2d(8, 8, 3, padding=1)
    watched.register_forward_hook(lambda module, args, made: made + 1)
    odd = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    model, x = nn.Sequential(shared, watched, odd, shared).eval(), image()
    fast = pfsurgery.optimize(model, x, memory_format="channels_last")
    times, made = runs_packed(fast, x)
    assert times == 0
    with torch.no_grad():
        torch.testing.assert_close(made, model(x))
