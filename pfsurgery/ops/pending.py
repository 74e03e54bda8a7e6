"""An output that is not computed yet, because what is added to it can be added on the way.

The addition at the end of a residual block stands in the block's code. So a bottleneck whose output
is read by an addition alone may return a stand-in, which adds nothing before it has to: the kernel
then adds, and raises to 0, what it has in its registers. To all others it is the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from pfsurgery.kernels.choice import is_tracked

Compute = Callable[[Tensor, Tensor | None, bool], Tensor]  # of input, what is added, with a ReLU

_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_RELUS_IN_PLACE = (torch.relu_, Tensor.relu_)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class Pending:
    """A tensor that is computed when it is read.

    Args:
        compute: Computes it.
        x: The input, (N, C, H, W), which must stay as it is until then.
        added: What is added to the output.
        raised: Whether to wait for a ReLU, once something is added.
    """

    __slots__ = ("_added", "_compute", "_made", "_raised", "_x")

    def __init__(
        self, compute: Compute, x: Tensor, added: Tensor | None = None, *, raised: bool
    ) -> None:
        self._compute, self._x, self._added, self._raised = compute, x, added, raised
        self._made: Tensor | None = None

    def tensor(self) -> Tensor:
        """The output, computed now if it was not yet."""
        if self._made is None:
            self._made = self._compute(self._x, self._added, False)
        return self._made

    def relu(self) -> Tensor:
        """The output, negative numbers raised to 0."""
        return (
            self._compute(self._x, self._added, True) if self._made is None else self._made.relu()
        )

    def relu_(self) -> Tensor:
        """The output, from now on with negative numbers raised to 0."""
        if self._made is None:
            self._made = self._compute(self._x, self._added, True)
            return self._made
        return self._made.relu_()

    def _takes(self, other: Any) -> bool:
        return self._made is None and self._added is None and _suits(other, self._x)

    def __add__(self, other: Any) -> Any:
        if not self._takes(other):
            return self.tensor() + other
        if self._raised:
            return Pending(self._compute, self._x, other, raised=True)
        return self._compute(self._x, other, False)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        other = _read(other)
        if not self._takes(other):
            return self.tensor().add_(other)
        self._added = other
        return self if self._raised else self.tensor()

    def add(self, other: Any, **options: Any) -> Any:
        """The output and `other` added."""
        return self.tensor().add(other, **options) if options else self + other

    def add_(self, other: Any, **options: Any) -> Any:
        """The output, from now on with `other` added."""
        return self.tensor().add_(other, **options) if options else self.__iadd__(other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Code that asks whether this is a tensor takes the way that it takes for tensors."""
        return Tensor

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _RELUS and len(args) == 1 and not kwargs.keys() - {"inplace"}:
            stays = kwargs.get("inplace", False) or function in _RELUS_IN_PLACE
            return args[0].relu_() if stays else args[0].relu()
        if function in _SUMS and len(args) == 2 and not kwargs:
            first, second = args
            return first + second if isinstance(first, cls) else second + first
        args, kwargs = tree_map(_read, (args, kwargs))
        return function(*args, **kwargs)


def _read(value: Any) -> Any:
    return value.tensor() if isinstance(value, Pending) else value


def _suits(other: Any, x: Tensor) -> bool:
    """Whether the kernel that reads `x` may add `other`."""
    return (
        type(other) is Tensor
        and other.is_cpu
        and other.dtype == x.dtype
        and not other.is_neg()
        and not is_tracked(other)
    )


def _delegate(name: str) -> None:
    def method(self: Pending, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    setattr(Pending, name, method)


# Python looks operators up in the class.
for _name in dir(Tensor):
    if _name.startswith("__") and _name not in dir(Pending) and callable(getattr(Tensor, _name)):
        _delegate(_name)
