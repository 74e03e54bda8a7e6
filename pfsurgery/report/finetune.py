"""The page of a fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfsurgery.measure import Comparison
from pfsurgery.measure.figure import ratio_color
from pfsurgery.plan import Plan
from pfsurgery.recover.logs import EPOCHS, LOG
from pfsurgery.report.figures import Axis, Points, chart, lying_bars
from pfsurgery.report.numbers import NOTHING, percent, points, share
from pfsurgery.report.page import Content, Figure, Item, Note, Section, Table
from pfsurgery.report.palette import MODELS
from pfsurgery.report.plan import plan_sections
from pfsurgery.report.read import understood
from pfsurgery.report.training import training_records, training_sections
from pfsurgery.run_folder import read_json

REPORT = "report.json"


def content(folder: Path) -> Content:
    """What is told of a fine-tuning; of one without `report.json`, what its log says.

    Raises:
        SurgeryError: A file is missing or damaged.
    """
    records = training_records(folder)
    with understood(folder / (LOG if (folder / LOG).exists() else EPOCHS)):
        training = training_sections(records)
        logged = _from_log(records)
    if records and not (folder / REPORT).exists():
        return Content(*logged, training)
    values = read_json(folder / REPORT)
    with understood(folder / REPORT):
        return _content(values, training)


def _content(values: dict[str, Any], training: tuple[Section, ...]) -> Content:
    comparison = Comparison.from_dict(values["comparison"])
    plan = Plan.from_dict(values["plan"])
    steps = values["steps"]
    before, after = steps[0]["accuracy"]["top1"], steps[-1]["accuracy"]["top1"]
    ratios = comparison.ratios
    facts = (
        ("top-1", percent(after)),
        ("against the original", points(after, before)),
        ("MACs left", share(ratios.get("macs", 1), 1)),
        ("parameters left", share(ratios.get("parameters", 1), 1)),
        ("time left", share(ratios["latency"], 1)),
    )
    lede = (
        f"Policy {values['policy']} changed {len(plan.replaced)} of {len(plan)} sites. "
        f"{comparison.verdict}"
    )
    sections = (
        Section("What was saved", _saved(comparison)),
        Section("Accuracy", _accuracy(steps, values["given_back"])),
        *training[:1],
        *plan_sections(plan),
        *training[1:],
    )
    return Content(lede, facts, sections)


def _saved(comparison: Comparison) -> tuple[Item, ...]:
    rows = comparison.rows()
    table = Table(
        comparison.verdict,
        ("", "before", "after", "after / before"),
        "lrrr",
        tuple((row.label, *row.cells) for row in rows),
    )
    shown = [row for row in rows if row.key in comparison.ratios]
    ratios = [comparison.ratios[row.key] for row in shown]
    groups = [
        Points(
            "",
            [100 * ratio for ratio in ratios],
            [],
            [[row.label, f"{row.cells[0]} before", f"{row.cells[1]} after"] for row in shown],
            [ratio_color(ratio) for ratio in ratios],
        )
    ]
    figure = lying_bars(
        [row.label for row in shown],
        groups,
        Axis("after / before (%)", zero=True),
        Axis("quantity"),
    )
    return (
        table,
        Figure("What is left of each quantity; 100 % is unchanged.", figure),
        *(Note(note) for note in comparison.notes()),
    )


def _accuracy(steps: list[dict[str, Any]], given_back: list[str]) -> tuple[Item, ...]:
    top1 = [step["accuracy"]["top1"] for step in steps]
    names = [step["name"] for step in steps]
    curve = Points(
        "", names, top1, [[n, percent(t)] for n, t in zip(names, top1, strict=True)],
        MODELS[0], line=2,
    )  # fmt: skip
    table = Table(
        f"On {steps[0]['accuracy']['images']:,} validation images.",
        ("step", "top-1", "against the original", "top-5", "loss", "seconds"),
        "lrrrrr",
        tuple(
            (
                step["name"],
                percent(step["accuracy"]["top1"]),
                points(step["accuracy"]["top1"], top1[0]) if place else NOTHING,
                percent(step["accuracy"]["top5"]),
                f"{step['accuracy']['loss']:.3f} nats",
                f"{step['seconds']:.1f} s",
            )
            for place, step in enumerate(steps)
        ),
    )
    figure = Figure(
        "Top-1 after each step of the job.",
        chart([curve], Axis("step of the job"), Axis("top-1 (%)", zero=True), height=320),
    )
    notes = [Note(f"Given back to keep the accuracy: {', '.join(given_back)}.")]
    return (table, figure, *(notes if given_back else []))


def _from_log(records: list[dict[str, Any]]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Lede and facts of a run that left nothing but its log."""
    epochs = [r for r in records if r["kind"] == "epoch"]
    top1 = [r["val"]["top1"] for r in epochs if r["val"] is not None]
    teacher = next((r["val"]["top1"] for r in records if r["kind"] == "teacher"), None)
    last = records[-1]["step"] if records and "step" in records[-1] else 0
    facts = [("epochs", str(len(epochs))), ("steps", f"{last:,}")]
    if top1:
        facts.insert(0, ("top-1, best epoch", percent(max(top1))))
        facts.append(("against the original", points(max(top1), teacher)))
    return "This folder has the log of a fine-tuning, and no report of a whole job.", tuple(facts)
