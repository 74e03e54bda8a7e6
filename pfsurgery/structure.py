"""The shape of a fitted bottleneck: widths and columns, without weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from pfsurgery.sites import Geometry


@dataclass(frozen=True, slots=True)
class Run:
    """One parameter-free operation on several channels.

    Attributes:
        kind: `"tap"` (a shift; the centre tap is the channel itself), `"average"` or `"maximum"`.
        top: First kernel row that it reads.
        left: First kernel column that it reads.
        height: Kernel rows read.
        width: Kernel columns read.
        channels: Channels of the (reduced) input, ascending.
    """

    kind: str
    top: int
    left: int
    height: int
    width: int
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """What stands at a site in place of its convolution: reduce, operate, expand.

    Attributes:
        form: `"columns"` (parameter-free columns of the input, one product), `"waist"` (two
            products), `"bottleneck"` (reduce, one operation a channel, expand), `"mixed"` (reduce,
            columns, waist, expand), `"thin"` (a dense convolution between reduced widths),
            `"low_rank"` (a dense convolution to few channels, expand; these two are not
            parameter-free) or `"bare"` (one operation a channel and no product).
        reduce: Width of the pointwise reduction in front, None without one.
        runs: The columns, sorted by operation; empty for the dense forms.
        waist: Width of the first product, None without one.
        error: Relative error of the output behind the norm, as fitted; without what a ReLU hides,
            where one alone reads it.
    """

    form: str
    reduce: int | None
    runs: tuple[Run, ...]
    waist: int | None
    error: float

    @property
    def dense(self) -> bool:
        """Whether a dense convolution stands in the middle, so that it is not parameter-free."""
        return self.form in ("thin", "low_rank")

    @property
    def columns(self) -> int:
        """Number of columns B."""
        return sum(len(run.channels) for run in self.runs)

    def macs_per_position(self, geometry: Geometry) -> int:
        """Multiply-adds at one output position; the reduction runs at input positions."""
        if self.form == "bare":
            return 0
        reuse = geometry.stride[0] * geometry.stride[1]
        reduction = geometry.in_channels * self.reduce * reuse if self.reduce else 0
        return reduction + self._products(geometry)

    def parameters(self, geometry: Geometry) -> int:
        """Weights and biases."""
        if self.form == "bare":
            return 0
        reduction = geometry.in_channels * self.reduce if self.reduce else 0
        return reduction + self._products(geometry) + geometry.out_channels

    def _products(self, geometry: Geometry) -> int:
        width = self.columns
        if self.dense:
            height, breadth = geometry.kernel_size
            width = (self.reduce or geometry.in_channels) * height * breadth
        if self.waist is None:
            return width * geometry.out_channels
        return width * self.waist + self.waist * geometry.out_channels

    def __str__(self) -> str:
        """For example `thin 12>20` or `columns 96 (tap 80, average 16)`."""
        if self.dense:
            return f"{self.form} {'>'.join(str(w) for w in (self.reduce, self.waist) if w)}"
        kinds = Counter[str]()
        for run in self.runs:
            kinds[run.kind] += len(run.channels)
        shown = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
        widths = [str(w) for w in (self.reduce, self.columns, self.waist) if w]
        return f"{self.form} {'>'.join(widths)} ({shown})"

    def to_dict(self) -> dict[str, Any]:
        """The structure as JSON-ready values."""
        values = asdict(self)
        values["runs"] = [{**run, "channels": list(run["channels"])} for run in values["runs"]]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Structure:
        """The structure that `to_dict` wrote."""
        runs = tuple(
            Run(**{**run, "channels": tuple(int(c) for c in run["channels"])})
            for run in values["runs"]
        )
        return cls(**{**values, "runs": runs})
