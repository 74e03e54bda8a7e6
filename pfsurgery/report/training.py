"""Training curves from the logs of a fine-tuning."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from pfsurgery.recover.logs import EPOCHS, LOG, read_lines
from pfsurgery.report.figures import Axis, Points, chart
from pfsurgery.report.page import Figure, Note, Section, Table
from pfsurgery.report.palette import GREY
from pfsurgery.report.read import understood

_TOP1, _LOSS, _RATE = "#2a7f8e", "#c8552f", "#b07a1e"


def training_records(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, or what its table of epochs says where there is no log; empty without.

    Raises:
        SurgeryError: A file is damaged.
    """
    if (folder / LOG).exists():
        return read_lines(folder / LOG)
    if not (folder / EPOCHS).exists():
        return []
    with understood(folder / EPOCHS), (folder / EPOCHS).open(encoding="utf-8") as file:
        return [
            {
                "kind": "epoch",
                "epoch": int(row["epoch"]),
                "step": int(row["step"]),
                "loss": float(row["loss"]),
                "lr": float(row["lr"]),
                "images_per_s": float(row["images_per_s"]),
                "val": {
                    "top1": float(row["top1"]),
                    "top5": float(row["top5"]),
                    "loss": float(row["val_loss"]),
                }
                if row["top1"]
                else None,
            }
            for row in csv.DictReader(file)
        ]


def training_sections(records: list[dict[str, Any]]) -> tuple[Section, ...]:
    """Accuracy, loss and learning rate against steps, and the settings; nothing without records."""
    epochs = [r for r in records if r["kind"] == "epoch"]
    windows = [r for r in records if r["kind"] == "step"] or epochs
    if not windows:
        return ()
    sections = [Section("Training", (_curves(records, epochs, windows), *_events(records)))]
    start = next((r for r in records if r["kind"] == "start"), None)
    if start is not None:
        rows = tuple((name, str(value)) for name, value in start["config"].items())
        table = Table("Settings of the fine-tuning.", ("setting", "value"), "ct", rows)
        sections.append(Section("Settings", (table,)))
    return tuple(sections)


def _curves(
    records: list[dict[str, Any]], epochs: list[dict[str, Any]], windows: list[dict[str, Any]]
) -> Figure:
    measured = [r for r in epochs if r["val"] is not None]
    teacher = next((r["val"]["top1"] for r in records if r["kind"] == "teacher"), None)
    curves, axes = [], []
    if measured:
        hover = [
            [f"epoch {r['epoch']}", f"step {r['step']:,}", f"top-1 {r['val']['top1']:.2f} %"]
            for r in measured
        ]
        steps = [r["step"] for r in measured]
        top1 = [r["val"]["top1"] for r in measured]
        curves.append(Points("converted", steps, top1, hover, _TOP1, size=7, line=2))
        if teacher is not None:
            ends = [0, max(r["step"] for r in windows)]
            curves.append(_limit("original", ends, [teacher, teacher], f"{teacher:.2f} %"))
        axes.append(Axis("top-1 (%)", share=1.6))
        validation = [r["val"]["loss"] for r in measured]
        hover = [[f"epoch {r['epoch']}", f"loss {r['val']['loss']:.4f} nats"] for r in measured]
        row = len(axes)
        curves.append(Points("validation loss", steps, validation, hover, GREY, line=2, row=row))
    row = len(axes)
    steps = [r["step"] for r in windows]
    hover = [
        [f"step {r['step']:,}", f"loss {r['loss']:.4f} nats", f"{r['images_per_s']:.0f} images/s"]
        for r in windows
    ]
    losses = [_finite(r["loss"]) for r in windows]
    curves.append(Points("training loss", steps, losses, hover, _LOSS, size=4, line=2, row=row))
    hover = [[f"step {r['step']:,}", f"learning rate {r['lr']:.3g}"] for r in windows]
    rates = [r["lr"] for r in windows]
    curves.append(Points("learning rate", steps, rates, hover, _RATE, size=4, line=2, row=row + 1))
    axes += [Axis("loss (nats)"), Axis("learning rate", ticks="~g", zero=True, share=0.6)]
    return Figure(
        "Accuracy on the validation images after each epoch, loss and learning rate. The training "
        "loss includes the distance to the original, and is not that on the validation images.",
        chart(curves, Axis("steps of the optimiser"), *axes, height=190 * len(axes)),
    )


def _limit(name: str, x: list[float], y: list[float], shown: str) -> Points:
    return Points(name, x, y, [[name, shown]] * len(x), GREY, size=0, line=2, dash="dash")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _events(records: list[dict[str, Any]]) -> list[Note]:
    """What went wrong on the way."""
    notes = [
        Note(f"The run diverged at step {r['step']:,}: {r['reason']}.", warning=True)
        for r in records
        if r["kind"] == "diverged"
    ]
    notes += [
        Note(f"It went back to step {r['step']:,}, with {r['lr_factor']:g} times the rate.")
        for r in records
        if r["kind"] == "rolled back"
    ]
    if not any(r["kind"] == "end" for r in records) and any(r["kind"] == "start" for r in records):
        notes.append(Note("The log has no end: the run was cut off, or is going on.", warning=True))
    return notes
