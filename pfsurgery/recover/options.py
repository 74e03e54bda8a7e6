"""What a site may become: its forms and widths, with cost and error, and the fit of one of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pfsurgery.recover.columns import Operation
from pfsurgery.recover.fit import Fit, Form, cost
from pfsurgery.recover.fit_bottleneck import (
    ROUNDS,
    fit_bottleneck,
    fit_low_rank,
    fit_mixed,
    fit_thin,
    narrowed,
    thin_errors,
)
from pfsurgery.recover.fit_columns import (
    column_curve,
    fit_columns,
    waist_curve,
)
from pfsurgery.recover.gram import Moments
from pfsurgery.recover.hull import lower_hull, spread
from pfsurgery.recover.problem import Problem, prepare

PARAMETER_FREE: tuple[Form, ...] = ("columns", "waist", "bottleneck", "mixed")
_ROUNDS = 2  # of alternation for a curve; the fit that is used gets more
_CHEAP = 0.3  # of the dense cost: thin options above it, nearly exact, are not alternated
_MOST = 12  # thin options that are fitted for the curve, spread along their hull
_DIRECTIONS = 256  # of the channels that a curve's bottlenecks see: wider ones take half a minute
_COLUMNS_A_WAIST = 8  # looked at for each channel of the waist of a wide site
_WIDE = 2048  # more columns than this get curves of half as many points: each takes seconds


@dataclass(frozen=True, slots=True)
class Option:
    """One form that a site may take.

    Attributes:
        form: Which form.
        sizes: Its widths: (B,) columns, (r, B) waist, (r,) bottleneck and low rank, (r1, r2) thin,
            (r1, B, r2) mixed, (C,) bare, () for an op.
        macs: Multiply-adds an output position.
        error: Relative error on the moments it was chosen with.
        op: Name of the op, where the form is "op": one that is not fitted, such as max_pool.
    """

    form: Form | Literal["op"]
    sizes: tuple[int, ...]
    macs: float
    error: float
    op: str = ""

    def __str__(self) -> str:
        """For example `thin 12>20` or `max_pool`."""
        return self.op or f"{self.form} {'>'.join(map(str, self.sizes))}"


@dataclass(frozen=True, slots=True)
class SiteMoments:
    """A site's moments with what is needed to fit any form.

    Attributes:
        moments: Of all operations' columns.
        weights: Importance of each output, (C_out,).
        ops: The operations.
        problem: The linear operations' columns, prepared for bottlenecks.
    """

    moments: Moments
    weights: torch.Tensor
    ops: tuple[Operation, ...]
    problem: Problem


def site_moments(
    moments: Moments, weights: torch.Tensor, ops: Sequence[Operation], *, reuse: float = 1.0
) -> SiteMoments:
    """Prepares a site; reduced forms see the taps only, which come first among `ops`.

    Args:
        moments: Of the columns of `ops`.
        weights: (C_out,).
        ops: The operations, taps first.
        reuse: Input positions for each output position (the stride's area).
    """
    channels = len(moments.gram) // len(ops)
    taps = sum(op.kind == "tap" for op in ops)
    linear = moments.columns(torch.arange(taps * channels)) if taps < len(ops) else moments
    return SiteMoments(moments, weights, tuple(ops), prepare(linear, weights, taps, reuse=reuse))


def _widths(low: int, high: int, count: int) -> list[int]:
    """About `count` whole numbers from `low` to `high` in equal ratios, without repeats."""
    if high < low or low < 1:
        return []
    ratio = (high / low) ** (1 / max(1, count - 1))
    return sorted({round(low * ratio**i) for i in range(count)})


def _is_wide(problem: Problem) -> bool:
    return problem.ops * problem.channels > _WIDE


def _points(problem: Problem, usual: int) -> int:
    return (usual + 1) // 2 if _is_wide(problem) else usual


def _thin(problem: Problem, rough: Problem, dense: float) -> list[Option]:
    c, m = problem.channels, problem.targets
    most = _points(problem, _MOST)
    sizes = [
        (r1, r2)
        for r1 in _widths(max(2, c // 24), max(2, min(4 * c // 5, rough.channels)), 12)
        for r2 in _widths(max(2, r1 // 2), min(m, 5 * r1 // 2), 12)
        if cost(c, m, problem.ops * r1, r1, r2, problem.reuse) < dense
    ]
    if not sizes:
        return []
    costs = [cost(c, m, problem.ops * r1, r1, r2, problem.reuse) for r1, r2 in sizes]
    errors = thin_errors(rough, sizes)
    hull = spread(lower_hull(list(zip(costs, errors, strict=True))), most)
    options = []
    for i in hull:
        error = errors[i]
        if costs[i] < dense * _CHEAP:
            error = fit_thin(rough, *sizes[i], rounds=_ROUNDS).error
        options.append(Option("thin", sizes[i], costs[i], error))
    return options


def _bottleneck(problem: Problem, rough: Problem, dense: float) -> list[Option]:
    c, m = problem.channels, problem.targets
    options = []
    for r in _widths(max(2, c // 12), 11 * c // 5, _points(problem, 10)):
        macs = cost(c, m, r, r, None, problem.reuse)
        if macs < dense and r <= problem.ops * min(rough.channels, m):
            error = fit_bottleneck(rough, r, rounds=_ROUNDS).error
            options.append(Option("bottleneck", (r,), macs, error))
    return options


def _mixed(problem: Problem, dense: float) -> list[Option]:
    c, m = problem.channels, problem.targets
    options = []
    for r1 in _widths(max(4, c // 12), 3 * c // 4, _points(problem, 7)):
        r2 = max(2, min(m, round(r1 * (m / c) ** 0.5)))
        for columns in (round(0.3 * problem.ops * r1), round(0.55 * problem.ops * r1)):
            if r2 < columns and cost(c, m, columns, r1, r2, problem.reuse) < dense:
                fit = fit_mixed(problem, r1, columns, r2, rounds=_ROUNDS)
                options.append(Option("mixed", (r1, columns, r2), fit.macs, fit.error))
    return options


def _columns(site: SiteMoments, dense: float) -> list[Option]:
    c, m = site.problem.channels, site.problem.targets
    most = min(len(site.moments.gram), 3 * c, int(dense / m))
    chosen, curve = column_curve(site.moments, site.weights, most)
    return [
        Option("columns", (b,), cost(c, m, b, None, None), float(curve[b]))
        for b in _widths(max(1, c // 8), len(chosen.order), 10)
    ]


def _waist(site: SiteMoments, dense: float) -> list[Option]:
    c, m, k = site.problem.channels, site.problem.targets, len(site.moments.gram)
    directions = site.problem.explained
    options = []
    for r in _widths(max(2, m // 12), 3 * m // 5, _points(site.problem, 6)):
        most = min(4 * c, k, int(dense / r - m))
        if _is_wide(site.problem):  # time goes with the square, and a narrow waist gains little
            most = min(most, _COLUMNS_A_WAIST * r)
        counts = _widths(max(r + 1, c // 4), most, 8)
        if not counts:
            continue
        errors = waist_curve(site.moments, site.weights, r, counts, directions)[1]
        options += [
            Option("waist", (r, b), cost(c, m, b, None, r), error)
            for b, error in zip(counts, errors, strict=True)
        ]
    return options


def site_options(site: SiteMoments, dense: float, forms: Collection[Form]) -> list[Option]:
    """Every option of a site that costs less than `dense` multiply-adds an output position.

    "Keep the convolution" is the caller's to add.

    Args:
        site: The site's moments.
        dense: Multiply-adds an output position of the convolution.
        forms: Forms to consider.
    """
    options: list[Option] = []
    rough = (
        narrowed(site.problem, _DIRECTIONS) if {"thin", "bottleneck"} & {*forms} else site.problem
    )
    if "thin" in forms:
        options += _thin(site.problem, rough, dense)
    if "low_rank" in forms:
        for r in _widths(1, site.problem.targets, 12):
            fit = fit_low_rank(site.problem, r)
            options.append(Option("low_rank", (r,), fit.macs, fit.error))
    if "bottleneck" in forms:
        options += _bottleneck(site.problem, rough, dense)
    if "mixed" in forms:
        options += _mixed(site.problem, dense)
    if "columns" in forms:
        options += _columns(site, dense)
    if "waist" in forms:
        options += _waist(site, dense)
    return [option for option in options if option.macs < dense]


def fit_option(site: SiteMoments, option: Option, *, rounds: int = ROUNDS) -> Fit:
    """Fits one option on a site's moments, which may be other ones than it was chosen with."""
    sizes = option.sizes
    if option.form == "columns":
        chosen, _ = column_curve(site.moments, site.weights, sizes[0])
        return fit_columns(site.moments, site.weights, len(site.ops), chosen, sizes[0], None)
    if option.form == "waist":
        chosen, _ = waist_curve(site.moments, site.weights, sizes[0], [sizes[1]])
        return fit_columns(site.moments, site.weights, len(site.ops), chosen, sizes[1], sizes[0])
    if option.form == "low_rank":
        return fit_low_rank(site.problem, sizes[0])
    if option.form == "bottleneck":
        return fit_bottleneck(site.problem, sizes[0], rounds=rounds)
    if option.form == "thin":
        return fit_thin(site.problem, sizes[0], sizes[1], rounds=rounds)
    return fit_mixed(site.problem, sizes[0], sizes[1], sizes[2], rounds=rounds)
