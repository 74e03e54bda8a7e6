"""Each op against what it stands for: output sizes of the convolution, filters that are known."""

from __future__ import annotations

from math import comb

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pfsurgery import Op, Support, list_ops, register_op, scan
from pfsurgery.errors import UnknownNameError
from pfsurgery.ops import get_op
from pfsurgery.ops.base import _REGISTRY
from pfsurgery.sites import Geometry, Site, geometry_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
FAST = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(
    draw, strides=(1, 2, 3), modes=("zeros", "reflect", "replicate", "circular"), dims=2
):
    sizes = st.tuples(*(st.integers(1, 5) for _ in range(dims)))
    kernel = draw(sizes.filter(lambda k: max(k) > 1))
    dilation = draw(st.integers(1, 2))
    stride = draw(st.sampled_from(strides))
    same = stride == 1 and draw(st.booleans())
    half = tuple((k - 1) * dilation // 2 for k in kernel)
    padding = "same" if same else tuple(draw(st.integers(0, h)) for h in half)
    channels = draw(st.integers(1, 20))
    return CLASSES[dims](
        channels,
        channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=channels,
        padding_mode=draw(st.sampled_from(modes)),
        bias=False,
    )


def site_of(conv: nn.Conv2d, x: torch.Tensor) -> Site:
    return Site("conv", ("conv",), "", geometry_of(conv), tuple(x.shape), tuple(conv(x).shape))


@FAST
@given(convolutions(), st.integers(9, 14), st.integers(9, 14), st.sampled_from(list_ops()))
def test_sizes_dtype_and_layout_are_those_of_the_convolution(conv, height, width, name):
    x = torch.randn(2, conv.in_channels, height, width).to(memory_format=torch.channels_last)
    site, op = site_of(conv, x), get_op(name)
    if op.keeps_convolution or op.fitted or not op.supports(site):
        return
    module = op.build(site)
    assert not list(module.parameters())
    assert not module.state_dict()
    expected = conv(x)
    y = module(x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert torch.isfinite(y).all()
    if conv.in_channels > 1:
        assert y.is_contiguous(memory_format=torch.channels_last)


@FAST
@given(convolutions(), st.integers(9, 14))
def test_shift_is_a_depthwise_convolution_with_one_hot_filters(conv, size):
    x = torch.randn(2, conv.in_channels, size, size)
    site = site_of(conv, x)
    if not get_op("shift").supports(site):
        return
    module = get_op("shift").build(site)
    with torch.no_grad():
        conv.weight.zero_()
        channel = 0
        for (i, j), count in module.taps:
            conv.weight[channel : channel + count, 0, i, j] = 1
            channel += count
        assert channel == conv.in_channels
        torch.testing.assert_close(module(x), conv(x))


@pytest.mark.parametrize("dims", [1, 3])
@settings(FAST, max_examples=15)
@given(st.data())
def test_signals_and_volumes_are_treated_as_images_are(dims, data):
    conv = data.draw(convolutions(dims=dims))
    size = data.draw(st.tuples(*(st.integers(9, 11) for _ in range(dims))))
    layout = {1: torch.contiguous_format, 3: torch.channels_last_3d}[dims]
    x = torch.randn(1, conv.in_channels, *size).to(memory_format=layout)
    site = site_of(conv, x)
    for name in ("max_pool", "avg_pool", "shift", "identity", "blur"):
        if not get_op(name).supports(site):
            continue
        module = get_op(name).build(site)
        y = module(x)
        assert y.shape == conv(x).shape
        assert y.isfinite().all()
        assert conv.in_channels == 1 or y.is_contiguous(memory_format=layout)
        if name in ("max_pool", "avg_pool", "blur"):
            constant = module(torch.full_like(x, 3.0))
            torch.testing.assert_close(constant, torch.full_like(constant, 3.0))
        if name == "shift":
            with torch.no_grad():
                conv.weight.zero_()
                channel = 0
                for tap, count in module.taps:
                    conv.weight[(slice(channel, channel + count), 0, *tap)] = 1
                    channel += count
                torch.testing.assert_close(y, conv(x))


@FAST
@given(convolutions(), st.integers(9, 14))
def test_identity_is_the_middle_tap(conv, size):
    x = torch.randn(2, conv.in_channels, size, size)
    site = site_of(conv, x)
    if not get_op("identity").supports(site):
        return
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, 0, (conv.kernel_size[0] - 1) // 2, (conv.kernel_size[1] - 1) // 2] = 1
        torch.testing.assert_close(get_op("identity").build(site)(x), conv(x))


@FAST
@given(convolutions(modes=("reflect", "replicate", "circular")), st.integers(9, 14))
def test_blur_and_average_are_fixed_depthwise_filters(conv, size):
    x = torch.randn(2, conv.in_channels, size, size)
    site = site_of(conv, x)
    rows, columns = (
        torch.tensor([comb(k - 1, i) / 2 ** (k - 1) for i in range(k)]) for k in conv.kernel_size
    )
    filters = {
        "blur": torch.outer(rows, columns),
        "avg_pool": torch.full(conv.kernel_size, 1 / (len(rows) * len(columns))),
    }
    for name, kernel in filters.items():
        if get_op(name).supports(site):
            with torch.no_grad():
                conv.weight.copy_(kernel.expand_as(conv.weight))
                torch.testing.assert_close(get_op(name).build(site)(x), conv(x))


@FAST
@given(convolutions(), st.integers(9, 14), st.sampled_from(["avg_pool", "blur", "max_pool"]))
def test_a_constant_image_stays_constant_to_its_border(conv, size, name):
    x = torch.full((1, conv.in_channels, size, size), 3.0)
    site = site_of(conv, x)
    if get_op(name).supports(site):
        y = get_op(name).build(site)(x)
        torch.testing.assert_close(y, torch.full_like(y, 3.0))


@FAST
@given(convolutions(strides=(1,)), st.integers(9, 14), st.floats(0.1, 10))
def test_max_pool_commutes_with_scaling(conv, size, scale):
    x = torch.randn(1, conv.in_channels, size, size)
    site = site_of(conv, x)
    if get_op("max_pool").supports(site):
        pool = get_op("max_pool").build(site)
        torch.testing.assert_close(pool(x * scale), pool(x) * scale)


def test_max_pool_commutes_with_flips_at_odd_kernels():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    x = torch.randn(1, 4, 9, 9)
    pool = get_op("max_pool").build(site_of(conv, x))
    assert torch.equal(pool(x.flip(-1)), pool(x).flip(-1))


@pytest.mark.parametrize(
    ("geometry", "op", "reason"),
    [
        (Geometry(4, 4, (3, 3), padding=(2, 2)), "max_pool", "nothing but padding"),
        (Geometry(4, 4, (3, 3), padding=(2, 2), dilation=(2, 2)), "avg_pool", "no dilation"),
        (Geometry(4, 4, (3, 3), padding=(1, 1)), "avg_down", "stride of 2"),
        (Geometry(4, 4, (3, 3), stride=(2, 2)), "avg_down", "change the size"),
    ],
)
def test_an_op_says_why_it_does_not_fit(geometry, op, reason):
    site = Site("x", ("x",), "", geometry, (1, 4, 8, 8), (1, 4, 8, 8))
    support = get_op(op).supports(site)
    assert not support
    assert reason in support.reason


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 7, padding=3, groups=4),
        nn.Conv2d(4, 4, (9, 5), (2, 3), (4, 2), groups=4),
        nn.Conv2d(4, 4, 7, padding=6, dilation=2, groups=4),
        nn.Conv2d(4, 4, 7, padding=3, groups=4, padding_mode="reflect"),
        nn.Conv3d(4, 4, 3, padding=1, groups=4),
    ],
    ids=lambda conv: f"{conv.kernel_size} {conv.padding_mode}",
)
def test_large_windows_are_compiled_axis_by_axis(conv):
    torch.manual_seed(0)
    x = torch.randint(5, (2, 4, 19, 17, 15)[: 2 + len(conv.kernel_size)]).float()
    pool, graphs = get_op("max_pool").build(site_of(conv, x)), []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(pool, backend=backend, fullgraph=True)
    with_nan = torch.where(torch.rand_like(x) < 0.01, torch.nan, x)
    made, wanted = compiled(with_nan), pool(with_nan)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)
    gradients = []
    for run in (compiled, pool):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        gradients.append(
            torch.autograd.grad(out, leaf, torch.linspace(1, 2, out.numel()).view_as(out))
        )
    torch.testing.assert_close(*gradients)
    stock = (nn.functional.max_pool2d, nn.functional.max_pool3d)
    windows = [node.args[1] for graph in graphs for node in graph.nodes if node.target in stock]
    assert len(windows) == len(graphs) * len(conv.kernel_size)
    assert all(sum(size > 1 for size in window) == 1 for window in windows)
    exported = torch.export.export(pool, (x,)).graph
    assert sum("max_pool" in str(node.target) for node in exported.nodes) == 1


