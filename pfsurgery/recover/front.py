"""A network that is edited from front to back: what lies behind the front is not run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from pfsurgery.graph import GraphView
from pfsurgery.modules import parents_of
from pfsurgery.recover.capture import Side, capture

_MEMORY = 1 << 29  # bytes of one layer's outputs, for all images, that are held at once, about


class Front:
    """An edited network and the images that pass it, once for each layer that is fitted.

    Edits go from front to back. So before each layer is a place that all of the data passes (the
    output of an earlier block, say), and what comes before that place gives what it gave the last
    time: its output is held, and the modules before it are not run again.

    Args:
        network: A private copy of the network, in eval mode; edited by the caller as it goes.
        batches: Images (N, C, H, W), one batch each.
        seen: The graph view of the original; without it nothing is held.
        layers: Paths of the layers of the original that are fitted, in this order.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[Tensor],
        seen: GraphView | None = None,
        layers: Sequence[str] = (),
    ) -> None:
        self.network, self.batches = network, batches
        self._layers = list(layers)
        self._first = {} if seen is None else _first_calls(seen)
        paths = {path for path, _ in network.named_modules(remove_duplicate=False)}
        self._cuts = [
            cut
            for cut in ([] if seen is None else _cuts(seen, sum(map(len, batches))))
            if paths >= {cut.held, *cut.hollow}  # none inside of what was replaced
        ]
        self._held: list[_Held | None] = [None] * len(batches)

    def captures(
        self,
        layer: str,
        wanted: Mapping[str, tuple[str, Side]],
        calls: Mapping[str, int] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """For each batch the wanted tensors (see `capture`), none of them from before `layer`."""
        cut = self._cut_before(layer)
        for place, batch in enumerate(self.batches):
            with self._resumed(self._held[place]), self._noted(cut) as noted:
                made = capture(self.network, batch, wanted, calls)
            if cut is not None and noted.keys() == {cut.held, *cut.hollow}:
                self._held[place] = _Held(cut, noted)
            yield made

    def _cut_before(self, layer: str) -> _Cut | None:
        """The last cut before all that is still to be fitted, None where it need not be noted."""
        left = self._layers[self._layers.index(layer) :] if layer in self._layers else []
        if len(left) < 2:
            return None
        until = min(self._first.get(name, 0) for name in left)
        found = [cut for cut in self._cuts if cut.position <= until]
        held = self._held[0]
        return None if not found or (held and held.cut is found[-1]) else found[-1]

    @contextmanager
    def _resumed(self, held: _Held | None) -> Iterator[None]:
        """Modules up to the cut return what is held, and shapes without content."""
        with ExitStack() as stack:
            for path, output in held.outputs.items() if held else ():
                module = self.network.get_submodule(path)
                stack.enter_context(_answering(module, output, self.batches[0].device))
            yield

    @contextmanager
    def _noted(self, cut: _Cut | None) -> Iterator[dict[str, Any]]:
        """What the modules of a cut return, all but the last without content."""
        noted: dict[str, Any] = {}
        if cut is None:
            yield noted
            return

        def note(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if path == cut.held and isinstance(output, Tensor):
                noted[path] = output.clone()
            elif path != cut.held and all(map(_is_plain, tree_leaves(output))):
                noted[path] = tree_map(_hollow, output)

        handles = [
            self.network.get_submodule(path).register_forward_hook(partial(note, path))
            for path in (cut.held, *cut.hollow)
        ]
        try:
            yield noted
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place that all of the data passes as one tensor.

    Attributes:
        position: How many nodes of the graph view come before it.
        held: Path of the module that returns this tensor.
        hollow: Paths of the modules that are finished by then; with the modules in them they are
            all that runs before.
    """

    position: int
    held: str
    hollow: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """What the modules of a cut returned for one batch."""

    cut: _Cut
    outputs: dict[str, Any]


def _first_calls(seen: GraphView) -> dict[str, int]:
    """For each leaf module the index of the node that calls it first."""
    nodes = list(enumerate(seen.graph.nodes))
    return {str(node.target): i for i, node in reversed(nodes) if node.op == "call_module"}


def _cuts(seen: GraphView, images: int) -> list[_Cut]:
    """The places that one tensor passes, from front to back, where it fits for all images."""
    finished, changing = _finished(seen), _changing(seen)
    found = []
    for position, node in _narrow(seen.graph):
        if position not in finished.values() or 4 * images * _per_image(node) > _MEMORY:
            continue
        before = {path for path, done in finished.items() if done <= position}
        outer = [path for path in before if not any(above in before for above in parents_of(path))]
        held = [path for path in outer if finished[path] == position]
        if len(held) == 1 and changing.isdisjoint(outer):
            found.append(_Cut(position, held[0], tuple(p for p in outer if p != held[0])))
    return found


def _finished(seen: GraphView) -> dict[str, int]:
    """For each module that was called how many nodes there were when it returned at last."""
    returned = {
        str(node.target): place + 1
        for place, node in enumerate(seen.graph.nodes)
        if node.op == "call_module"
    }
    passes = {path: max(call.position for call in calls) for path, calls in seen.passes.items()}
    return returned | passes


def _changing(seen: GraphView) -> set[str]:
    """Modules that return other shapes from call to call: one answer would not do for all."""
    shapes: dict[str, set[object]] = {}
    for node in seen.graph.nodes:
        if node.op == "call_module":
            shapes.setdefault(str(node.target), set()).add(node.meta["shape"])
    for path, calls in seen.passes.items():
        shapes[path] = {call.out_shape for call in calls}
    return {path for path, made in shapes.items() if len(made) > 1}


def _narrow(graph: fx.Graph) -> Iterator[tuple[int, fx.Node]]:
    """The nodes that alone are read by what comes behind them, and how many come up to them."""
    nodes = list(graph.nodes)
    place_of = {node: place for place, node in enumerate(nodes)}
    last_read = [max((place_of[user] for user in node.users), default=-1) for node in nodes]
    read_later = 0
    ends = Counter(last_read)
    for place, node in enumerate(nodes):
        read_later -= ends[place]
        read_later += last_read[place] > place
        if read_later == 1 and last_read[place] > place:
            yield place + 1, node


def _per_image(node: fx.Node) -> int:
    return torch.Size(node.meta["shape"][1:]).numel()


def _is_plain(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, Tensor | int | float | str)


def _hollow(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def _filled(leaf: Any, device: torch.device) -> Any:
    """What a module returns in place of what it would: nobody reads the values of hollow ones."""
    if not isinstance(leaf, Tensor):
        return leaf
    if not leaf.is_meta:
        return leaf.clone()  # what follows may change it in place
    make = torch.empty_like if leaf.is_floating_point() else torch.zeros_like
    return make(leaf, device=device)


@contextmanager
def _answering(module: nn.Module, output: Any, device: torch.device) -> Iterator[None]:
    """While this is open, `module` returns `output` without being run."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: tree_map(lambda leaf: _filled(leaf, device), output)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
