"""The GPU kernels on the CPU, by Triton's interpreter; run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

CHECKS = """
import itertools
import torch
from torch.nn import functional as F
from pfsurgery.kernels import cuda, disabled
from pfsurgery.ops.blur import Blur
from pfsurgery.ops.pool import AvgPool, MaxPool
from pfsurgery.ops.shift import Shift, _groups
from pfsurgery.ops.window import Window

torch.manual_seed(0)
torch.set_num_threads(1)
for window, layout, dtype in itertools.product(
    (
        Window((3, 3), (1, 1), (1, 1)),
        Window((3, 3), (2, 2), (1, 1)),
        Window((5, 3), (2, 1), "same"),
        Window((3, 2), (1, 3), (2, 0), (2, 1)),
    ),
    (torch.contiguous_format, torch.channels_last),
    (torch.float32, torch.float16, torch.float64),
):
    x = torch.randn(2, 11, 7, 9).round(decimals=1).to(dtype).to(memory_format=layout)
    grad = x.clone().requires_grad_()
    with disabled():
        expected = MaxPool(window)(grad)
    weights = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, grad, weights)
    axes = window.axes(x, "none")
    assert torch.equal(cuda.max_pool(x, *axes), expected)
    made, names = cuda.max_pool_with_names(x, *axes)
    assert torch.equal(made, expected) and names.dtype == torch.uint8
    # In half precision the kernels round once, the stock calls after each addition.
    close = {"rtol": 4e-3, "atol": 4e-3} if dtype == torch.float16 else {}
    back = cuda.max_pool_gradient(weights, names, *axes)
    torch.testing.assert_close(back, wanted, **close)
    x[0, 0, 0, 0] = torch.nan
    with disabled():
        expected = MaxPool(window)(x)
    assert torch.equal(cuda.max_pool(x, *axes).isnan(), expected.isnan())
    x[0, 0, 0, 0] = 1
    ops = [(Blur(window), "binomial")]
    if window.dilation == (1, 1):
        ops.append((AvgPool(window), "mean"))
    for op, weighing in ops:
        with disabled():
            expected = op(grad)
            (wanted,) = torch.autograd.grad(expected, grad, weights)
        down, across = window.axes(x, weighing)
        made = cuda.weighted_sum(grad.detach(), down, across)
        torch.testing.assert_close(made, expected, **close)
        back = cuda.weighted_sum(weights, down.transposed, across.transposed)
        torch.testing.assert_close(back, wanted, **close)
    op = Shift(window, 11)
    with disabled():
        expected = op(grad)
        (wanted,) = torch.autograd.grad(expected, grad, weights)
    groups = _groups(axes, op.taps)
    assert torch.equal(cuda.shift(grad.detach(), groups), expected)
    back = tuple((end, down.transposed, across.transposed) for end, down, across in groups)
    assert torch.equal(cuda.shift(weights, back), wanted)
    assert cuda.max_pool(x[:0], *axes).shape == expected[:0].shape
print("ok")
"""


BOTTLENECKS = """
import itertools
import torch
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure

torch.manual_seed(0)
torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False

def taps(*places):
    return tuple(Run("tap", top, left, 1, 1, channels) for top, left, channels in places)

columns = (
    Run("average", 0, 0, 3, 3, (2, 5)),
    *taps((0, 1, (0, 3, 4, 9)), (2, 2, tuple(range(11)))),
    Run("maximum", 0, 0, 3, 3, (1,)),
)
structures = (
    Structure("columns", None, columns, None, 0.0),
    Structure("waist", None, columns, 5, 0.0),
    Structure("mixed", 6, taps((0, 0, (0, 1, 5)), (1, 1, (2, 3))), 20, 0.0),
    Structure("bottleneck", 6, taps((0, 0, (0, 1, 2)), (1, 1, (3, 4, 5))), None, 0.0),
)
layouts = (torch.contiguous_format, torch.channels_last)
for structure, stride, layout, dtype, relu in itertools.product(
    structures, ((1, 1), (2, 1)), layouts, (torch.float32, torch.float16), (False, True)
):
    bottleneck = Bottleneck(Geometry(11, 70, (3, 3), stride, (1, 1)), structure).to(dtype)
    bottleneck.relu = relu
    x = torch.randn(2, 11, 7, 9).to(dtype).to(memory_format=layout)
    # In half precision the kernel rounds once between the products, the stock calls more often.
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        made, wanted = bottleneck.in_gpu_kernel(x), bottleneck(x)
        torch.testing.assert_close(made, wanted, **close)
        assert made.stride() == wanted.stride()
        assert bottleneck.in_gpu_kernel(x[:0]).shape == wanted[:0].shape
print("ok")
"""


@pytest.mark.parametrize("checks", [CHECKS, BOTTLENECKS], ids=["operations", "bottlenecks"])
def test_the_gpu_kernels_are_the_stock_calls_in_the_interpreter(checks):
    done = subprocess.run(
        [sys.executable, "-c", checks],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"
