"""Additions behind fitted bottlenecks, as residual blocks end, left to the fused kernel."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F

from pfsurgery.fold import is_seen_between
from pfsurgery.graph import GraphView
from pfsurgery.modules import get_module, is_watched, parents_of, replace_everywhere
from pfsurgery.ops.bottleneck import Bottleneck
from pfsurgery.ops.pending import Pending

_SUMS = ("add", "add_")
_RELUS = ("relu", "relu_")


class LastReLU(nn.ReLU):
    """A ReLU that the bottleneck in front of an addition may take over."""

    def forward(self, input: Tensor | Pending) -> Tensor:
        """Negative numbers raised to 0."""
        if isinstance(input, Pending):
            return input.relu_() if self.inplace else input.relu()
        return F.relu(input, inplace=self.inplace)


def take_in_additions(seen: GraphView, model: nn.Module) -> None:
    """Let the kernel of a bottleneck add what its block adds, and raise to 0 what a ReLU would.

    That is where nothing but an addition reads its output, and nothing but the ReLU the sum.

    Args:
        seen: The view of a model of this structure.
        model: Changed in place; in eval mode.
    """
    for node in seen.graph.nodes:
        if node.op != "call_module":
            continue
        bottleneck = get_module(model, path := site_of(node, model))
        if not isinstance(bottleneck, Bottleneck):
            continue
        addition = reader(node, model)
        if addition is None or not adds(addition) or bottleneck.relu or is_watched(bottleneck):
            continue
        owner = str(addition.meta["owner"])
        once = seen.calls(str(node.target)) == 1 and not _is_seen_leaving(path, owner, model)
        if not once or not _may_wait(path, node, addition, seen, model):
            continue
        bottleneck.summed = True
        relu = reader(addition, model)
        if relu is not None and _is_next(relu, addition, model):
            bottleneck.raised = _raises(relu, owner, seen, model)


def adds(node: fx.Node) -> bool:
    """Whether a node of a graph view adds two tensors."""
    return node.op == "call_function" and _name(node) in _SUMS and len(node.args) == 2


def site_of(node: fx.Node, model: nn.Module) -> str:
    """Path of the module that a node calls, or of the bottleneck whose last product that is."""
    path = str(node.target)
    around, _, name = path.rpartition(".")
    inside = around and name == "expand" and isinstance(get_module(model, around), Bottleneck)
    return around if inside else path


def reader(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """The only node that reads what `node` makes, behind identities that nobody watches."""
    first = _place(node)
    while len(node.users) == 1:
        (node,) = node.users
        if not is_plain_call(node, nn.Identity, model):
            return node
        if is_seen_between(first, str(node.target), model):
            return None
    return None


def _place(node: fx.Node) -> str:
    """The path of the module that a node calls, or what would be that of a function."""
    owner = str(node.meta["owner"])
    return str(node.target) if node.op == "call_module" else f"{owner}.function".lstrip(".")


def _raises(relu: fx.Node, owner: str, seen: GraphView, model: nn.Module) -> bool:
    """Whether a node is a ReLU that may take what is not computed yet."""
    if relu.op == "call_function":
        return _name(relu) in _RELUS
    path = str(relu.target)
    plain = is_plain_call(relu, nn.ReLU, model) or is_plain_call(relu, LastReLU, model)
    if not plain or _is_seen_leaving(path, owner, model):
        return False
    module = get_module(model, path)
    assert isinstance(module, nn.ReLU)
    if seen.calls(path) == 1:  # one that is called for others too is asked by torch what it makes
        replace_everywhere(model, module, LastReLU(module.inplace))
    return True


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "")


def is_plain_call(node: fx.Node, kind: type[nn.Module], model: nn.Module) -> bool:
    """Whether a node calls a module of this very class that nobody watches."""
    if node.op != "call_module" or len(node.args) != 1:
        return False
    module = get_module(model, str(node.target))
    return type(module) is kind and not is_watched(module)


def _is_seen_leaving(path: str, owner: str, model: nn.Module) -> bool:
    """Whether someone watches a module between the one at `path` and the code of `owner`."""
    inside = [parent for parent in parents_of(path) if parent not in {*parents_of(owner), owner}]
    return any(is_watched(get_module(model, parent)) for parent in inside)


def _may_wait(
    path: str, bottleneck: fx.Node, addition: fx.Node, seen: GraphView, model: nn.Module
) -> bool:
    """Whether nothing that runs up to the addition can change what the bottleneck reads."""
    if _is_next(addition, bottleneck, model):
        return True
    calls = seen.passes.get(path)
    source = calls[0].source if calls else bottleneck.args[0]
    if not isinstance(source, fx.Node):
        return False
    inside = [user for user in source.users if user is bottleneck or _is_inside(user, path)]
    return len(inside) == len(source.users) and _is_fresh(source, model)


def _is_next(node: fx.Node, before: fx.Node, model: nn.Module) -> bool:
    """Whether nothing but identities runs between two nodes."""
    before = before.next
    while is_plain_call(before, nn.Identity, model):
        before = before.next
    return before is node


def _is_inside(node: fx.Node, path: str) -> bool:
    return _place(node) == path or _place(node).startswith(f"{path}.")


def _is_fresh(node: fx.Node, model: nn.Module) -> bool:
    """Whether the memory of what `node` makes is read by its readers alone."""
    while node.op == "call_module":
        if next(get_module(model, str(node.target)).parameters(), None) is not None:
            return True
        source = node.args[0] if len(node.args) == 1 else None
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            return False
        node = source
    return False
