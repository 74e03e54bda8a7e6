import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfsurgery.recover.columns import (
    Window,
    centre_of,
    column_rows,
    kernel_columns,
    operations,
)
from pfsurgery.recover.fit import Fit, effective_kernel, refit_expansion
from pfsurgery.recover.fit_bottleneck import fit_bottleneck, fit_mixed, fit_thin, narrowed
from pfsurgery.recover.fit_columns import (
    column_curve,
    fit_bare,
    fit_columns,
    select_columns,
    waist_curve,
)
from pfsurgery.recover.gram import Moments, MomentSum
from pfsurgery.recover.linalg import cholesky, principal, ridge_gcv
from pfsurgery.recover.options import PARAMETER_FREE, fit_option, site_moments, site_options
from pfsurgery.recover.problem import Problem, prepare
from tests.columns import apply_fit

WINDOW = Window((3, 3), padding=(1, 1, 1, 1))
OPS = operations(WINDOW)
TAPS = 9


def moments_of(x: Tensor, y: Tensor) -> Moments:
    sums = MomentSum(len(OPS) * x.shape[1], y.shape[1])
    sums.add(column_rows(x, WINDOW, OPS), y.permute(0, 2, 3, 1).flatten(0, 2))
    return sums.result()


def measured(fit: Fit, x: Tensor, y: Tensor, weights: Tensor) -> float:
    found = apply_fit(fit, x.double(), WINDOW, OPS)
    scale = weights.view(1, -1, 1, 1)
    left = ((found - y) * scale).square().sum()
    return float(left / ((y - y.mean((0, 2, 3), keepdim=True)) * scale).square().sum())


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(24, 12, 9, 9, generator=generator)
    mix = torch.randn(12, 12, 3, 3, generator=generator) / 10
    return F.conv2d(noise, mix, padding=1).relu()


@pytest.fixture(scope="module")
def dense(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(10, 12, 3, 3, generator=generator), torch.randn(10)
    return F.conv2d(images, weight, bias, padding=1)


@pytest.fixture(scope="module")
def weights() -> Tensor:
    return torch.linspace(0.5, 2, 10, dtype=torch.float64)


@pytest.fixture(scope="module")
def moments(images: Tensor, dense: Tensor) -> Moments:
    return moments_of(images, dense)


@pytest.fixture(scope="module")
def problem(moments: Moments, weights: Tensor) -> Problem:
    return prepare(moments.columns(torch.arange(TAPS * 12)), weights, TAPS)


def test_selection_curve_is_the_error_of_the_fit(
    images: Tensor, dense: Tensor, moments: Moments, weights: Tensor
) -> None:
    chosen, curve = column_curve(moments, weights, 40)
    assert bool((curve.diff() <= 1e-12).all())
    for count in (1, 7, 40):
        fit = fit_columns(moments, weights, len(OPS), chosen, count, None)
        assert fit.error == pytest.approx(float(curve[count]), abs=1e-4)
        assert fit.error == pytest.approx(measured(fit, images, dense, weights), abs=1e-5)
        assert fit.macs == count * 10


def test_curves_of_wide_sites_end_with_what_few_images_show() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 192, 4, 4, generator=generator).relu()
    kernel = torch.randn(8, 192, 3, 3, generator=generator)
    moments = moments_of(x[:, :, :2, :2], F.conv2d(x[:, :, :2, :2], kernel, padding=1))
    every = torch.ones(8, dtype=torch.float64)
    assert moments.count < len(moments.gram)  # so most columns depend on others
    _, errors = column_curve(moments, every, 500)
    assert errors[-1] == pytest.approx(0, abs=2e-3)
    assert (errors.diff() <= 1e-5).all()
    counts = [100, 200, 359, 500]
    _, through = waist_curve(moments, every, 6, counts)
    assert sorted(through, reverse=True) == through
    assert through[-1] >= 0


def test_selection_of_nothing_to_explain() -> None:
    chosen = select_columns(torch.eye(50, dtype=torch.float64), torch.zeros(50, 3).double(), 5)
    assert chosen.removed.tolist() == [0.0] * 5


@pytest.mark.parametrize("width", [4, 8])
def test_narrowed_bottlenecks_promise_what_they_keep(problem: Problem, width: int) -> None:
    small = narrowed(problem, width)
    assert (small.channels, small.total) == (width, pytest.approx(problem.total))
    assert narrowed(problem, problem.channels) is problem
    thin = fit_thin(problem, 4, 6).error
    assert thin - 1e-3 < fit_thin(small, 4, 6).error < 1.3 * thin
    assert fit_bottleneck(problem, 9).error - 1e-3 < fit_bottleneck(small, 9).error < 1


def test_waist_curve_is_the_error_of_the_fit(
    images: Tensor, dense: Tensor, moments: Moments, weights: Tensor
) -> None:
    chosen, errors = waist_curve(moments, weights, 4, [10, 30])
    for count, error in zip((10, 30), errors, strict=True):
        fit = fit_columns(moments, weights, len(OPS), chosen, count, 4)
        assert fit.error == pytest.approx(error, abs=1e-5)
        assert fit.error == pytest.approx(measured(fit, images, dense, weights), abs=1e-5)
        assert fit.macs == 4 * (count + 10)


