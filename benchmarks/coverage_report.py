"""The coverage sweep as a result file and as docs/coverage.md."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision: classification, segmentation, detection",
    "transformers": "Hugging Face transformers: vision models from their default configurations",
}
Row = dict[str, Any]


def write_report(rows: list[Row], missing: int, machine: dict[str, Any]) -> None:
    """Write both files.

    Args:
        rows: What the sweep found, one a model.
        missing: How many models of the catalogue have not been run.
        machine: What it ran on, with which versions.
    """
    rows = sorted(rows, key=lambda row: row["model"])
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"machine": machine, "not_run": missing})
    RESULT.write_text(f'{head[:-1]}, "models": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text("\n".join(_page(rows, missing, machine)) + "\n", encoding="utf-8")


def _page(rows: list[Row], missing: int, machine: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    seconds = sum(row["cpu_seconds"] for row in rows)
    peak = max(row["peak_gib"] for row in rows)
    lines = [
        "# Which models work",
        "",
        "Written by `python benchmarks/coverage.py`, which converts all models of three libraries:",
        "all of timm, torchvision's classification, segmentation and detection models, and the",
        "vision models of transformers. Models are built without weights and run on one image of",
        "their own size; the number of sites is checked against a count of the convolutions that",
        "PyTorch's dispatcher sees, before and after. Each model's line is in",
        "`benchmarks/results/coverage.json`.",
        "",
        f"{versions}; {len(rows)} models, {seconds / 60:.0f} minutes of processor time in all,",
        f"one thread each ({machine['processor']}), {peak:.1f} GiB at most.",
    ]
    if missing:
        lines += ["", f"**Incomplete: {missing} models of the catalogue have not been run.**"]
    for library, title in LIBRARIES.items():
        part = [row for row in rows if row["model"].startswith(f"{library}/")]
        if part:
            lines += ["", f"## {title}", "", *_library(part)]
    lines += ["", "## Why sites are kept", "", *_reasons(rows)]
    lines += ["", "## Families", "", *_families(rows), "", "## Exceptions", "", *_exceptions(rows)]
    return lines


def _spatial(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.get("sites")]


def _library(rows: list[Row]) -> list[str]:
    spatial = _spatial(rows)
    sites = sum(row["sites"] for row in spatial)
    plain = sum(row["plain"] for row in spatial)
    converted = {
        policy: sum(row[policy]["converted"] for row in spatial)
        for policy in ("maxpool_all", "maxpool_deep")
    }
    plain_converted = sum(row["maxpool_all"]["plain"] for row in spatial)
    facts = {
        "models": len(rows),
        "of these with spatial convolutions": len(spatial),
        "models that raise an error": sum("error" in row for row in rows),
        "models where a count or an output's shape is off": sum("problems" in row for row in rows),
        "models that cannot be built here": sum("skipped" in row for row in rows),
        "sites": sites,
        "converted by `maxpool_all`": converted["maxpool_all"],
        "converted by `maxpool_deep`": converted["maxpool_deep"],
        "sites of stride 1 that keep their channels": plain,
        "converted of these by `maxpool_all`": f"{plain_converted} "
        f"({100 * plain_converted / max(plain, 1):.2f} %)",
    }
    return ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in facts.items())]


# What a reason says, without the names in it.
_NAMES = (
    (r"inside [\w.]+", "inside a module"),
    (r"in the code of [\w.]+", "in the code of a module"),
    (r"the filters of [\w.]+", "the filters of a module"),
    (r"by the code of [\w.]+", "by the code of another module"),
    (r"is shared with [\w.]+", "is shared with another module"),
    (r"^[\w.]+ is a subclass", "a class that is a subclass"),
    (r"padding \d+ around a kernel that spans \d+ pixels", "padding around a kernel"),
)


def _general(reason: str) -> str:
    for pattern, replacement in _NAMES:
        reason = re.sub(pattern, replacement, reason)
    return reason


def _reasons(rows: list[Row]) -> list[str]:
    sites, models, examples = Counter[str](), Counter[str](), {}
    for row in _spatial(rows):
        found = Counter[str]()
        for reason, count in row["maxpool_all"]["kept"].items():
            found[_general(reason)] += count
        sites.update(found)
        models.update(dict.fromkeys(found, 1))
        for reason in found:
            examples.setdefault(reason, row["model"])
    lines = [
        "Under `maxpool_all`:",
        "",
        "| sites | models | reason | for example |",
        "|---:|---:|---|---|",
    ]
    return lines + [
        f"| {count} | {models[reason]} | {reason} | `{examples[reason]}` |"
        for reason, count in sites.most_common()
    ]


def _families(rows: list[Row]) -> list[str]:
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in _spatial(rows):
        grouped[row["family"]].append(row)
    lines = [
        "| family | models | sites | `maxpool_all` | with a 1x1 behind | `maxpool_deep` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, part in sorted(grouped.items()):
        counts = [
            len(part),
            sum(row["sites"] for row in part),
            sum(row["maxpool_all"]["converted"] for row in part),
            sum(row["maxpool_all"]["pointwise"] for row in part),
            sum(row["maxpool_deep"]["converted"] for row in part),
        ]
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return lines


def _exceptions(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        for kind in ("error", "problems", "skipped"):
            if kind in row:
                said = row[kind] if isinstance(row[kind], str) else "; ".join(row[kind])
                lines.append(f"- `{row['model']}`: {said.strip().splitlines()[-1]}")
    return lines or ["None."]
