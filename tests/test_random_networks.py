"""Whatever a convolutional network looks like, converting it keeps what was promised."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery import convert, load, record, save
from pfsurgery.errors import NoEffectWarning

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
OPS = ("max_pool", "avg_pool", "shift", "identity", "blur", "avg_down")
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
EXHAUSTIVE = settings(QUICK, max_examples=1000)


@dataclass(frozen=True)
class Block:
    """One block of a random network.

    Attributes:
        kind: How its convolutions stand: `plain`, `residual`, `branches` that are concatenated,
            `shared` (called twice), `functional` or `transposed`.
        geometry: Keyword arguments of its convolutions.
        norm: Whether a norm follows.
        act: What activation follows, None for none; some work in place.
        nest: Containers around it.
    """

    kind: str
    geometry: dict[str, Any] = field(hash=False)
    norm: bool = True
    act: str | None = None
    nest: int = 0


ACTS = {
    "relu": nn.ReLU,
    "in-place": lambda: nn.ReLU(inplace=True),
    "in-place silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
}


class Functional(nn.Module):
    """A convolution that is a call, not a module."""

    def __init__(self, inputs: int, outputs: int, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(outputs, inputs, *kernel_size) / 8)
        self.padding = tuple(size // 2 for size in kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filters, padding=self.padding)


class Built(nn.Module):
    """A block as a module."""

    def __init__(self, block: Block, inputs: int) -> None:
        super().__init__()
        self.kind = block.kind
        geometry = dict(block.geometry)
        outputs = geometry.pop("out_channels")
        if self.kind in ("residual", "shared"):
            outputs = inputs
        if self.kind == "functional":
            self.conv: nn.Module = Functional(inputs, outputs, geometry["kernel_size"])
        elif self.kind == "transposed":
            self.conv = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        else:
            geometry["groups"] = next(
                g
                for g in (inputs, geometry["groups"], 1)
                if g <= geometry["groups"] and inputs % g == outputs % g == 0
            )
            self.conv = nn.Conv2d(inputs, outputs, **geometry)
            if self.kind == "branches":
                self.other = nn.ModuleList([nn.Conv2d(inputs, outputs, **geometry)])
        self.outputs = outputs * (2 if self.kind == "branches" else 1)
        tail: list[nn.Module] = [nn.BatchNorm2d(self.outputs)] if block.norm else []
        tail += [ACTS[block.act]()] if block.act else []
        self.tail = nn.Sequential(*tail)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "branches":
            y = torch.cat([y, self.other[0](x)], 1)
        y = self.tail(y)
        if self.kind == "shared":
            y = self.tail(self.conv(y))
        return x + y if self.kind == "residual" else y


class Random(nn.Module):
    """A stem, the blocks, a pointwise convolution now and then, and a classifier."""

    def __init__(self, blocks: tuple[Block, ...], width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleDict()
        for index, block in enumerate(blocks):
            built: nn.Module = Built(block, width)
            width = built.outputs
            if index % 2:
                built = nn.Sequential(built, nn.Conv2d(width, width, 1))
            for _ in range(block.nest):
                built = nn.Sequential(built)
            self.body[f"block{index}"] = built
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body.values():
            x = block(x)
        return self.head(x.mean((2, 3)))


@st.composite
def blocks(draw) -> Block:
    kind = draw(
        st.sampled_from(
            ["plain", "plain", "residual", "branches", "shared", "functional", "transposed"]
        )
    )
    keeps = kind in ("residual", "shared")
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    if keeps:
        kernel = tuple(k | 1 for k in kernel)
    stride = 1 if keeps else draw(st.integers(1, 2))
    dilation = draw(st.integers(1, 2))
    half = tuple((k - 1) * dilation // 2 for k in kernel)
    same = stride == 1 and draw(st.booleans())
    geometry = {
        "out_channels": draw(st.sampled_from([4, 6, 8])),
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": "same" if same else half,
        "groups": draw(st.sampled_from([1, 2, 8])),
        "bias": draw(st.booleans()),
        "padding_mode": draw(
            st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])
        ),
    }
    act = draw(st.sampled_from([None, *ACTS]))
    return Block(kind, geometry, draw(st.booleans()), act, draw(st.integers(0, 2)))


@st.composite
def networks(draw) -> tuple[tuple[Block, ...], int, tuple[int, int]]:
    made = tuple(draw(st.lists(blocks(), min_size=1, max_size=4)))
    return (
        made,
        draw(st.sampled_from([4, 8])),
        draw(st.tuples(st.integers(16, 24), st.integers(16, 24))),
    )


def check(network: tuple[tuple[Block, ...], int, tuple[int, int]], ops: list[str]) -> None:
    made, width, size = network
    model = Random(made, width)
    x = torch.randn(2, 3, *size)
    try:
        meant = model.eval()(x)
    except RuntimeError:  # reflection pads no image that a stride has made too small
        reject()
    training = len(ops) % 2 == 0
    model.train(training)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    turns = iter(ops * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        fast = convert(model, lambda site: next(turns), example=x)

    assert list(model.modules()) == modules
    assert model.training is training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(model.eval()(x), meant, rtol=0, atol=0)

    plan = record(fast).plans[0]
    assert all(d.replaced or d.reason for d in plan)
    touched = {f"{name}." for d in plan.replaced for name in d.site.names}
    state = fast.state_dict()
    for key, value in before.items():
        if not any(key.startswith(prefix) for prefix in touched):
            assert torch.equal(state[key], value), key
    for d in plan:
        if not d.replaced and ":" not in d.site.name:
            assert type(fast.get_submodule(d.site.name)) is type(model.get_submodule(d.site.name))

    y = fast.eval()(x)
    assert y.shape == meant.shape
    assert fast(x[:1]).shape == meant[:1].shape
    with tempfile.TemporaryDirectory() as folder:
        again = load(save(fast, folder), base=lambda: Random(made, width))
        torch.testing.assert_close(again(x), y, rtol=0, atol=0)
    fast.train()(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fast.parameters())


@QUICK
@given(networks(), st.lists(st.sampled_from(OPS), min_size=1, max_size=6))
def test_random_networks(network, ops):
    check(network, ops)


@pytest.mark.slow
@EXHAUSTIVE
@given(networks(), st.lists(st.sampled_from(OPS), min_size=1, max_size=6))
def test_many_random_networks(network, ops):
    check(network, ops)


@QUICK
@given(networks(), st.sampled_from(["max_pool", "shift", "blur"]))
def test_random_graphs(network, op):
    """The same as a graph, in which functional convolutions are sites as well."""
    made, width, size = network
    model = Random(made, width).eval()
    x = torch.randn(1, 3, *size)
    try:
        meant = model(x)
        graph = torch.fx.symbolic_trace(model)
    except RuntimeError:
        reject()
    keys = list(graph.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        fast = convert(graph, lambda site: op, example=x)
    assert list(graph.state_dict()) == keys
    torch.testing.assert_close(graph(x), meant)
    assert not any(":" in d.site.name for d in record(fast).plans[0])
    assert fast(x).shape == meant.shape
    assert set(fast.state_dict()) - set(keys) <= {
        key for key in fast.state_dict() if ".pointwise." in key
    }
