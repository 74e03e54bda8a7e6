"""Whole bottlenecks in one kernel against the stock operators that they stand in for."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.reduction import ForkingPickler

import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.utils import prune

import pfsurgery
from pfsurgery.errors import ShapeError
from pfsurgery.kernels import disabled, explain
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure
from tests.bottlenecks import ANY, FAST, HAS_TILES, both_ways, cases, needs_tiles, step_by_step


@FAST
@given(cases(), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_a_fused_bottleneck_is_the_stock_operators(case, seed, adds, relu):
    geometry, structure, x = case
    torch.manual_seed(seed)
    bottleneck = Bottleneck(geometry, structure)
    bottleneck.summed, bottleneck.raised = adds, relu
    size = len(x), geometry.out_channels, *geometry.output_size(tuple(x.shape[2:]))
    more = torch.randn(size)

    def block():
        made = bottleneck(x) + more if adds else bottleneck(x)
        return torch.relu(made) if relu else made

    made, wanted = both_ways(block)
    assert made.shape == wanted.shape
    assert made.is_contiguous(memory_format=torch.channels_last) or made.is_contiguous()
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "inputs", "least"),
    [
        pytest.param(torch.float32, ANY, 1, id="float32"),
        pytest.param(torch.bfloat16, st.sampled_from([32, 64]), 16, id="bf16", marks=needs_tiles),
    ],
)
@FAST
@given(data=st.data(), images=st.integers(4, 19), threads=st.integers(1, 2))
def test_an_image_is_not_changed_by_those_beside_it(dtype, inputs, least, data, images, threads):
    """A thread takes several small images at a time, and there may be too few for the last."""
    geometry, structure, x = data.draw(cases(inputs))
    assume(x.shape[2:].numel() >= least)  # fewer are read together with other images
    x = torch.randn(images, *x.shape[1:]).to(dtype, memory_format=torch.channels_last)
    bottleneck, before = Bottleneck(geometry, structure).to(dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made = bottleneck.fused(x)
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([bottleneck.fused(image[None]) for image in x])
    assert torch.equal(made, alone)


@needs_tiles
def test_packed_weights_follow_the_kind_of_numbers(bottleneck):
    moved = copy.deepcopy(bottleneck)
    moved.freeze()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            wanted = stock(bottleneck, X).to(dtype)
            torch.testing.assert_close(moved.to(dtype)(X.to(dtype)), wanted, rtol=2e-2, atol=2e-2)


@FAST
@given(cases())
def test_training_has_the_gradients_of_its_steps(case):
    geometry, structure, x = case
    assume(len(x))
    bottleneck = Bottleneck(geometry, structure).double()
    x = x[:4].double().requires_grad_()

    def gradients(forward):
        made = forward(x)
        weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
        loss = (made * weights.double()).sum()
        return made, torch.autograd.grad(loss, [x, *bottleneck.parameters()])

    made, found = gradients(bottleneck)
    wanted, expected = gradients(partial(step_by_step, bottleneck))
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(found, expected)


def test_blocks_that_lie_in_the_padding():
    for dtype in (torch.float32, torch.bfloat16):
        geometry = Geometry(32, 8, (1, 1), padding=(3, 3))
        sparse = Bottleneck(geometry, Structure("thin", 4, (), 4, 0.0)).to(dtype)
        for size in ((1, 16), (16, 1), (5, 5)):
            x = torch.randn(1, 32, *size).to(dtype)
            with torch.no_grad():
                wanted = step_by_step(copy.deepcopy(sparse).float(), x.float(), dtype)
                torch.testing.assert_close(sparse(x).float(), wanted, rtol=3e-2, atol=3e-2)


@pytest.fixture(scope="module")
def bottleneck() -> Bottleneck:
    torch.manual_seed(0)
    geometry = Geometry(32, 48, (3, 3), padding=(1, 1))
    run = Run("tap", 0, 1, 1, 1, tuple(range(16)))
    return Bottleneck(geometry, Structure("bottleneck", 16, (run,), None, 0.0)).eval()


def stock(bottleneck: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    with disabled():
        return step_by_step(bottleneck, x)


X = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))


class Doubled(torch.nn.Module):
    """An adapter around a convolution, which still shows its weight."""

    def __init__(self, conv: torch.nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.weight, self.bias = conv, conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.conv(x)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("name", ["reduce", "expand"])
def test_adapters_masks_and_hooks_on_its_products_count(bottleneck, name, tracked):
    def doubles(module, inputs, output):
        return 2 * output

    x = X.clone().requires_grad_(tracked)
    with torch.set_grad_enabled(tracked):
        adapted, hooked, pruned = (copy.deepcopy(bottleneck) for _ in range(3))
        setattr(adapted, name, Doubled(getattr(bottleneck, name)))
        getattr(hooked, name).register_forward_hook(doubles)
        prune.l1_unstructured(getattr(pruned, name), "weight", 0.5)
        for changed in (adapted, hooked, pruned):
            torch.testing.assert_close(changed(x), stock(changed, x), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(changed(x), bottleneck(x), atol=1e-3)


def test_what_alone_is_trained_has_a_gradient(bottleneck):
    for name, _ in bottleneck.named_parameters():
        trained = copy.deepcopy(bottleneck).requires_grad_(False)
        parameter = trained.get_parameter(name).requires_grad_()
        trained(X).sum().backward()
        assert parameter.grad is not None, name


def test_packed_weights_follow_the_module(bottleneck):
    wanted = stock(bottleneck, X)
    moved = copy.deepcopy(bottleneck)
    moved.freeze()
    with torch.no_grad():
        assert torch.allclose(moved.double()(X.double()), wanted.double(), atol=1e-4)
        torch.testing.assert_close(moved.float()(X), wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="scalar type"):
            moved.double()(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_may_be_sent_to_another_process(bottleneck, dtype):
    """Torch moves tensors into shared memory for that, those of the sender too."""
    mine = copy.deepcopy(bottleneck).to(dtype)
    mine.freeze()
    with torch.no_grad():
        wanted = mine(X.to(dtype))
        ForkingPickler.dumps(mine)
        kept = [torch.randn(4096) for _ in range(64)]
        assert torch.equal(mine(X.to(dtype)), wanted)
        assert torch.equal(copy.deepcopy(mine)(X.to(dtype)), wanted)
    assert kept


def test_a_pool_behind_a_reduction_sees_what_was_reduced():
    for kind in ("average", "maximum"):
        run = Run(kind, 0, 0, 3, 3, (0, 1, 2, 3))
        geometry = Geometry(32, 8, (3, 3), padding=(1, 1))
        pooled = Bottleneck(geometry, Structure("bottleneck", 4, (run,), None, 0.0)).eval()
        with torch.no_grad():
            torch.testing.assert_close(pooled(X), stock(pooled, X), rtol=1e-5, atol=1e-5)


def test_windows_that_hold_only_padding_are_not_fitted():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=3), torch.nn.Conv2d(8, 8, 1))
    found = pfsurgery.plan(model, lambda site: "bare", example=X[:1, :3], include=["0"])
    assert not found.replaced
    assert "padding" in found["0"].reason


def test_images_of_several_sizes_one_after_the_other(bottleneck):
    for size in (8, 14, 9, 31, 8, *range(10, 44), 8):  # more than it remembers
        x = torch.randn(2, 32, size, size + 1)
        made, wanted = both_ways(lambda x=x: bottleneck(x))
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


def test_nan_reaches_the_outputs_that_see_it(bottleneck):
    x = torch.randn(1, 32, 16, 16)
    x[0, 5, 7, 3] = torch.nan
    with torch.no_grad(), disabled():
        wanted = bottleneck(x).isnan()
    with torch.no_grad():
        assert torch.equal(bottleneck(x).isnan(), wanted)


def test_what_does_not_fit_is_named(bottleneck):
    with torch.no_grad():
        with pytest.raises(ShapeError, match="32 channels was given 16"):
            bottleneck(torch.randn(2, 16, 16, 16))
        valid = Bottleneck(Geometry(32, 8, (5, 5)), Structure("thin", 4, (), 4, 0.0))
        with pytest.raises(ShapeError, match="smaller than the window"):
            valid(torch.randn(64, 32, 4, 4))


def test_several_threads_at_once(bottleneck):
    images = [torch.randn(2, 32, size, size) for size in range(8, 24)]

    def made(x):
        with torch.no_grad():
            return bottleneck(x)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(made, images))
    with torch.no_grad(), disabled():
        for x, y in zip(images, found, strict=True):
            torch.testing.assert_close(y, bottleneck(x), rtol=1e-5, atol=1e-5)


def test_the_eager_kernel_sees_changed_weights(bottleneck):
    mine, x = copy.deepcopy(bottleneck), torch.randn(2, 32, 12, 12)
    with torch.no_grad():
        before = mine(x)
        mine.expand.weight.data.mul_(2)
        mine.expand.bias.data.mul_(2)
        torch.testing.assert_close(mine(x), 2 * before)


def test_memory_is_taken_again_when_nobody_holds_it(bottleneck):
    x = torch.randn(8, 32, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        first = bottleneck(x)
        copy_of_first, at = first.clone(), first.data_ptr()
        view = first[0]
        del first
        second = bottleneck(x + 1)
        assert second.data_ptr() != at
        assert torch.equal(view, copy_of_first[0])
        del view
        again = {bottleneck(x).data_ptr() for _ in range(3)}
    assert len(again | {at}) <= 2


def test_optimizing_draws_no_random_numbers():
    model = timm.create_model("test_resnet").eval()
    state = torch.get_rng_state()
    pfsurgery.optimize(model, torch.zeros(2, 3, 64, 64), memory_format="channels_last")
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_flow_where_they_are_wanted(bottleneck):
    x = torch.randn(2, 32, 12, 12, requires_grad=True)
    bottleneck(x).sum().backward()
    assert x.grad is not None
    assert bottleneck.reduce.weight.grad is not None


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same(bottleneck, threads):
    x = torch.randn(3, 32, 20, 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            made = bottleneck(x)
    finally:
        torch.set_num_threads(before)
    with torch.no_grad(), disabled():
        torch.testing.assert_close(made, bottleneck(x), rtol=1e-5, atol=1e-5)


def test_explain_says_that_bottlenecks_are_fused():
    x = torch.randn(2, 32, 12, 12)
    assert "bottlenecks in one kernel" in explain(x)
    assert "bottlenecks in one kernel" not in explain(x.double())
    assert ("bottlenecks in one kernel" in explain(x.bfloat16())) == HAS_TILES


def test_an_optimized_copy_keeps_its_packed_weights():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    images = torch.randn(8, 3, 64, 64)
    policy = pfsurgery.budget(macs="90%")
    fast = pfsurgery.convert(model, policy, images=images, include=["layer1.0.conv1"])
    ready = pfsurgery.optimize(fast, images[:2])
    with torch.no_grad():
        torch.testing.assert_close(ready(images), fast(images), rtol=1e-3, atol=1e-4)
        with disabled():
            torch.testing.assert_close(ready(images), fast(images), rtol=1e-3, atol=1e-4)
    inside = [m for m in ready.modules() if isinstance(m, Bottleneck)]
    assert any(m.relu for m in inside)
    exported = torch.export.export(ready, (images,))
    kinds = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any("conv2d" in kind for kind in kinds)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bottleneck_in_one_gpu_kernel_is_the_stock_operators(bottleneck, dtype):
    fused = copy.deepcopy(bottleneck).to("cuda", dtype)
    x = torch.randn(4, 32, 14, 15, device="cuda", dtype=dtype)
    with torch.no_grad():
        wanted = fused(x)
        fused.on_gpu = True
        torch.testing.assert_close(fused(x), wanted, rtol=2e-2, atol=2e-2)
