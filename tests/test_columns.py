import pytest
import torch
import torch.nn.functional as F

from pfsurgery.errors import DataError
from pfsurgery.recover.channels import ChannelSums
from pfsurgery.recover.columns import (
    Operation,
    Window,
    centre_of,
    column_rows,
    kernel_columns,
    operations,
)
from pfsurgery.recover.gram import MomentSum, sample_positions
from tests.columns import column_planes

WINDOWS = [
    Window((3, 3), padding=(1, 1, 1, 1)),
    Window((3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    Window((3, 3), stride=(2, 1), padding=(0, 1, 0, 1)),
    Window((3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Window((1, 3), padding=(0, 0, 1, 1)),
    Window((2, 2), stride=(2, 2)),
    Window((5, 5), padding=(2, 2, 2, 2)),
    Window((7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_taps_add_up_to_the_convolution(window: Window) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 11, 10)
    weight = torch.randn(5, 4, *window.kernel_size)
    ops = operations(window, reach=max(window.kernel_size) // 2)
    top, bottom, left, right = window.padding
    padded = F.pad(x, (left, right, top, bottom))
    wanted = F.conv2d(padded, weight, stride=window.stride, dilation=window.dilation)
    planes = column_planes(x, window, ops)
    found = torch.einsum("nkhw,ko->nohw", planes, kernel_columns(weight, ops))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_pools_are_those_of_torch() -> None:
    x = torch.randn(2, 3, 9, 8)
    window = Window((3, 3), stride=(2, 2), padding=(1, 1, 1, 1))
    ops = operations(window)
    assert [op.kind for op in ops] == ["tap"] * 9 + ["average", "maximum"]
    planes = column_planes(x, window, ops)
    average = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(planes[:, 27:30], average)
    assert torch.equal(planes[:, 30:], F.max_pool2d(x, 3, 2, 1))
    assert torch.equal(planes[:, 12:15], x[:, :, ::2, ::2])  # the centre tap


def test_larger_kernels_offer_larger_averages() -> None:
    window = Window((5, 5), padding=(2, 2, 2, 2))
    assert len(operations(window)) == 11
    wide = operations(window, reach=2)
    assert len(wide) == 25 + 2 + 1
    assert Operation("average", 0, 0, 5, 5) in wide
    x = torch.randn(1, 2, 8, 8)
    found = column_planes(x, window, [Operation("average", 0, 0, 5, 5)])
    torch.testing.assert_close(found, F.avg_pool2d(x, 5, 1, 2, count_include_pad=False))


def test_a_window_in_the_padding_gives_zero() -> None:
    window = Window((3, 3), padding=(3, 3, 3, 3))
    planes = column_planes(torch.ones(1, 1, 4, 4), window, operations(window))
    assert torch.isfinite(planes).all()
    assert planes[0, :, 0, 0].eq(0).all()


def test_chosen_positions_are_rows_of_all() -> None:
    x = torch.randn(3, 4, 7, 6)
    window = Window((3, 3), stride=(2, 1), padding=(1, 1, 1, 1))
    ops = operations(window)
    every = column_rows(x, window, ops)
    some = sample_positions(len(every), 20, torch.Generator().manual_seed(0))
    assert some is not None
    assert len(some) == len(some.unique()) == 20
    torch.testing.assert_close(column_rows(x, window, ops, some), every[some])
    assert sample_positions(20, 20, torch.Generator()) is None


def test_an_input_smaller_than_the_window_is_an_error() -> None:
    with pytest.raises(DataError, match="smaller than the window"):
        column_rows(torch.zeros(1, 1, 2, 2), Window((3, 3)), operations(Window((3, 3))))


def test_moments_are_covariances() -> None:
    torch.manual_seed(0)
    x = torch.randn(10_000, 30) @ torch.randn(30, 30) + 100
    y = x @ torch.randn(30, 5) + torch.randn(10_000, 5)
    moments = MomentSum(30, 5)
    for a, b in zip(x.split(999), y.split(999), strict=True):
        moments.add(a, b)
    found = moments.result()
    wanted = torch.cov(torch.cat([x, y], 1).double().T, correction=0)
    for part, whole in (
        (found.gram, wanted[:30, :30]),
        (found.cross, wanted[:30, 30:]),
        (found.target, wanted[30:, 30:]),
    ):
        assert float((part - whole).abs().max() / whole.abs().max()) < 1e-5
    torch.testing.assert_close(found.column_mean, x.double().mean(0))
    assert torch.equal(found.gram, found.gram.T)


def test_linear_targets_need_no_data() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(500, 20), torch.randn(20, 4), torch.randn(4)
    sums = MomentSum(20, 4)
    sums.add(x, x @ weight + bias)
    found, wanted = sums.result().with_linear_target(weight, bias), sums.result()
    torch.testing.assert_close(found.cross, wanted.cross, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.target, wanted.target, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.target_mean, wanted.target_mean, atol=1e-6, rtol=1e-5)


def test_the_input_of_a_wide_window_is_padded_once(monkeypatch) -> None:
    torch.manual_seed(0)
    window = Window((7, 7), padding=(3, 3, 3, 3))
    ops = [op for op in operations(window, reach=3) if op.linear]
    x, chosen = torch.randn(4, 52, 9, 9), torch.randperm(4 * 81)[:200]
    wanted = torch.stack([column_rows(x[:, [c]], window, [op])[:, 0] for c, op in enumerate(ops)])
    y = 2 * wanted.view(52, 4, 9, 9).transpose(0, 1) - 1
    pad, calls = F.pad, []
    monkeypatch.setattr(F, "pad", lambda *args, **more: calls.append(1) or pad(*args, **more))
    sums = ChannelSums(len(ops), 52)
    sums.add(x, y, window, ops, chosen)
    assert len(calls) == 1
    fit = sums.fit(torch.ones(52, dtype=torch.float64))
    assert fit.ops.tolist() == list(range(52))
    torch.testing.assert_close(fit.scale, torch.full((52,), 2.0).double())
    torch.testing.assert_close(fit.offset, torch.full((52,), -1.0).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(bad: float) -> None:
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    broken = x.clone()
    broken[7, 1] = bad
    with pytest.raises(DataError, match="columns of batch positions 0 to 50"):
        MomentSum(3, 2).add(broken, y)
    with pytest.raises(DataError, match="targets"):
        MomentSum(2, 3).add(y, broken)


def test_no_positions_and_wrong_shapes_are_errors() -> None:
    with pytest.raises(DataError, match="at least one image"):
        MomentSum(3).result()
    with pytest.raises(DataError, match="do not fit"):
        MomentSum(3, 1).add(torch.zeros(5, 3), torch.zeros(4, 1))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_centre_is_the_channel_itself(window: Window) -> None:
    ops = operations(window, reach=max(window.kernel_size) // 2)
    centre = ops[centre_of(ops)]
    assert centre == Operation("tap", *((size - 1) // 2 for size in window.kernel_size))
