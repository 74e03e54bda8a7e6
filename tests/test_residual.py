"""Additions and ReLUs behind fitted bottlenecks, taken into their kernel by `optimize`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

import pfsurgery
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.sites import Geometry
from pfsurgery.structure import Structure

CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
}

LAYOUTS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}


def bottleneck():
    return Bottleneck(Geometry(32, 32, (3, 3), (1, 1), (1, 1)), Structure("thin", 8, (), 12, 0.0))


def image(dtype=torch.float32, layout=torch.channels_last):
    torch.manual_seed(1)
    return torch.randn(2, 32, 12, 12).to(dtype).contiguous(memory_format=layout)


class Block(nn.Module):
    """A residual block that ends as `end` says."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.passing, self.act = bottleneck(), nn.Identity(), nn.ReLU(inplace=True)
        self.more = nn.Parameter(torch.linspace(-1, 1, 32).view(1, 32, 1, 1))
        self.end = end

    def forward(self, x):
        return self.end(self, x)


def calls(model, x):
    """Which additions and ReLUs torch computes, and what the model makes."""
    with torch.no_grad(), torch.profiler.profile() as seen:
        made = model(x)
    names = [event.name.removeprefix("aten::").strip("_") for event in seen.events()]
    return {name for name in names if name in ("add", "relu", "clamp_min")}, made


def in_place(block, x):
    shortcut = x
    x = block.passing(block.conv(x))
    x += shortcut
    return block.act(x)


TAKEN = {
    "in place": in_place,
    "in front": lambda block, x: block.act(x + block.conv(x)),
    "by torch": lambda block, x: block.act(torch.add(block.conv(x), x)),
    "by torch, in front": lambda block, x: block.act(torch.add(x, block.conv(x))),
    "by method": lambda block, x: block.act(block.conv(x).add_(x)),
    "relu by method": lambda block, x: (block.conv(x) + x).relu(),
    "relu by function": lambda block, x: F.relu(block.conv(x) + x, inplace=True),
    "relu by torch": lambda block, x: torch.relu(block.passing(block.conv(x) + x)),
    "without relu": lambda block, x: block.conv(x) + x,
}


def dropped(raised):
    """A block that adds in place by one name, and reads the sum, raised, by another."""

    def end(block, x):
        y = block.conv(x)
        z = y
        z += x
        raised(block, z)
        return y

    return end


def added_by_method(block, x):
    y = block.conv(x)
    y.add_(x)
    return block.act(y)


def read_twice(block, x):
    z = block.conv(x) + x
    return block.act(z) + z


WRITTEN_OVER = {
    "by a module": dropped(lambda block, z: block.act(z)),
    "by function": dropped(lambda block, z: F.relu(z, inplace=True)),
    "by function of its own": dropped(lambda block, z: F.relu_(z)),
    "by torch": dropped(lambda block, z: torch.relu_(z)),
    "by method": dropped(lambda block, z: z.relu_()),
    "not at all": dropped(lambda block, z: None),
    "a sum by method": added_by_method,
    "and read again": read_twice,
}


@pytest.mark.parametrize("name", WRITTEN_OVER)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_over_is_so_by_all_its_names(name, layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), Block(WRITTEN_OVER[name])).eval()
    x = image(layout=layout)
    fast = pfsurgery.optimize(model, x, memory_format=LAYOUTS[layout])
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(fast(x), wanted, **CLOSE[torch.float32])


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_adds_and_raises(name, layout, dtype):
    block, x = Block(TAKEN[name]).eval().to(dtype), image(dtype, layout)
    with torch.no_grad():
        wanted = block(x.clone())
        fast = pfsurgery.optimize(block, x, memory_format=LAYOUTS[layout])
        for size in (2, 1, 5):
            torch.testing.assert_close(
                fast(x[:1].expand(size, -1, -1, -1)),
                block(x[:1].expand(size, -1, -1, -1).clone()),
                **CLOSE[dtype],
            )
    left, made = calls(fast, x)
    torch.testing.assert_close(made, wanted, **CLOSE[dtype])
    assert made.is_contiguous(memory_format=layout)
    assert type(made) is Tensor
    assert dtype == torch.bfloat16 or left == set()


def test_what_is_optimized_can_be_once_more():
    block, x = Block(in_place).eval(), image()
    twice = pfsurgery.optimize(pfsurgery.optimize(block, x), x)
    left, made = calls(twice, x)
    assert left == set()
    assert not any(module.training for module in twice.modules())
    with torch.no_grad():
        torch.testing.assert_close(made, block(x.clone()), **CLOSE[torch.float32])


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


def changed_after(block, x):
    """What is added is changed before the ReLU."""
    x = x * 1
    made = block.conv(block.act(x * 2)) + x
    x.mul_(3)
    return made.relu()


def changed_under_another_name(block, x):
    x = x * 1
    made = block.conv(block.passing(x))
    return made + block.act(x)


def read_twice(block, x):
    made = block.conv(x)
    return block.act(made + x) + made