def test_selection_equals_exhaustive_greedy_search(moments: Moments, weights: Tensor) -> None:
    goal = moments.cross * weights
    chosen: list[int] = []
    for step in select_columns(moments.gram, goal, 4).order.tolist():
        gains = []
        for j in range(len(goal)):
            index = torch.tensor([*chosen, j])
            part = moments.gram[index][:, index]
            if j in chosen or float(torch.linalg.cond(part)) > 1e12:
                gains.append(-1.0)
            else:
                gains.append(float((goal[index] * torch.linalg.solve(part, goal[index])).sum()))
        assert gains[step] == pytest.approx(max(gains), rel=1e-6)
        chosen.append(step)


def test_bottlenecks_report_the_error_that_the_data_show(
    images: Tensor, dense: Tensor, weights: Tensor, problem: Problem
) -> None:
    fits = [
        fit_bottleneck(problem, 14),
        fit_thin(problem, 5, 4),
        fit_thin(problem, 12, 6),
        fit_mixed(problem, 6, 27, 5),
    ]
    for fit in fits:
        assert 0 < fit.error < 1
        assert fit.error == pytest.approx(measured(fit, images, dense, weights), abs=1e-5)
    assert fits[0].macs == 14 * (12 + 10)
    assert fits[1].macs == 5 * 12 + 9 * 5 * 4 + 4 * 10
    assert fits[3].macs == 6 * 12 + 27 * 5 + 5 * 10
    assert bool((fits[0].ops.diff() >= 0).all()), "channels are sorted by operation"


def test_alternating_rounds_never_add_error(problem: Problem) -> None:
    for solve in (
        lambda rounds: fit_bottleneck(problem, 14, rounds=rounds),
        lambda rounds: fit_thin(problem, 5, 4, rounds=rounds),
    ):
        errors = [solve(rounds).error for rounds in (0, 1, 3, 8)]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
        assert errors[-1] < errors[0]


def test_wide_bottlenecks_are_exact(problem: Problem) -> None:
    assert fit_thin(problem, 12, 10).error < 1e-6
    assert fit_bottleneck(problem, 90).error < 1e-5


@pytest.mark.parametrize("kind", ["shift", "average", "sparse", "identity"])
def test_exact_structure_is_found(images: Tensor, kind: str) -> None:
    if kind == "average":
        y = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    else:
        weight = torch.zeros(12, 12, 3, 3)
        for c in range(12):
            weight[c, c, 1, 1 if kind == "identity" else 2] = 1.5
            if kind == "sparse":
                weight[c, (c + 3) % 12, 0, 1] = -0.7
        y = F.conv2d(images, weight, torch.ones(12), padding=1)
    moments = moments_of(images, y)
    most = 24 if kind == "sparse" else 12
    chosen, _ = column_curve(moments, torch.ones(12, dtype=torch.float64), most)
    fit = fit_columns(moments, torch.ones(12).double(), len(OPS), chosen, most, None)
    found = apply_fit(fit, images, WINDOW, OPS)
    torch.testing.assert_close(found, y, atol=1e-5, rtol=1e-5)


def test_bare_finds_the_operation_of_every_channel(images: Tensor) -> None:
    wanted = torch.arange(12) % len(OPS)
    columns = column_rows(images, WINDOW, OPS).view(-1, len(OPS), 12)
    middle = columns[:, wanted, torch.arange(12)]
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(3))
    y = (middle @ weight.T).view(24, 9, 9, 16).permute(0, 3, 1, 2)
    fit = fit_bare(moments_of(images, y), torch.ones(16).double(), len(OPS), centre_of(OPS))
    assert fit.ops.tolist() == wanted.tolist()
    torch.testing.assert_close(apply_fit(fit, images, WINDOW, OPS), y, atol=1e-4, rtol=1e-4)


def test_same_moments_give_the_same_fit(problem: Problem) -> None:
    for solve in (fit_bottleneck, lambda p, r: fit_mixed(p, r, 20, 5)):
        first, second = solve(problem, 7), solve(problem, 7)
        assert torch.equal(first.expand, second.expand)
        assert first.error == second.error


def all_fits(moments: Moments, weights: Tensor) -> list[Fit]:
    linear = moments.columns(torch.arange(TAPS * 12))
    problem = prepare(linear, weights, TAPS)
    chosen, _ = column_curve(moments, weights, 10)
    through, _ = waist_curve(moments, weights, 3, [10])
    return [
        fit_columns(moments, weights, len(OPS), chosen, 10, None),
        fit_columns(moments, weights, len(OPS), through, 10, 3),
        fit_bottleneck(problem, 8),
        fit_thin(problem, 4, 3),
        fit_mixed(problem, 4, 12, 3),
        fit_bare(moments, weights, len(OPS), centre_of(OPS)),
    ]


