"""The kernels against the stock calls that they stand in for, through the ops' modules."""

from __future__ import annotations

import multiprocessing
import operator
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.func import vmap

from pfsurgery.errors import ShapeError
from pfsurgery.kernels import disabled, explain
from pfsurgery.ops.blur import Blur
from pfsurgery.ops.pool import AvgPool, MaxPool
from pfsurgery.ops.shift import Shift
from pfsurgery.ops.window import Window

FAST = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SAME = Window((3, 3), (1, 1), (1, 1))
ENOUGH = 4096  # numbers with which a kernel is worth its start


@st.composite
def windows(draw):
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.integers(1, 2))
    padding = tuple(draw(st.integers(0, (k - 1) * dilation // 2)) for k in kernel)
    window = Window(
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "same" if draw(st.integers(0, 5)) == 0 else padding,
        (dilation, dilation),
    )
    assume(window.why_empty() is None)
    return window


@st.composite
def images(draw, values="normal"):
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    channels = draw(st.integers(1, 20))
    batch = draw(st.integers(0, 3))
    if batch:
        batch = max(batch, -(-ENOUGH // (channels * height * width)))
    made = torch.randn(batch, channels, height, width)
    if values == "ties":
        made = made.round()
    if values == "extremes":
        made = torch.where(torch.rand_like(made) < 0.1, torch.nan, made)
        made = torch.where(torch.rand_like(made) < 0.1, -torch.inf, made)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "sliced", "expanded", "moved"]))
    if layout == "channels_last":
        return made.to(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.cat([made, made], 3)[..., ::2]
    if layout == "expanded" and batch:
        return made[:1].expand(batch, -1, -1, -1)
    if layout == "moved":
        return made.transpose(2, 3)
    return made


def op_of(name: str, window: Window, channels: int) -> nn.Module:
    return {
        "max": lambda: MaxPool(window),
        "mean": lambda: AvgPool(window),
        "blur": lambda: Blur(window),
        "shift": lambda: Shift(window, channels),
    }[name]()


def fits(name: str, window: Window, x: torch.Tensor) -> bool:
    axes = window.axes(x, "none")
    return axes is not None and not (name == "mean" and window.dilation != (1, 1))


class Compared(NamedTuple):
    """Outputs and gradients of the kernel, and those of the stock calls."""

    made: torch.Tensor
    expected: torch.Tensor
    gradient: torch.Tensor
    wanted: torch.Tensor


def compared(op: nn.Module, x: torch.Tensor) -> Compared:
    """The op on two copies of `x`; infinite outputs have no part in the gradients."""
    ours, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
    made = op(ours)
    with disabled():
        expected = op(theirs)
    weights = torch.randn_like(expected)
    for output in (made, expected):
        (output * weights)[output.isfinite()].sum().backward()
    return Compared(made, expected, ours.grad, theirs.grad)


@FAST
@given(windows(), images("extremes"))
def test_maxima_are_bit_equal_and_nan_spreads(window, x):
    assume(fits("max", window, x))
    op = MaxPool(window)
    with disabled():
        expected = op(x)
    for made in (op(x), op(x.clone().requires_grad_())):
        assert made.shape == expected.shape
        assert torch.equal(made.isnan(), expected.isnan())
        assert torch.equal(made.nan_to_num(), expected.nan_to_num())


@FAST
@given(windows(), images("ties"), st.sampled_from(["max", "mean", "blur", "shift"]))
def test_outputs_and_gradients_are_those_of_the_stock_calls(window, x, name):
    assume(fits(name, window, x))
    op = op_of(name, window, x.shape[1])
    made, expected, gradient, wanted = compared(op, x)
    torch.testing.assert_close(made, expected)
    assert made.is_contiguous() == expected.is_contiguous() or min(made.shape[1:]) == 1
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["max", "mean", "blur", "shift"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_usual_windows_are_those_of_the_stock_calls(name, layout, kernel, stride):
    window = Window((kernel, kernel), (stride, stride), ((kernel - 1) // 2,) * 2)
    op = op_of(name, window, 18)
    for size in (16, 7, 2):
        x = torch.randn(2, 18, size, size).to(memory_format=layout)
        assert fits(name, window, x)
        found = compared(op, x)
        torch.testing.assert_close(found.gradient, found.wanted)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [32, 64, 100, 449])
def test_a_shift_of_many_channels_is_that_of_the_stock_calls(kernel, stride, channels):
    op = op_of("shift", Window((kernel, kernel), (stride, stride), (1, 2)), channels)
    for size in (4, 9, 16):
        x = torch.randn(2, channels, size, size + 1).to(memory_format=torch.channels_last)
        with disabled():
            expected = op(x)
        assert torch.equal(op(x), expected)


NARROW = [torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(64, 14, 14), (70, 7, 9), (18, 33, 31), (257, 1, 9), (300, 9, 1)])
def test_numbers_of_two_bytes_are_computed_with_like_larger_ones(dtype, layout, size):
    pool, mean, blur, shift = (op_of(n, SAME, size[0]) for n in ("max", "mean", "blur", "shift"))
    ties = torch.randn(2, *size).round(decimals=1).to(dtype)
    odd = torch.where(torch.rand(ties.shape) < 0.05, torch.nan, ties)
    odd = torch.where(torch.rand(ties.shape) < 0.05, -torch.inf, odd)
    x, extremes = (t.to(memory_format=layout) for t in (ties, odd))
    assert explain(x).startswith("Numba") or "AVX-512" in explain(x)
    for op in (pool, shift):
        with disabled():
            expected = op(extremes)
        made = op(extremes)
        assert made.stride() == expected.stride()
        assert torch.equal(made.isnan(), expected.isnan())
        assert torch.equal(made.nan_to_num(), expected.nan_to_num())
    for op in (mean, blur):
        with disabled():
            expected = op(x.float()).to(dtype)
        torch.testing.assert_close(op(x), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)

    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    made, weights = pool(ours), torch.randn_like(x)
    with disabled():
        expected = pool(theirs)
    assert torch.equal(made.double(), expected)
    made.backward(weights)
    expected.backward(weights.double())
    wanted = theirs.grad.to(dtype)
    torch.testing.assert_close(ours.grad, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["max", "mean", "blur", "shift"])
@pytest.mark.parametrize("dtype", NARROW)
def test_windows_without_loops_for_two_bytes_take_the_stock_calls(name, dtype):
    for window in (Window((5, 5), (1, 1), (2, 2)), Window((3, 3), (2, 2), (1, 1))):
        found = compared(op_of(name, window, 18), torch.randn(2, 18, 16, 16).to(dtype))
        torch.testing.assert_close(found.made, found.expected)
        torch.testing.assert_close(found.gradient, found.wanted)


@pytest.mark.parametrize("name", ["mean", "blur"])
@pytest.mark.parametrize("dtype", NARROW)
def test_means_and_blurs_of_two_bytes_have_the_stock_gradients(name, dtype):
    found = compared(op_of(name, SAME, 18), torch.randn(2, 18, 16, 16).to(dtype))
    torch.testing.assert_close(found.gradient, found.wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kernel", "size"), [((2, 2), (2, 2)), ((4, 4), (2, 2)), ((4, 3), (2, 16))]
)
def test_a_strided_shift_of_as_many_rows_has_the_stock_gradient(layout, kernel, size):
    stride = tuple(2 if k % 2 == 0 else 1 for k in kernel)
    op = op_of("shift", Window(kernel, stride, tuple(k // 2 for k in kernel)), 64)
    found = compared(op, torch.randn(16, 64, *size).to(memory_format=layout))
    torch.testing.assert_close(found.made, found.expected)
    torch.testing.assert_close(found.gradient, found.wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_that_lie_in_the_padding_are_left_to_the_stock_calls(dtype):
    window = Window((3, 3), (2, 2), (3, 3))
    found = compared(MaxPool(window), torch.randn(4, 33, 28, 28).to(dtype))
    assert torch.equal(found.made, found.expected)
    assert torch.equal(found.gradient, found.wanted)


def test_a_shift_of_other_channels_than_it_was_made_for_is_refused():
    op = op_of("shift", Window((3, 3), (1, 1), (1, 1)), 18)
    for channels in (9, 20):
        with pytest.raises(ShapeError, match=f"18 channels was given {channels}"):
            op(torch.randn(2, channels, 32, 32))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_mean_is_within_a_few_ulps(layout, kernel):
    x = torch.randn(2, 16, 31, 29).to(memory_format=layout)
    op = AvgPool(Window((kernel, kernel), (1, 1), (kernel // 2, kernel // 2)))
    with disabled():
        exact = op(x.double())
    scale = nn.functional.max_pool2d(x.abs(), kernel, 1, kernel // 2)
    assert ((op(x) - exact).abs() <= 4 * torch.finfo(torch.float32).eps * scale).all()


@pytest.mark.parametrize("name", ["max", "mean", "blur", "shift"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_double_precision(name, stride, layout):
    window = Window((3, 3), (stride, stride), (1, 1))
    x = torch.randperm(2 * 9 * 17 * 16).double().reshape(2, 9, 17, 16) / 100
    x = x.to(memory_format=layout).requires_grad_()
    op = op_of(name, window, 9)
    assert explain(x).startswith("Numba")
    assert torch.autograd.gradcheck(op, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, x, fast_mode=True)


@FAST
@given(images("extremes"))
def test_the_usual_window_is_bit_equal_with_and_without_gradients(x):
    with disabled():
        expected = MaxPool(SAME)(x)
    for made in (MaxPool(SAME)(x), MaxPool(SAME)(x.clone().requires_grad_())):
        assert torch.equal(made.isnan(), expected.isnan())
        assert torch.equal(made.nan_to_num(), expected.nan_to_num())


@FAST
@given(images("ties"))
def test_gradients_of_the_usual_window_are_bit_equal_too(x):
    weights = torch.randn_like(x)
    gradients = []
    for stock in (False, True):
        leaf = x.detach().clone().requires_grad_()
        with disabled() if stock else nullcontext():
            made = MaxPool(SAME)(leaf)
        gradients.append(torch.autograd.grad(made, leaf, weights)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [16, 33])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 2), (7, 5), (8, 12)])
def test_gradients_go_to_the_taps_that_aten_picks(size, channels, dtype):
    """Of equal numbers the first, and the last NaN, also beside the padding of many channels."""
    rows, columns = size
    x = torch.randn(-(-ENOUGH // (channels * rows * columns)), channels, rows, columns).round()
    x[torch.rand_like(x) < 0.1] = -torch.inf
    x[: len(x) // 2][torch.rand_like(x[: len(x) // 2]) < 0.1] = torch.nan
    x = x.to(dtype, memory_format=torch.channels_last)
    weights = torch.randint(-8, 9, x.shape).to(dtype)  # whose sums are exact
    found = []
    for stock in (False, True):
        leaf = x.clone().requires_grad_()
        with disabled() if stock else nullcontext():
            made = MaxPool(SAME)(leaf)
        found.append(torch.autograd.grad(made, leaf, weights)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("tracked", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_signed_zeros_are_those_of_the_first_tap(layout, tracked):
    x = torch.where(torch.rand(8, 16, 9, 9) < 0.5, 0.0, -0.0).to(memory_format=layout)
    with disabled():
        expected = MaxPool(SAME)(x)
    made = MaxPool(SAME)(x.requires_grad_(tracked))
    assert torch.equal(made.signbit(), expected.signbit())


def test_training_keeps_one_byte_for_each_output():
    x = torch.randn(4, 16, 14, 14, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = MaxPool(SAME)(x)
    assert [t.numel() * t.element_size() for t in kept] == [made.numel()]


def test_explain_says_what_runs():
    x = torch.randn(4, 16, 14, 14)
    assert explain(x).startswith("Numba kernel: NCHW, float32 on cpu")
    assert "channels_last" in explain(x.to(memory_format=torch.channels_last))
    assert "float16" in explain(x.half())
    assert "no CPU kernel computes in int32" in explain(x.int())
    assert "less than" in explain(x[:, :, :2, :2])
    assert "dimensions" in explain(x[0])
    assert "meta" in explain(x.to("meta"))
    with disabled():
        assert "disabled" in explain(x)
    with forward_ad.dual_level():
        assert "forward-mode" in explain(x)
    seen = []
    vmap(lambda t: seen.append(explain(t)) or t)(x)
    assert "BatchedTensor" in seen[0] or "functorch" in seen[0]


def test_transforms_take_the_stock_calls():
    x = torch.randn(4, 16, 14, 14)
    op = MaxPool(SAME)
    batched = vmap(lambda t: op(t[None])[0])(x)
    assert torch.equal(batched, op(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(op(dual)).tangent is not None


@pytest.mark.parametrize("name", ["max", "mean", "blur", "shift"])
def test_graphs_hold_standard_operators_only(name):
    x = torch.randn(4, 16, 14, 14)
    op = op_of(name, SAME, 16).eval()
    for strict in (True, False):
        program = torch.export.export(op, (x,), strict=strict)
        calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert calls
        assert all(str(call).startswith("aten.") or call is operator.getitem for call in calls)
        torch.testing.assert_close(program.module()(x), op(x))
    traced = torch.jit.trace(op, x)
    assert "Python" not in str(traced.graph)
    torch.testing.assert_close(traced(x), op(x))
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), op(x))


@pytest.mark.parametrize("name", ["max", "mean", "blur", "shift"])
def test_contexts_change_nothing(name):
    x = torch.randn(4, 16, 14, 14)
    op = op_of(name, SAME, 16)
    with disabled():
        expected = op(x)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            torch.testing.assert_close(op(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = op(x)
        with disabled():
            expected_cast = op(x)
    assert made.dtype == expected_cast.dtype
    torch.testing.assert_close(made, expected_cast)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(op(x), expected)
        ours = x.clone().requires_grad_()
        first, second = (torch.autograd.grad(op(ours).square().sum(), ours)[0] for _ in range(2))
        assert torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


def test_several_threads_at_once():
    op = MaxPool(SAME)
    inputs = [torch.randn(4, 32, 14 + i % 3, 14) for i in range(24)]
    with disabled():
        expected = [op(x) for x in inputs]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda x: [op(x) for _ in range(20)][-1], inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def _worker(queue, trains):
    torch.manual_seed(0)
    x = torch.randn(4, 16, 14, 14, requires_grad=trains)
    made = MaxPool(SAME)(x)
    gradient = float(torch.autograd.grad(made.sum(), x)[0].abs().sum()) if trains else None
    queue.put((explain(x), float(made.detach().sum()), gradient))


# Autograd itself refuses to run in a fork of a process whose autograd threads have started.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("method", "trains"), [("fork", False), ("spawn", True)])
def test_worker_processes(method, trains):
    torch.set_num_threads(2)
    try:
        MaxPool(SAME)(torch.randn(4, 16, 14, 14))  # the parent's threads run before the fork
    finally:
        torch.set_num_threads(1)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_worker, args=(queue, trains))
    process.start()
    said, total, gradient = queue.get(timeout=120)
    process.join()
    assert said.startswith("Numba")
    torch.manual_seed(0)
    with disabled():
        assert total == pytest.approx(float(MaxPool(SAME)(torch.randn(4, 16, 14, 14)).sum()))
    assert gradient == (4 * 16 * 14 * 14 if trains else None)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


POOL = """\
    import torch
    from pfsurgery.kernels import explain
    from pfsurgery.ops.pool import MaxPool
    from pfsurgery.ops.window import Window
    x = torch.randn(4, 16, 14, 14)
    y = MaxPool(Window((3, 3), (1, 1), (1, 1)))(x)
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 3, 1, 1))
    print(explain(x))
"""


def test_the_environment_switches_the_kernels_off():
    assert "PFSURGERY_KERNELS=0" in run(POOL, PFSURGERY_KERNELS="0")


def test_without_numba_the_stock_calls_run():
    assert "numba is not installed" in run("    import sys; sys.modules['numba'] = None\n" + POOL)


def test_importing_the_package_imports_no_compiler():
    loaded = run(
        "import sys, pfsurgery; print([m for m in ('numba', 'triton') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_later_processes_start_from_the_cache(tmp_path):
    code = (
        POOL + "    import numba; print(len(list(__import__('pathlib').Path({!r}).rglob('*.nbc'))))"
    )
    first = run(code.format(str(tmp_path)), NUMBA_CACHE_DIR=str(tmp_path))
    second = run(code.format(str(tmp_path)), NUMBA_CACHE_DIR=str(tmp_path))
    assert first == second
    assert not first.endswith("\n0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["max", "mean", "blur", "shift"])
def test_gpu_kernels_are_the_stock_calls(name, layout, dtype):
    for stride in (1, 2):
        op = op_of(name, Window((3, 3), (stride, stride), (1, 1)), 32).cuda()
        ours = torch.randn(4, 32, 29, 28, device="cuda", dtype=dtype).to(memory_format=layout)
        theirs = ours.clone().requires_grad_()
        ours.requires_grad_()
        made = op(ours)
        with disabled():
            expected = op(theirs)
        torch.testing.assert_close(made, expected)
        made.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
