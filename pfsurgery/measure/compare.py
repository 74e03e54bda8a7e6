"""What a model costs, and what surgery saved: measured, printed and saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pfsurgery.errors import RecordMismatchError
from pfsurgery.example import Example, example_inputs
from pfsurgery.measure.count import Count, count
from pfsurgery.measure.latency import (
    Latency,
    MemoryFormat,
    Setting,
    in_format,
    latency,
)
from pfsurgery.measure.memory import Memory, peak_memory
from pfsurgery.measure.table import Row, quantity, rich_table, text

if TYPE_CHECKING:
    from rich.console import Group

_CONVENTIONS = (
    "Counts are for the whole batch; 1 MAC is one multiply-add of a convolution, linear layer or "
    "matrix product, activations are their outputs, and all else is in the element operations. "
    "1 MB is 1,000,000 bytes."
)
_UNITS = {
    "parameters": "parameters",
    "macs": "multiply-adds (MACs)",
    "element_ops": "element operations",
    "activations": "elements",
    "latency": "ms",
    "memory": "bytes",
}
_SMALL = 0.02


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one forward pass of a model costs, for the whole example batch.

    Attributes:
        count: Parameters, MACs, element operations, activations.
        latency: Times in ms, and the setting in which they were taken.
        memory: Peak activation memory and parameter memory in bytes.
    """

    count: Count
    latency: Latency
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON: counts, ms and bytes."""
        timing = {
            "median_ms": self.latency.median_ms,
            "iqr_ms": self.latency.iqr_ms,
            "times_ms": list(self.latency.times_ms),
            "setting": {
                **asdict(self.latency.setting),
                "input_shape": list(self.latency.setting.input_shape),
            },
        }
        return {"count": asdict(self.count), "latency": timing, "memory": asdict(self.memory)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` wrote.

        Raises:
            RecordMismatchError: `data` does not come from `to_dict`.
        """
        try:
            timing = data["latency"]
            setting = {**timing["setting"], "input_shape": tuple(timing["setting"]["input_shape"])}
            return cls(
                count=Count(**data["count"]),
                latency=Latency(tuple(timing["times_ms"]), Setting(**setting)),
                memory=Memory(**data["memory"]),
            )
        except (KeyError, TypeError) as error:
            raise RecordMismatchError(
                f"This is not a measurement that `to_dict` wrote ({type(error).__name__}: {error})."
            ) from error

    def __rich__(self) -> Group:
        return rich_table("Cost of one forward pass", ["value"], _rows(self), _notes(self))

    def __str__(self) -> str:
        return text(self.__rich__())


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models, measured side by side on the same example.

    Attributes:
        before: The model as it was.
        after: The converted model.
    """

    before: Measurement
    after: Measurement

    @property
    def ratios(self) -> dict[str, float]:
        """After divided by before; below 1 is a saving. Quantities that were 0 are left out."""
        pairs = zip(_numbers(self.before).items(), _numbers(self.after).values(), strict=True)
        return {name: after / before for (name, before), after in pairs if before}

    @property
    def verdict(self) -> str:
        """One or two plain sentences: faster, slower, or no difference that can be told."""
        old, new = self.before.latency, self.after.latency
        early, late = quantity(old.median_ms, "ms"), quantity(new.median_ms, "ms")
        ratio = new.median_ms / old.median_ms
        if noise := self._within_noise():
            said = f"Same latency within the noise: {late} after, {early} before."
        elif ratio < 1:
            said = f"The converted model is {1 / ratio:.2f}x faster: {late} instead of {early}."
        else:
            said = f"The converted model is {ratio:.2f}x slower: {late} instead of {early}."
        saved = 1 - self.ratios.get("macs", 1.0)
        if saved > _SMALL and (noise or ratio > 1):
            said += f" Its {saved:.0%} fewer MACs do not show in the time measured here."
        return said

    def _within_noise(self) -> bool:
        """Medians closer than 2 %, or a quarter of the rounds saying the opposite."""
        old, new = self.before.latency, self.after.latency
        ratio = new.median_ms / old.median_ms
        if abs(ratio - 1) < _SMALL:
            return True
        rounds = list(zip(old.times_ms, new.times_ms, strict=False))
        agreeing = sum((late > early) == (ratio > 1) for early, late in rounds)
        return agreeing < 0.75 * len(rounds)

    def to_dict(self) -> dict[str, Any]:
        """Both measurements, their ratios, the verdict and the units, ready for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "ratios": self.ratios,
            "verdict": self.verdict,
            "units": dict(_UNITS),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_dict` wrote.

        Raises:
            RecordMismatchError: `data` does not come from `to_dict`.
        """
        missing = [key for key in ("before", "after") if key not in data]
        if missing:
            raise RecordMismatchError(
                f"This is not a comparison that `to_dict` wrote: {' and '.join(missing)} missing."
            )
        return cls(
            Measurement.from_dict(data["before"]), after=Measurement.from_dict(data["after"])
        )

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The table, the verdict and the setting as Markdown."""
        lines = ["| | before | after | after / before |", "|---|---:|---:|---:|"]
        lines += [f"| {row.label} | {' | '.join(row.cells)} |" for row in self.rows()]
        return "\n".join([*lines, "", f"**{self.verdict}**", "", " ".join(self.notes()), ""])

    def figure(self, path: str | Path) -> None:
        """Write a bar figure of the ratios, with the values on it, as PNG.

        Raises:
            OSError: `path` cannot be written.
        """
        from pfsurgery.measure.figure import draw

        draw(self.rows(), self.ratios, self.verdict, str(self.after.latency.setting), Path(path))

    def rows(self) -> list[Row]:
        """One row a quantity, with its values before and after and their ratio."""
        return [
            Row(old.key, old.label, (*old.cells, *new.cells, _ratio_text(self.ratios.get(old.key))))
            for old, new in zip(_rows(self.before), _rows(self.after), strict=True)
        ]

    def notes(self) -> list[str]:
        """How it was measured and counted."""
        notes = _notes(self.before)
        for note in _notes(self.after):
            if note not in notes:
                notes.append(f"After: {note}")
        return notes

    def __rich__(self) -> Group:
        columns = ["before", "after", "after / before"]
        return rich_table(
            "Before and after surgery", columns, self.rows(), [self.verdict, *self.notes()]
        )

    def __str__(self) -> str:
        return text(self.__rich__())


def measure(
    model: nn.Module,
    example: Example | None = None,
    *,
    repeats: int = 20,
    warmup: int = 3,
    memory_format: MemoryFormat | None = None,
) -> Measurement:
    """Count, time and weigh one forward pass of a model.

    Args:
        model: The model; it is left as it was.
        example: A tensor (N, C, H, W) or a tuple of arguments; by default one image of the
            model's own input size.
        repeats: Timed forward passes, at least 2.
        warmup: Forward passes before them that are thrown away.
        memory_format: Layout in which a copy of the model is timed and weighed; by default the
            model is taken as it is.

    Raises:
        ShapeError: The model does not run on the example.
        SurgeryError: The model cannot be traced, or an option has a value that is impossible.
    """
    args = example_inputs(model, example)
    return _measure([model], args, repeats=repeats, warmup=warmup, memory_format=memory_format)[0]


def compare(
    before: nn.Module,
    after: nn.Module,
    example: Example | None = None,
    *,
    repeats: int = 20,
    warmup: int = 3,
    memory_format: MemoryFormat | None = None,
    optimized: bool = False,
) -> Comparison:
    """Measure two models on the same example, timing them in turns.

    Args:
        before: The model as it was.
        after: The converted model, on the same device.
        example: A tensor (N, C, H, W) or a tuple of arguments; by default one image of the
            input size of `before`.
        repeats: Timed forward passes of each, at least 2.
        warmup: Forward passes before them that are thrown away.
        memory_format: Layout in which copies of the models are timed and weighed; by default
            they are taken as they are.
        optimized: Measure what `optimize` makes of each, so that the comparison stays fair.

    Raises:
        ShapeError: A model does not run on the example.
        SurgeryError: A model cannot be traced, or an option has a value that is impossible.
    """
    args = example_inputs(before, example)
    models = [before, after]
    if optimized:
        from pfsurgery.optimize import optimize

        models = [optimize(m, args, memory_format=memory_format or "fastest") for m in models]
    return Comparison(
        *_measure(models, args, repeats=repeats, warmup=warmup, memory_format=memory_format)
    )


def _measure(
    models: list[nn.Module],
    args: tuple[Any, ...],
    *,
    repeats: int,
    warmup: int,
    memory_format: MemoryFormat | None,
) -> list[Measurement]:
    counts = [count(model, args) for model in models]
    laid_out = [in_format(model, args, memory_format) for model in models]
    _, args = laid_out[0]
    named = {str(index): model for index, (model, _) in enumerate(laid_out)}
    timed = latency(named, args, repeats=repeats, warmup=warmup)
    weighed = [peak_memory(model, args) for model in named.values()]
    return [Measurement(*all_) for all_ in zip(counts, timed.values(), weighed, strict=True)]


def _numbers(measurement: Measurement) -> dict[str, float]:
    return {
        "parameters": measurement.count.parameters,
        "macs": measurement.count.macs,
        "element_ops": measurement.count.element_ops,
        "activations": measurement.count.activations,
        "latency": measurement.latency.median_ms,
        "activation_memory": measurement.memory.activation_bytes,
        "parameter_memory": measurement.memory.parameter_bytes,
    }


def _rows(measurement: Measurement) -> list[Row]:
    number = _numbers(measurement)
    spread = f"{float(f'{measurement.latency.iqr_ms:.2g}'):g}"
    timed = f"{quantity(number['latency'], 'ms')} (IQR {spread})"
    return [
        Row("parameters", "Parameters", (quantity(number["parameters"], ""),)),
        Row("macs", "Multiply-adds", (quantity(number["macs"], "MACs"),)),
        Row("element_ops", "Element operations", (quantity(number["element_ops"], "ops"),)),
        Row("activations", "Activations", (quantity(number["activations"], ""),)),
        Row("latency", "Latency, median", (timed,)),
        Row(
            "activation_memory",
            "Peak activation memory",
            (quantity(number["activation_memory"], "bytes"),),
        ),
        Row(
            "parameter_memory",
            "Parameter memory",
            (quantity(number["parameter_memory"], "bytes"),),
        ),
    ]


def _ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    change = f"{ratio - 1:+.0%}"
    return f"{ratio:.3f}" if change in ("+0%", "-0%") else f"{ratio:.3f} ({change})"


def _notes(measurement: Measurement) -> list[str]:
    timing = measurement.latency
    notes = [
        f"Measured on {timing.setting}; {len(timing.times_ms)} rounds, IQR: interquartile range.",
        _CONVENTIONS,
    ]
    uncounted = measurement.count.uncounted
    if uncounted:
        shown = ", ".join(f"{name} ({calls}x)" for name, calls in uncounted.items())
        notes.append(f"Not counted: {shown}.")
    return notes