def test_a_dilated_max_pool_is_supported_although_stock_pooling_refuses_its_padding():
    conv = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
    x = torch.randn(1, 4, 9, 9)
    assert get_op("max_pool").build(site_of(conv, x))(x).shape == x.shape


def test_identity_is_a_copy_so_that_nothing_reaches_its_input():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    x = torch.randn(1, 4, 9, 9)
    y = get_op("identity").build(site_of(conv, x))(x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_ops_can_be_added_and_names_are_unique():
    class Negate(Op):
        name = "negate"
        summary = "test"

        def supports(self, site: Site) -> Support:
            return Support("" if site.kind == "depthwise" else "depthwise only")

        def build(self, site: Site) -> nn.Module:
            return nn.Identity()

    try:
        register_op(Negate())
        assert "negate" in list_ops("neg*")
        with pytest.raises(UnknownNameError, match="exists already"):
            register_op(Negate())
    finally:
        _REGISTRY.pop("negate")
    with pytest.raises(UnknownNameError, match="max_pool"):
        get_op("max_pol")


def test_timm_same_padding_is_followed():
    from timm.layers import Conv2dSame

    for size in (7, 8, 9):
        for stride in (1, 2):
            conv = Conv2dSame(4, 4, 3, stride=stride, groups=4)
            x = torch.randn(1, 4, size, size)
            site = scan(nn.Sequential(conv), x)[0]
            for name in ("max_pool", "shift", "identity", "blur", "avg_pool"):
                assert get_op(name).build(site)(x).shape == conv(x).shape


NO_SWAP = {"avg_down", "mixed", "bare", "thin", "eff_attention"}


@pytest.mark.parametrize("name", sorted(set(list_ops()) - NO_SWAP))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(name, dtype):
    conv = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6)
    x = torch.randn(1, 6, 8, 8)
    module = get_op(name).build(site_of(conv, x))
    assert module(x.to(dtype)).dtype == dtype
