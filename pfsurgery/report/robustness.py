"""The page of a robustness study."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from pfsurgery.errors import SurgeryError
from pfsurgery.report.figures import Axis, Points, chart, lying_bars
from pfsurgery.report.numbers import percent, points
from pfsurgery.report.page import Content, Figure, Item, Note, Picture, Section, Table
from pfsurgery.report.palette import MODELS
from pfsurgery.report.read import understood
from pfsurgery.report.settings import settings_section
from pfsurgery.run_folder import read_json
from pfsurgery.study.robustness import RESULT

Results = list[dict[str, Any]]
_PNG = b"\x89PNG\r\n\x1a\n"
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up")


def content(folder: Path) -> Content:
    """What is told of a robustness study.

    Raises:
        SurgeryError: A file is missing or damaged.
    """
    values = read_json(folder / RESULT)
    with understood(folder / RESULT):
        return _content(values, folder)


def _content(values: dict[str, Any], folder: Path) -> Content:
    models = tuple(values["models"])
    before, after = models
    corruptions, attacks = values["corruptions"], values["attacks"]
    facts = [("top-1, clean", _two(values["clean"], models))]
    sections = [Section("Clean images", (_clean(values["clean"], models),))]
    if corruptions:
        means = {m: mean(r["top1"][m] for r in corruptions) for m in models}
        facts.append(("top-1, corrupted", _two(means, models)))
        sections.append(Section("Corruptions", _corruptions(corruptions, models)))
    if attacks:
        sections.append(Section("Attacks", _attacks(attacks, values["clean"], models)))
    if values["gradcam"] is not None:
        sections.append(Section("Where they look", (_gradcam(folder, values["gradcam"]),)))
    sections.append(settings_section(values["setting"]))
    lede = f"{before} and {after} on clean, corrupted and attacked images; {before} comes first."
    return Content(lede, tuple(facts), tuple(sections))


def _two(top1: dict[str, float], models: tuple[str, ...]) -> str:
    return " → ".join(percent(top1[model]) for model in models)


def _clean(clean: dict[str, float], models: tuple[str, ...]) -> Table:
    change = points(clean[models[1]], clean[models[0]])
    rows = ((*(percent(clean[model]) for model in models), change),)
    return Table("Top-1 on the images as they are.", (*models, "difference"), "rrr", rows)


def _corruptions(results: Results, models: tuple[str, ...]) -> tuple[Item, ...]:
    names = list(dict.fromkeys(r["name"] for r in results))
    severities = sorted({r["severity"] for r in results})
    by_name, by_severity = [], []
    for place, (model, color) in enumerate(zip(models, MODELS, strict=True)):
        top1 = [mean(r["top1"][model] for r in results if r["name"] == name) for name in names]
        hover = [[name, f"{model}: {percent(v)}"] for name, v in zip(names, top1, strict=True)]
        by_name.append(Points(model, top1, [], hover, color))
        top1 = [mean(r["top1"][model] for r in results if r["severity"] == s) for s in severities]
        hover = [
            [f"severity {s}", f"{model}: {percent(v)}"]
            for s, v in zip(severities, top1, strict=True)
        ]
        looks: Any = {"line": 2, "dash": _DASHES[place], "symbol": _SYMBOLS[place]}
        by_severity.append(Points(model, severities, top1, hover, color, **looks))
    first = lying_bars(
        names, by_name, Axis("top-1 (%)", zero=True), Axis("corruption"), row_height=15
    )
    second = chart(
        by_severity, Axis("severity (1: weak, 5: strong)"), Axis("top-1 (%)", zero=True), height=340
    )
    second.update_xaxes(dtick=1)
    table = Table(
        "Top-1 of each corruption and severity.",
        ("corruption", "severity", *models, "difference"),
        "lrrrr",
        tuple(
            (
                r["name"],
                str(r["severity"]),
                *(percent(r["top1"][model]) for model in models),
                points(r["top1"][models[1]], r["top1"][models[0]]),
            )
            for r in results
        ),
    )
    return (
        Figure("Top-1 on corrupted images, the mean over severities.", first),
        Figure("Top-1 by severity, the mean over corruptions.", second),
        table,
    )


def _attacks(
    results: Results, clean: dict[str, float], models: tuple[str, ...]
) -> tuple[Item, ...]:
    names = list(dict.fromkeys(r["name"] for r in results))
    curves = []
    for model, color in zip(models, MODELS, strict=True):
        for place, name in enumerate(names):
            own = sorted((r for r in results if r["name"] == name), key=lambda r: r["epsilon"])
            found = [(0.0, clean[model]), *((r["epsilon"], r["top1"][model]) for r in own)]
            hover = [
                [f"{name} on {model}", f"epsilon {e:g}/255", f"top-1 {percent(v)}"]
                for e, v in found
            ]
            looks: Any = {
                "line": 2,
                "dash": _DASHES[place % len(_DASHES)],
                "symbol": _SYMBOLS[place % len(_SYMBOLS)],
            }
            x, y = zip(*found, strict=True)
            curves.append(Points(f"{model}, {name}", x, y, hover, color, **looks))
    plot = chart(
        curves, Axis("epsilon (1/255 of a pixel's range)"),
        Axis("top-1 (%)", zero=True),
    )  # fmt: skip
    table = Table(
        "Top-1 under each attack.",
        ("attack", "epsilon", *models, "difference"),
        "lrrrr",
        tuple(
            (
                r["name"],
                f"{r['epsilon']:g}/255",
                *(percent(r["top1"][model]) for model in models),
                points(r["top1"][models[1]], r["top1"][models[0]]),
            )
            for r in results
        ),
    )
    return Figure("Top-1 under attack; epsilon 0 are the clean images.", plot), table


def _gradcam(folder: Path, name: str) -> Item:
    """The picture, from the run folder and nowhere else."""
    path = folder / Path(name).name
    if not path.is_file():
        return Note(f"The picture {path.name} is no longer in the run folder.", warning=True)
    png = path.read_bytes()
    if not png.startswith(_PNG):
        raise SurgeryError(f"{path} is not a PNG image. Do the run again.")
    return Picture("Grad-CAM: what in the images speaks for the class, in both models.", png)
