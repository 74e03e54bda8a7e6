"""The model card: README.md with front matter, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfsurgery.checkpoint import CONFIG
from pfsurgery.files import write_text

if TYPE_CHECKING:
    from pfsurgery.job import Report

CARD = "README.md"


def write_card(directory: Path, report: Report) -> Path:
    """Write the card of a model that `save` wrote to `directory`, from the report of its making.

    Raises:
        SurgeryError: It cannot be written.
    """
    import yaml

    base = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["pfsurgery"]["base"]
    front = yaml.safe_dump(_front_matter(base, report), sort_keys=False)
    path = directory / CARD
    write_text(path, f"---\n{front}---\n\n{_text(base, report)}")
    return path


def _front_matter(base: dict[str, Any] | None, report: Report) -> dict[str, Any]:
    accuracy = report.steps[-1].accuracy
    metrics = [
        {"type": "accuracy", "name": "top-1 (%)", "value": accuracy.top1},
        {"type": "accuracy", "name": "top-5 (%)", "value": accuracy.top5},
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": f"{accuracy.images} validation images", "type": "image-folder"},
        "metrics": metrics,
    }
    name = base["name"] if base else "model"
    return {
        "library_name": "pfsurgery",
        "pipeline_tag": "image-classification",
        "tags": ["pfsurgery", *([base["library"]] if base else []), "image-classification"],
        "model-index": [{"name": f"{name} ({report.plan.policy})", "results": [result]}],
    }


def _text(base: dict[str, Any] | None, report: Report) -> str:
    first, last = report.steps[0].accuracy, report.steps[-1].accuracy
    name = f"{base['library']}'s `{base['name']}`" if base else "a model"
    replaced = len(report.plan.replaced)
    argument = "" if base else ", base=make_my_model"
    return (
        f"# {base['name'] if base else 'Model'} with parameter-free operations\n\n"
        f"Converted from {name} by the policy `{report.plan.policy}`: {replaced} of "
        f"{len(report.plan)} convolutions were replaced. Top-1 is {last.top1:.2f} % on "
        f"{last.images} validation images; the original has {first.top1:.2f} %.\n\n"
        f"```python\nimport pfsurgery\n\n"
        f'model = pfsurgery.load("hf-hub:USER/NAME"{argument})  # or the path of this folder\n'
        f"logits = model(images)\n```\n\n"
        f"{report.to_markdown()}"
    )
