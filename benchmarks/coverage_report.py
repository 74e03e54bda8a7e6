"""The coverage sweep as a result file and as docs/coverage.md."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from coverage_reasons import REASONS, reason_of

RESULT = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision: classification, segmentation, detection",
    "transformers": "Hugging Face transformers: vision models from their default configurations",
}
LEAST = 0.97
TROUBLE = {"error", "problems", "skipped"}
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
    minutes, clock = (sum(row[k] for row in rows) / 60 for k in ("cpu_seconds", "seconds"))
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
        f"{versions}; {len(rows)} models, one thread each ({machine['processor']}):",
        f"{minutes:.0f} minutes of processor time in all, {clock:.0f} by the clock, added over the",
        f"models, which processes share; {peak:.1f} GiB at most in one process.",
    ]
    if missing:
        lines += ["", f"**Incomplete: {missing} models of the catalogue have not been run.**"]
    for library, title in LIBRARIES.items():
        part = [row for row in rows if row["model"].startswith(f"{library}/")]
        if part:
            lines += ["", f"## {title}", "", *_library(part)]
    lines += ["", "## Why sites are kept", "", *_reasons(rows)]
    parts = {
        "Sites kept for a reason of their own": _unusual(rows),
        "Convolutions that feed an output": _outputs(rows),
        "Models that keep more than most": _short_of(rows),
        "Gradients": _real(rows),
        "Families": _families(rows),
        "Exceptions": _exceptions(rows),
    }
    for title, part in parts.items():
        lines += ["", f"## {title}", "", *part]
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


def _general(reason: str) -> str:
    known = reason_of(reason)
    return known.said if known else reason


def _reasons(rows: list[Row]) -> list[str]:
    sites, models, examples = Counter[str](), Counter[str](), {}
    for row in _spatial(rows):
        found = Counter[str]()
        for reason, count in row["maxpool_all"]["kept"].items():
            found[_general(reason)] += count
            named = f"`{row['model']}`, {row['kept_sites'][reason][0]}"
            examples.setdefault(_general(reason), named)
        sites.update(found)
        models.update(dict.fromkeys(found, 1))
    holds = {reason.said: reason.holds for reason in REASONS}
    lines = [
        f"Under `maxpool_all`. The list of reasons is closed ({len(REASONS)} in",
        "`benchmarks/coverage_reasons.py`, of which those that occur are below): one that is not",
        "in it would stand among the exceptions, and fails a test.",
        "",
        "| sites | models | reason | what is so at such a site | for example |",
        "|---:|---:|---|---|---|",
    ]
    return lines + [
        f"| {count} | {models[reason]} | {reason} | {holds.get(reason, 'unknown')} "
        f"| {examples[reason]} |"
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
                lines.append(f"- `{row['model']}`: {_said(row[kind])}")
        for reason in row.get("maxpool_all", {}).get("kept", {}):
            if reason_of(reason) is None:
                lines.append(f"- `{row['model']}`: a reason in no list: {reason}")
    return lines or ["None."]


def _said(trouble: str | list[str]) -> str:
    said = trouble if isinstance(trouble, str) else "; ".join(trouble)
    return said.strip().splitlines()[-1]


def _short_of(rows: list[Row]) -> list[str]:
    """Models that keep more than 3 % of their sites of stride 1 that keep their channels."""
    lines = [
        f"Models of which less than {LEAST:.0%} of the sites of stride 1 that keep their channels",
        "are converted by `maxpool_all`, and for what the others are kept:",
        "",
        "| model | converted | kept |",
        "|---|---:|---|",
    ]
    for row in _spatial(rows):
        if row["plain"] and row["maxpool_all"]["plain"] < LEAST * row["plain"]:
            why = [f"{n} x {_general(reason)}" for reason, n in row["plain_kept"].items()]
            converted = f"{row['maxpool_all']['plain']} of {row['plain']}"
            lines.append(f"| `{row['model']}` | {converted} | {'; '.join(why)} |")
    return lines


def _unusual(rows: list[Row]) -> list[str]:
    """Families with sites that are kept for something else than being a stem or an output."""
    found: dict[tuple[str, str], list[tuple[str, list[str]]]] = defaultdict(list)
    for row in _spatial(rows):
        for reason, sites in row["kept_sites"].items():
            known = reason_of(reason)
            if known is None or not known.usual:
                found[row["family"], reason].append((row["model"], sites))
    lines = ["| family | models | reason | sites, in the first of them |", "|---|---:|---|---|"]
    for (name, reason), models in sorted(found.items()):
        first, sites = models[0]
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        lines.append(f"| {name} | {len(models)} | {reason} | `{first}`: {sites[0]}{more} |")
    return lines


def _outputs(rows: list[Row]) -> list[str]:
    lines = ["| model | sites |", "|---|---|"]
    for row in _spatial(rows):
        sites = [
            site
            for reason, named in row["kept_sites"].items()
            if reason == "it feeds the model's output"
            for site in named
        ]
        if sites:
            lines.append(f"| `{row['model']}` | {'; '.join(sites)} |")
    return lines


def _real(rows: list[Row]) -> list[str]:
    run = [row for row in rows if "real" in row]
    good = [row for row in run if not TROUBLE & set(row["real"])]
    training = sum(row["real"]["training"] for row in good)
    seconds = sum(row["real"]["cpu_seconds"] for row in run)
    converted = {row["family"] for row in _spatial(rows) if row["maxpool_all"]["converted"]}
    lines = [
        "Of each family, the smallest model of which `maxpool_all` converts something is built",
        "with random weights, and runs forwards and backwards on the CPU, on small images where it",
        "takes them: each parameter that has a gradient in the original has a finite one",
        "afterwards.",
        "",
        f"{len(run)} of {len(converted)} such families were run, {len(good)} of them without a",
        f"fault, {training} of these in training mode (the others, detectors above all, need",
        f"labels there, and run in eval mode); {seconds / 60:.0f} minutes of processor time.",
    ]
    bad = [
        f"- `{row['model']}`: {_said(row['real'][kind])}"
        for row in run
        for kind in sorted(TROUBLE & set(row["real"]))
    ]
    if any("roi_heads" in line for line in bad):
        bad += [
            "",
            "Heads for masks and keypoints run on the boxes that were found; with random weights a",
            "detector may find none, and these heads have no gradient then. With labels there are",
            "boxes, and every parameter of both has its gradient (tests/test_detection.py).",
        ]
    return lines + (["", *bad] if bad else [])
