"""The blocks of a converted model in which sites were replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pfsurgery.record import has_record, record


@dataclass(frozen=True, slots=True)
class Block:
    """A residual branch in which sites were replaced, or such a site with norm and activation.

    Attributes:
        output: Path of the module whose output is the block's.
        modules: Paths of the modules that make it up; what is below them belongs to it too.
    """

    output: str
    modules: tuple[str, ...]


def changed_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of a converted model in which sites were replaced; none for other models."""
    if not has_record(model):
        return ()
    paths = {path for path, _ in model.named_modules()}
    found: dict[str, Block] = {}
    for decision in record(model).replaced:
        site = decision.site
        branch = site.neighbours.branch
        own = tuple(path for path in (*site.names, *site.neighbours.tail) if path in paths)
        modules = (branch,) if branch and branch in paths else own
        if not modules:
            continue
        found[modules[-1]] = Block(modules[-1], modules)
    return tuple(found.values())


def changed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters in `changed_blocks`."""
    inside = {path for block in changed_blocks(model) for path in block.modules}
    return {
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(f"{path}.") for path in inside)
    }
