"""Bottlenecks of all forms with an input each, and both ways of computing one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor

from pfsurgery.kernels import disabled
from pfsurgery.sites import Geometry
from pfsurgery.structure import Run, Structure

FAST = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
ENOUGH = 4096  # numbers with which a kernel is worth its start


HAS_TILES = (
    torch.cpu._is_amx_tile_supported()
    and torch.cpu._is_avx512_bf16_supported()
    and torch.cpu._init_amx()
)
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="the processor has no tiles (Intel AMX)")


@st.composite
def geometries(draw, inputs):
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.integers(1, 2))
    padding = tuple(draw(st.integers(0, (k - 1) * dilation // 2)) for k in kernel)
    return Geometry(
        draw(inputs),
        draw(st.integers(1, 90)),
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "same" if draw(st.integers(0, 5)) == 0 else padding,
        (dilation, dilation),
    )


@st.composite
def runs(draw, geometry, channels, pools):
    (height, width), found = geometry.kernel_size, []
    for _ in range(draw(st.integers(1, 5))):
        kinds = ["tap", "average", "maximum"] if pools else ["tap"]
        kind = draw(st.sampled_from(kinds))
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        tall, wide = (1, 1)
        if kind != "tap":
            top, left, tall, wide = 0, 0, height, width
        picked = draw(st.sets(st.integers(0, channels - 1), min_size=1, max_size=channels))
        found.append(Run(kind, top, left, tall, wide, tuple(sorted(picked))))
    return tuple(found)


@st.composite
def structures(draw, geometry):
    forms = ["columns", "waist", "bottleneck", "mixed", "thin", "low_rank"]
    if geometry.padding == "same" and max(geometry.stride) > 1:
        forms = forms[:4]  # the stock convolution, which the others are compared with, may crash
    form = draw(st.sampled_from(forms))
    reduce = draw(st.integers(1, 24)) if form in ("bottleneck", "mixed", "thin") else None
    waist = draw(st.integers(1, 24)) if form in ("waist", "mixed", "thin", "low_rank") else None
    if form in ("thin", "low_rank"):
        return Structure(form, reduce, (), waist, 0.0)
    pools = reduce is None and geometry.dilation == (1, 1)
    columns = draw(runs(geometry, reduce or geometry.in_channels, pools))
    return Structure(form, reduce, columns, waist, 0.0)


ANY = st.integers(1, 40)  # channels


@st.composite
def cases(draw, inputs=ANY):
    geometry = draw(geometries(inputs))
    structure = draw(structures(geometry))
    height, width = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    reach = [(k - 1) * d + 1 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    pads = geometry.pads((height, width))
    assume(all(n + sum(p) >= r for n, p, r in zip((height, width), pads, reach, strict=True)))
    batch = draw(st.integers(0, 3))
    if batch:
        batch = max(batch, -(-ENOUGH // (geometry.in_channels * height * width)))
    x = torch.randn(batch, geometry.in_channels, height, width)
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    return geometry, structure, x.contiguous(memory_format=layout)


def step_by_step(bottleneck, x, rounded=None):
    for step in (bottleneck.reduce, bottleneck.columns, bottleneck.waist, bottleneck.expand):
        x = x if step is None else step(x).to(rounded or x.dtype).to(x.dtype)
    return x


def both_ways(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What `run` makes by way of the kernels, and by the stock calls."""
    with torch.no_grad():
        made = run()
        with disabled():
            return made, run()