def by_size(block, x):
    made = block.conv(x)
    return made + x if x.shape[0] > 1 else made - x


def by_kind(block, x):
    made = block.conv(x)
    return made + x if isinstance(made, Tensor) else made[0]


def remembers(block, x):
    block.last = block.conv(x)
    return block.act(block.last + x)


def without_gradient(block, x):
    with torch.no_grad():
        y = block.act(x * 1)
    return block.conv(y) + x


LEFT = {
    "shortcut in place": shortcut_in_place,
    "changed before": changed_before,
    "changed after": changed_after,
    "changed under another name": changed_under_another_name,
    "read twice": read_twice,
    "with itself": lambda block, x: (made := block.conv(x)) + made,
    "scaled": lambda block, x: torch.add(block.conv(x), x, alpha=2),
    "scaled by method": lambda block, x: block.conv(x).add(x, alpha=2),
    "a number": lambda block, x: block.conv(x) + 1.0,
    "a size": lambda block, x: block.conv(x) + x.shape[0],
    "a parameter": lambda block, x: block.act(block.conv(x) + block.more),
    "a smaller one": lambda block, x: block.act(block.conv(x) + x.mean((2, 3), keepdim=True)),
    "a larger one": lambda block, x: block.conv(x[:1]) + x,
    "another kind": lambda block, x: block.act(block.conv(x) + x.double()),
    "by size": by_size,
    "by kind": by_kind,
    "remembers": remembers,
    "no gradient": without_gradient,
    "subtracted": lambda block, x: block.conv(x) - x,
    "twice": lambda block, x: block.conv(block.conv(x) + x) + x,
    "negated lazily": lambda block, x: block.conv(x) + torch._neg_view(x),
    "another activation": lambda block, x: torch.sigmoid(block.conv(x) + x),
    "viewed": lambda block, x: (block.conv(x) + x).view(-1),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whatever_follows_is_computed_as_before(name, layout):
    if name == "viewed" and layout == torch.channels_last:
        pytest.skip("the block itself cannot view what is channels_last")
    block, x = Block(LEFT[name]).eval(), image(layout=layout)
    fast = pfsurgery.optimize(block, x, memory_format="contiguous")
    with torch.no_grad():
        for size in (2, 1, 5):
            given = x[:1].expand(size, -1, -1, -1).contiguous(memory_format=layout)
            made, wanted = fast(given.clone()), block(given.clone())
            torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
            assert made.stride() == wanted.stride()


def test_gradients_of_what_is_added_are_kept():
    block, x = Block(lambda block, x: block.conv(x.detach()) + x).eval(), image()
    fast = pfsurgery.optimize(block.requires_grad_(False), x)
    x.requires_grad_(True)
    fast(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_nested_blocks_add_each_its_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block(lambda block, x: block.conv(x) + x)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.inner(x * 0.03) + x)

    model, x = Outer().eval(), image()
    fast = pfsurgery.optimize(model, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["conv", "passing", "act"])
def test_hooks_see_what_they_saw(name, when):
    block, x, seen = Block(in_place).eval(), image(), []

    def hook(module, inputs, output):
        seen.append(output * 1)

    if when == "before":
        getattr(block, name).register_forward_hook(hook)
    fast = pfsurgery.optimize(block, x)
    if when == "after":
        for model in (block, fast):
            getattr(model, name).register_forward_hook(hook)
    seen.clear()
    with torch.no_grad():
        wanted, made = block(x), fast(x)
    assert len(seen) == 2
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)


def test_a_hook_on_what_holds_the_bottleneck_sees_a_tensor():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), bottleneck())
            self.shortcut, self.activation = nn.Conv2d(32, 32, 1), nn.ReLU()

        def forward(self, hidden_state):
            residual = hidden_state
            hidden_state = self.layer(hidden_state)
            hidden_state += self.shortcut(residual)
            return self.activation(hidden_state)

    block, x, kinds = Deep().eval(), image(), []
    left, made = calls(pfsurgery.optimize(block, x), x)
    with torch.no_grad():
        torch.testing.assert_close(made, block(x), rtol=1e-5, atol=1e-5)
    assert "add" not in left
    block.layer.register_forward_hook(lambda *given: kinds.append(type(given[-1])))
    with torch.no_grad():
        pfsurgery.optimize(block, x)(x)
    assert set(kinds) == {Tensor}


def test_a_layer_put_in_later_is_called():
    block, x = Block(in_place).eval(), image()
    fast = pfsurgery.optimize(block, x)
    fast.conv = nn.Conv2d(32, 32, 1)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), torch.relu(fast.conv(x) + x))
    fast = pfsurgery.optimize(block, x)
    fast.act = nn.GELU()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), F.gelu(block.conv(x) + x), rtol=1e-5, atol=1e-5)


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
        for made in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(fast, (x,))
        torch.testing.assert_close(exported.module()(x), wanted, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)
    assert "add" in calls(converted, x)[0]
    assert "add" not in calls(fast, x)[0]
