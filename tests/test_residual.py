"""Additions and ReLUs behind fitted bottlenecks, taken into their kernel by `optimize`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F

import pfsurgery
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.sites import Geometry
from pfsurgery.structure import Structure


def bottleneck(channels=32, stride=1):
    geometry = Geometry(channels, channels, (3, 3), (stride, stride), (1, 1))
    return Bottleneck(geometry, Structure("thin", 8, (), 12, 0.0))


def image(dtype=torch.float32, layout=torch.channels_last):
    torch.manual_seed(1)
    return torch.randn(2, 32, 12, 12).to(dtype).contiguous(memory_format=layout)


class Block(nn.Module):
    """A residual block that ends as `end` says, with the name of each ReLU's caller."""

    def __init__(self, end):
        super().__init__()
        self.conv = bottleneck()
        self.passing = nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.end = end

    def forward(self, x):
        return self.end(self, x)


def calls_of(module, model, x):
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(x)
    handle.remove()
    return len(seen)


def in_place(block, x):
    shortcut = x
    x = block.passing(block.conv(x))
    x += shortcut
    return block.act(x)


TAKEN = {
    "in place": in_place,
    "in front": lambda block, x: block.act(x + block.conv(x)),
    "by torch": lambda block, x: block.act(torch.add(block.conv(x), x)),
    "by method": lambda block, x: block.act(block.conv(x).add_(x)),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_addition_and_the_relu_become_a_part_of_the_kernel(name, layout, dtype):
    block, x = Block(TAKEN[name]).eval().to(dtype), image(dtype, layout)
    with torch.no_grad():
        wanted = block(x.clone())
        fast = pfsurgery.optimize(block, x)
        made = fast(x)
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(made, wanted, **close)
    assert calls_of(block.act, block, x.clone()) == 1
    assert calls_of(fast.act, fast, x) == 0


@pytest.mark.parametrize(
    "end",
    [
        lambda block, x: (block.conv(x) + x).relu(),
        lambda block, x: F.relu(block.conv(x) + x, inplace=True),
        lambda block, x: torch.relu(block.passing(block.conv(x) + x)),
        lambda block, x: block.conv(x) + x,
        lambda block, x: torch.sigmoid(block.conv(x) + x),
    ],
)
def test_blocks_may_end_in_functions(end):
    block, x = Block(end).eval(), image()
    fast = pfsurgery.optimize(block, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x))
    assert "forward" in vars(fast)


def shortcut_in_place(block, x):
    x = x * 1
    made = block.conv(x)
    x += made
    return block.act(x)


def changed_before(block, x):
    """What the bottleneck reads is changed before the addition."""
    x = x * 1
    made = block.conv(x)
    x.mul_(2)
    return made + x


def changed_under_another_name(block, x):
    x = x * 1
    made = block.conv(block.passing(x))
    return made + block.act(x)


def read_twice(block, x):
    made = block.conv(x)
    return block.act(made + x) + made


def constant(block, x):
    return block.conv(x) + torch.rand(1, generator=torch.Generator().manual_seed(0))


def by_size(block, x):
    made = block.conv(x)
    return made + x if x.shape[0] > 1 else made - x


def by_kind(block, x):
    """A trace sees no tensor."""
    return block.conv(x) + (x if isinstance(x, torch.Tensor) else x[0])


def remembers(block, x):
    block.last = block.conv(x)
    return block.last + x


