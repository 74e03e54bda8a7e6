"""The figure of fitted sites."""

from __future__ import annotations

import pytest
from PIL import Image

from pfsurgery import Plan
from pfsurgery.errors import PolicyError
from pfsurgery.measure import operation_shares
from pfsurgery.plan import Decision
from pfsurgery.sites import Geometry, Site
from pfsurgery.structure import Run, Structure


def fitted(structure: Structure | None, kernel: tuple[int, int] = (3, 3)) -> Decision:
    site = Site("block.conv", ("block.conv",), "", Geometry(8, 8, kernel), (1, 8, 9, 9), ())
    return Decision(site, "mixed" if structure else "keep", structure=structure)


def columns(*runs: Run) -> Structure:
    return Structure("columns", None, runs, None, 0.1)


def test_operations_are_shared_by_columns():
    centre = Run("tap", 1, 1, 1, 1, (0, 1, 2))
    shift = Run("tap", 0, 2, 1, 1, (4,))
    shares = operation_shares(fitted(columns(centre, shift, Run("average", 0, 0, 3, 3, (1,) * 4))))
    assert shares["identity"] == pytest.approx(3 / 8)
    assert shares["shift"] == pytest.approx(1 / 8)
    assert shares["average"] == pytest.approx(4 / 8)
    assert sum(shares.values()) == pytest.approx(1)
    assert operation_shares(fitted(columns(Run("tap", 0, 0, 1, 1, (0,))), (2, 2)))["shift"] == 1
    assert operation_shares(fitted(columns(Run("tap", 0, 0, 1, 1, (0,))), (1, 1)))["identity"] == 1


def test_a_thin_convolution_is_not_called_parameter_free():
    shares = operation_shares(fitted(Structure("thin", 3, (), 4, 0.1)))
    assert shares.pop("dense convolution") == 1
    assert not any(shares.values())


def test_the_figure_has_a_row_for_each_fitted_site(tmp_path):
    one = fitted(columns(Run("tap", 1, 1, 1, 1, (0, 1))))
    thin = fitted(Structure("thin", 3, (), 4, 0.0))
    heights = []
    for plan in (Plan("budget", (one,)), Plan("budget", (one, fitted(None), thin))):
        plan.figure(tmp_path / "sites.png")
        with Image.open(tmp_path / "sites.png") as image:
            heights.append(image.height)
    assert heights[1] > heights[0]


def test_a_plan_without_fitted_sites_says_so(tmp_path):
    with pytest.raises(PolicyError, match="fitted no site"):
        Plan("maxpool_all", (fitted(None),)).figure(tmp_path / "sites.png")
