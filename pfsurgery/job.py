"""The main job: convert a model, win its accuracy back, and report what was saved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pfsurgery.batches import unlabelled_images
from pfsurgery.checkpoint import save
from pfsurgery.convert import convert
from pfsurgery.errors import SurgeryError
from pfsurgery.measure import Comparison, compare
from pfsurgery.plan import Plan
from pfsurgery.record import record
from pfsurgery.recover import Accuracy, FinetuneConfig, evaluate, finetune, recalibrate

if TYPE_CHECKING:
    from rich.table import Table

MODEL_FOLDER = "model"
_CALIBRATION_IMAGES = 2000

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the job.

    Attributes:
        name: What was done.
        accuracy: On the validation images, after it.
        seconds: Wall-clock time that it took, the evaluation not included.
    """

    name: str
    accuracy: Accuracy
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What came of the job.

    Attributes:
        plan: What each site became.
        steps: Original, after surgery, after each recovery.
        comparison: Original and result, measured side by side.
    """

    plan: Plan
    steps: tuple[Step, ...]
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "policy": self.plan.policy,
            "steps": [asdict(step) for step in self.steps],
            "comparison": self.comparison.to_dict(),
            "plan": self.plan.to_dict(),
        }

    def to_markdown(self) -> str:
        """Steps, comparison and what was replaced, as Markdown."""
        lines = ["# What was saved", "", self.comparison.to_markdown(), "", "# Accuracy", ""]
        lines += ["| step | top-1 | seconds |", "|---|---:|---:|"]
        lines += [f"| {s.name} | {s.accuracy.top1:.2f} % | {s.seconds:.1f} |" for s in self.steps]
        lines += [
            "",
            f"# Sites (policy {self.plan.policy})",
            "",
            "| site | was | became | reason |",
        ]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| `{d.site.name}` | {d.site.kind} {d.site.geometry} | {d.label} | {d.reason} |"
            for d in self.plan
        ]
        return "\n".join(lines) + "\n"

    def __rich__(self) -> Table:
        """Accuracy after each step."""
        from pfsurgery.tables import step_table

        return step_table(self.steps)


def run_job(
    original: nn.Module,
    plan: Plan,
    *,
    train: Any,
    val: Any,
    out: str | Path,
    config: FinetuneConfig | None = None,
    tell: Tell = lambda line: None,
) -> tuple[nn.Module, Report]:
    """Convert `original` by `plan`, recover it, and write model and report to `out`.

    Norm statistics are re-estimated on up to 2,000 training images, then the model is fine-tuned
    with the original as its teacher; the best weights on `val` are kept. `out` receives `model/`
    (see `save`), `report.md`, `report.json`, `plan.json`, `comparison.png`, the training log and
    the best checkpoint.

    Args:
        original: The trained model; it is left as it was.
        plan: What its sites become.
        train: Training images, as `finetune` takes them.
        val: Validation images with labels.
        out: Folder, made if it is missing.
        config: Settings of the fine-tuning.
        tell: Called with a line of text as each step begins.

    Returns:
        The converted, recovered model and the report.

    Raises:
        SurgeryError: `out` cannot be written, or a step fails; the message says what to do.
    """
    folder = writable(out)
    steps = []

    def step(name: str, work: Callable[[], Any], model: nn.Module) -> Any:
        tell(name)
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        steps.append(Step(name, evaluate(model if result is None else result, val), seconds))
        return result

    step("original", lambda: original, original)
    fast = step("after surgery", lambda: convert(original, plan), original)
    step("norms re-estimated", lambda: _recalibrate(fast, train), fast)
    step("fine-tuned", lambda: _finetune(fast, original, train, val, config, folder), fast)
    tell("measuring")
    fast.eval()
    original.eval()
    report = Report(record(fast).plans[-1], tuple(steps), compare(original, fast))
    _write(folder, fast, report)
    return fast, report


def writable(out: str | Path) -> Path:
    """The folder `out`, made if it is missing; a SurgeryError where it cannot be written."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SurgeryError(f"{folder} cannot be written: {error.strerror}.") from None
    return folder


def _recalibrate(model: nn.Module, train: Any) -> None:
    recalibrate(model, first_images(unlabelled_images(train, model), _CALIBRATION_IMAGES))


def first_images(batches: Iterable[Tensor], images: int) -> list[Tensor]:
    """The first batches that hold about so many images."""
    kept: list[Tensor] = []
    for batch in islice(batches, images):
        kept.append(batch)
        if sum(len(b) for b in kept) >= images:
            break
    return kept


def _finetune(
    model: nn.Module,
    teacher: nn.Module,
    train: Any,
    val: Any,
    config: FinetuneConfig | None,
    folder: Path,
) -> None:
    from safetensors.torch import load_file

    result = finetune(model, train=train, val=val, teacher=teacher, config=config, out=folder)
    if result.weights is not None:
        model.load_state_dict(load_file(result.weights))


def _write(folder: Path, model: nn.Module, report: Report) -> None:
    save(model, folder / MODEL_FOLDER)
    (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    (folder / "plan.json").write_text(report.plan.to_json(), encoding="utf-8")
    report.comparison.figure(folder / "comparison.png")