@pytest.mark.parametrize("case", ["one image", "constant", "dead input", "twins", "dead output"])
def test_degenerate_data_give_finite_fits(images: Tensor, weights: Tensor, case: str) -> None:
    x = images.clone()
    if case == "one image":
        x = x[:1]
    elif case == "constant":
        x = torch.full_like(x, 0.7)
    elif case == "dead input":
        x[:, 3:7] = 0
    elif case == "twins":
        x[:, 6:] = x[:, :6]
    weight = torch.randn(10, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    y = F.conv2d(x, weight, padding=1)
    importance = weights.clone()
    if case == "dead output":
        importance[2:5] = 0
    for fit in all_fits(moments_of(x, y), importance):
        assert torch.isfinite(effective_kernel(fit, len(OPS), 12)).all()
        assert torch.isfinite(fit.bias).all()
        assert -1e-6 <= fit.error <= 1 + 1e-6
        assert fit.error == pytest.approx(measured(fit, x, y, importance), abs=1e-4)
        if case == "dead output":
            assert fit.expand[2:5].eq(0).all()


def test_refit_takes_new_targets(images: Tensor, moments: Moments, weights: Tensor) -> None:
    fit = all_fits(moments, weights)[3]
    shifted = F.conv2d(images, torch.ones(10, 12, 3, 3), padding=1)
    fresh = moments_of(images, shifted).columns(torch.arange(TAPS * 12))
    solved = refit_expansion(fit, fresh, TAPS, weights)
    assert solved.error < measured(fit, images, shifted, weights)
    assert torch.equal(solved.ops, fit.ops)


def test_ridge_shrinks_noise_and_keeps_signal() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 50, dtype=torch.float64)
    truth = torch.zeros(50, 3, dtype=torch.float64)
    truth[:4] = torch.randn(4, 3, dtype=torch.float64)
    y = x @ truth + torch.randn(60, 3, dtype=torch.float64)
    total = float(y.square().mean(0).sum())
    found = ridge_gcv(x.T @ x / 60, x.T @ y / 60, total, 60)
    plain = torch.linalg.lstsq(x, y).solution
    assert float((found - truth).norm()) < 0.5 * float((plain - truth).norm())
    y = x @ truth
    clean = ridge_gcv(x.T @ x / 60, x.T @ y / 60, float(y.square().mean(0).sum()), 60)
    torch.testing.assert_close(clean, truth, atol=1e-4, rtol=1e-4)
    assert ridge_gcv(torch.zeros(2, 2).double(), torch.zeros(2, 1).double(), 0.0, 5).eq(0).all()


def test_principal_directions_are_reduced_rank_regression() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8, dtype=torch.float64)
    y = x @ torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    values, directions = principal(x.T @ y / 400, cholesky(x.T @ x / 400))
    assert float(values[2:].sum()) < 1e-6 * float(values[0])
    kept = directions[:, :2]
    torch.testing.assert_close(y @ kept @ kept.T, y, atol=1e-6, rtol=1e-6)


def test_options_are_met_by_their_fits(
    images: Tensor, dense: Tensor, moments: Moments, weights: Tensor
) -> None:
    site = site_moments(moments, weights, OPS)
    full = 9.0 * 12 * 10
    options = site_options(site, full, [*PARAMETER_FREE, "thin", "low_rank"])
    assert {option.form for option in options} == {*PARAMETER_FREE, "thin", "low_rank"}
    for option in options[::5]:
        fit = fit_option(site, option)
        assert option.macs < full
        assert fit.macs == option.macs
        assert fit.error <= option.error + 1e-3
        assert fit.error == pytest.approx(measured(fit, images, dense, weights), abs=1e-4)


def test_a_pointwise_site_chooses_channels(images: Tensor, weights: Tensor) -> None:
    window = Window((1, 1))
    ops = operations(window)
    y = F.conv2d(images, torch.randn(10, 12, 1, 1, generator=torch.Generator().manual_seed(0)))
    sums = MomentSum(12, 10)
    sums.add(column_rows(images, window, ops), y.permute(0, 2, 3, 1).flatten(0, 2))
    site = site_moments(sums.result(), weights, ops)
    options = site_options(site, 120.0, ["columns", "waist"])
    assert options
    for option in options:
        assert fit_option(site, option).error == pytest.approx(option.error, abs=1e-4)


def test_a_prior_towards_the_kernel_helps_on_other_images(images: Tensor, weights: Tensor) -> None:
    weight = torch.randn(10, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    noise = 2 * torch.randn(24, 10, 9, 9, generator=torch.Generator().manual_seed(2))
    y = F.conv2d(images, weight, padding=1)
    taps = torch.arange(TAPS * 12)
    few = moments_of(images[:2], (y + noise)[:2]).columns(taps)
    errors = []
    for share in (0.0, 0.05):
        prior = few.with_prior(kernel_columns(weight, OPS[:TAPS]), share)
        errors.append(
            measured(fit_thin(prepare(prior, weights, TAPS), 6, 5), images[2:], y[2:], weights)
        )
    assert errors[1] < errors[0]