LEFT = {
    "shortcut in place": shortcut_in_place,
    "changed before": changed_before,
    "changed under another name": changed_under_another_name,
    "read twice": read_twice,
    "with itself": lambda block, x: (made := block.conv(x)) + made,
    "scaled": lambda block, x: torch.add(block.conv(x), x, alpha=2),
    "a number": lambda block, x: block.conv(x) + 1.0,
    "a constant": constant,
    "by size": by_size,
    "by kind": by_kind,
    "remembers": remembers,
    "subtracted": lambda block, x: block.conv(x) - x,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_plain_addition_is_left_alone(name):
    block, x = Block(LEFT[name]).eval(), image()
    with torch.no_grad():
        wanted = block(x)
        fast = pfsurgery.optimize(block, x)
        torch.testing.assert_close(fast(x), wanted)
        torch.testing.assert_close(fast(x[:1]), block(x[:1]))
    assert "forward" not in vars(fast)
    assert not any(isinstance(value, torch.fx.Proxy) for value in vars(fast).values())


@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (32, 1, 1), (1, 32, 12, 12), (12,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_added_may_be_smaller_and_of_another_kind(shape, dtype):
    class Added(Block):
        def __init__(self):
            super().__init__(lambda block, x: block.act(block.conv(x) + block.more))
            self.more = nn.Parameter(torch.randn(shape, dtype=dtype))

    block, x = Added().eval(), image()
    fast = pfsurgery.optimize(block, x)
    with torch.no_grad():
        made, wanted = fast(x), block(x)
    torch.testing.assert_close(made, wanted)


def test_gradients_of_what_is_added_are_kept():
    block, x = Block(lambda block, x: block.conv(x.detach()) + x).eval(), image()
    fast = pfsurgery.optimize(block.requires_grad_(False), x)
    x.requires_grad_(True)
    fast(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_watched_bottleneck_and_a_watched_relu_keep_their_calls():
    for name in ("conv", "act"):
        block, x, seen = Block(in_place).eval(), image(), []
        hook = getattr(block, name).register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append(output.clone())
        )
        fast = pfsurgery.optimize(block, x)
        with torch.no_grad():
            block(x)
            fast(x)
        hook.remove()
        torch.testing.assert_close(seen[-1], seen[-2])


def test_a_block_with_a_second_input_is_left_alone():
    class Masked(Block):
        def forward(self, x, mask=None):
            made = self.conv(x) + x
            return made if mask is None else made * mask

    block, x = Masked(None).eval(), image()
    fast = pfsurgery.optimize(block, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x))
        torch.testing.assert_close(fast(x, x), block(x, x))


def test_a_bottleneck_that_is_called_twice_is_left_alone():
    block, x = Block(lambda block, x: block.conv(block.conv(x) + x) + x).eval(), image()
    fast = pfsurgery.optimize(block, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x))


def test_a_bottleneck_deeper_in_the_block_is_found():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), bottleneck())
            self.shortcut = nn.Conv2d(32, 32, 1)
            self.activation = nn.ReLU()

        def forward(self, hidden_state):
            residual = hidden_state
            hidden_state = self.layer(hidden_state)
            hidden_state += self.shortcut(residual)
            return self.activation(hidden_state)

    block, x = Deep().eval(), image()
    fast = pfsurgery.optimize(block, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x))
    assert calls_of(fast.activation, fast, x) == 0
    block.layer.register_forward_hook(lambda *_: None)
    watched = pfsurgery.optimize(block, x)
    assert calls_of(watched.activation, watched, x) == 1


@pytest.fixture(scope="module")
def converted():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 2, 1, 1), num_classes=10, channels=(16, 24, 32, 48)).eval()
    images = [torch.randn(8, 3, 64, 64)]
    return pfsurgery.convert(model, pfsurgery.budget(macs="80%"), images=images)


def test_residual_blocks_of_timm_end_in_the_kernel(converted):
    x = torch.randn(2, 3, 64, 64)
    fast = pfsurgery.optimize(converted, x)
    with torch.no_grad():
        wanted = converted(x)
        torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
        for made in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(fast, (x,))
        torch.testing.assert_close(exported.module()(x), wanted, rtol=1e-4, atol=1e-4)
    blocks = [block for stage in (fast.layer1, fast.layer2) for block in stage]
    assert all(calls_of(block.act2, fast, x) == 0 for block in blocks)
    assert all(type(block).__name__ == "BasicBlock" for block in blocks)
