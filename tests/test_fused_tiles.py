"""Bottlenecks in bfloat16 on the processor's tiles against the stock operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pfsurgery.kernels import disabled, explain
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.ops.pending import Pending
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure
from tests.bottlenecks import FAST, both_ways, cases, needs_tiles, step_by_step

pytestmark = needs_tiles


@FAST
@given(cases(st.sampled_from([32, 64, 96])), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_a_fused_bottleneck_in_bfloat16_is_that_in_float32(case, seed, adds, relu):
    """The stock operators are no measure: oneDNN's strided, dilated ones are wrong in bfloat16."""
    geometry, structure, x = case
    torch.manual_seed(seed)
    bottleneck = Bottleneck(geometry, structure).bfloat16()
    bottleneck.relu, bottleneck.summed, x = relu, adds, x.bfloat16()
    size = len(x), geometry.out_channels, *geometry.output_size(tuple(x.shape[2:]))
    more = torch.randn(size).bfloat16()
    with torch.no_grad():
        made = bottleneck(x) + more if adds else bottleneck(x)
        with disabled():
            wanted = step_by_step(bottleneck.float(), x.float(), torch.bfloat16)
            wanted = wanted + more if adds else wanted
            wanted = wanted.relu() if relu else wanted
    assert made.shape == wanted.shape
    assert made.dtype == torch.bfloat16
    if wanted.numel():
        size = wanted.square().mean().sqrt() + wanted.abs()
        assert ((made - wanted).abs() <= 0.03 * size + 1e-3).all()


@pytest.mark.parametrize("form", ["thin", "bottleneck", "columns"])
@pytest.mark.parametrize("images", [1, 3, 5])
def test_images_of_fewer_pixels_than_a_tile_has_rows(form, images):
    torch.manual_seed(0)
    taps = tuple(Run("tap", i // 3, i % 3, 1, 1, tuple(range(3 * i, 3 * i + 3))) for i in range(9))
    reduce = None if form == "columns" else 32
    structure = Structure(form, reduce, () if form == "thin" else taps, 32, 0.0)
    bottleneck = Bottleneck(Geometry(64, 48, (3, 3), padding=(1, 1)), structure).bfloat16()
    bottleneck.summed = bottleneck.raised = True
    x = torch.randn(images, 64, 2, 2).bfloat16().to(memory_format=torch.channels_last)
    more = torch.randn(images, 48, 2, 2).bfloat16()
    with torch.no_grad():
        assert type(bottleneck(x)) is Pending  # so the kernel runs
    made, wanted = both_ways(lambda: torch.relu(bottleneck(x) + more))
    assert made.shape == (images, 48, 2, 2)
    torch.testing.assert_close(made, wanted, rtol=0.03, atol=0.03)


def test_few_pixels_that_take_much_memory_are_read_together():
    torch.manual_seed(0)
    geometry = Geometry(32, 32, (1, 25), padding=(0, 12))
    thin = Bottleneck(geometry, Structure("thin", 192, (), 32, 0.0)).bfloat16()
    x = torch.randn(3, 32, 15, 1).bfloat16().to(memory_format=torch.channels_last)
    torch.testing.assert_close(*both_ways(lambda: thin(x)), rtol=0.03, atol=0.03)


def test_a_thin_bottleneck_in_bfloat16_has_the_very_numbers_of_the_stock_operators():
    torch.manual_seed(0)
    geometry = Geometry(64, 96, (3, 3), padding=(1, 1))
    thin = Bottleneck(geometry, Structure("thin", 32, (), 32, 0.0)).bfloat16()
    x = torch.randn(4, 64, 16, 16).bfloat16().to(memory_format=torch.channels_last)
    made, wanted = both_ways(lambda: thin(x))
    assert "bottlenecks in one kernel" in explain(x)
    different = (made != wanted).float().mean()
    assert different < 0.01  # sums in another order


def test_tiles_leave_the_other_kernels_theirs():
    torch.manual_seed(0)
    geometry = Geometry(64, 64, (3, 3), padding=(1, 1))
    thin = Bottleneck(geometry, Structure("thin", 16, (), 16, 0.0)).bfloat16()
    dense = torch.nn.Conv2d(64, 64, 3, padding=1).bfloat16()
    x = torch.randn(4, 64, 16, 16).bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = dense(x)
        for _ in range(3):
            thin(x)
            assert torch.equal(dense(x), wanted)
