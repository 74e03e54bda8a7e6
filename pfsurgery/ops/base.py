"""What every op answers, and the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from pfsurgery.errors import UnknownNameError, closest
from pfsurgery.ops.window import Window
from pfsurgery.sites import Site


@dataclass(frozen=True, slots=True)
class Support:
    """Whether an op can take the place of a convolution; true or false like a bool.

    Attributes:
        reason: Why not; empty where it can.
    """

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


class Op(ABC):
    """A parameter-free operation that a site can become.

    An op maps (N, C, H, W) to (N, C, H', W') with the H' and W' of the convolution that it stands
    for. It keeps dtype, device and memory format. Where a site changes the number of channels, or
    nothing else would mix them, `convert` puts a pointwise convolution behind it.

    Attributes:
        name: What policies and plans call it.
        summary: One line for listings.
        keeps_convolution: The convolution stays behind the op, at stride 1: the op takes over its
            stride alone. Such an op saves no parameters.
        fitted: The op has pointwise weights of its own, which the policy `budget` fits to images,
            so that it mixes the channels itself.
        attention: The op takes the place of a self-attention, not of a convolution: it maps tokens
            (N, L, C) to as many, and has linear layers, which are copied as far as can be.
    """

    name: str
    summary: str
    keeps_convolution: bool = False
    fitted: bool = False
    attention: bool = False

    def supports(self, site: Site) -> Support:
        """Whether the op can stand at `site`, with the reason where it cannot."""
        return Support(Window.of(site.geometry).why_empty() or "")

    @abstractmethod
    def build(self, site: Site) -> nn.Module:
        """The module for `site`, without any parameter or persistent buffer."""

    def parameters(self, site: Site) -> int:
        """Parameters of the module for `site`: those of the linear layers of an `attention` op."""
        return 0

    def macs_per_position(self, site: Site) -> int:
        """Multiply-adds at one output position; 0 for comparisons, additions and copies."""
        return 0


_REGISTRY: dict[str, Op] = {}


def register_op(op: Op) -> Op:
    """Make `op` available to policies and plans under its name.

    Raises:
        UnknownNameError: The name is taken, or is `keep`, which means that a site is left alone.
    """
    if op.name in _REGISTRY or op.name == "keep":
        raise UnknownNameError(f"An op named {op.name!r} exists already; choose another name.")
    _REGISTRY[op.name] = op
    return op


def get_op(name: str) -> Op:
    """The op of that name.

    Raises:
        UnknownNameError: There is none; the message lists the closest names.
    """
    if name not in _REGISTRY:
        raise UnknownNameError(f"No op is named {name!r}. {closest(name, _REGISTRY)}")
    return _REGISTRY[name]


def list_ops(pattern: str = "*") -> list[str]:
    """Names of the registered ops that match a glob, sorted."""
    return sorted(name for name in _REGISTRY if fnmatchcase(name, pattern))
