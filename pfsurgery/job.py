"""The main job: convert a model, win its accuracy back, and report what was saved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pfsurgery.batches import unlabelled_images
from pfsurgery.checkpoint import save
from pfsurgery.convert import convert
from pfsurgery.errors import SurgeryError
from pfsurgery.measure import Comparison, compare
from pfsurgery.plan import Plan
from pfsurgery.policy import DataPolicy, Tell
from pfsurgery.record import record
from pfsurgery.recover import (
    Accuracy,
    FinetuneConfig,
    evaluate,
    finetune,
    recalibrate,
    reconstruct,
)
from pfsurgery.recover.finetune import check_optimizer
from pfsurgery.select import Patterns

if TYPE_CHECKING:
    from rich.table import Table

MODEL_FOLDER = "model"
_CALIBRATION_IMAGES = 1000
_MOST_BYTES = 400_000_000


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
    policy: Plan | DataPolicy,
    *,
    train: Any,
    val: Any,
    out: str | Path,
    config: FinetuneConfig | None = None,
    tell: Tell = lambda line: None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Report]:
    """Convert `original`, recover it, and write model and report to `out`.

    Up to 1,000 training images, without their labels, serve to re-estimate norm statistics and to
    refit layers in closed form (`reconstruct`; a budget is fitted to them from the start). Then the
    model is fine-tuned with the original as its teacher; the best weights on `val` are kept. `out`
    receives `model/` (see `save`), `report.md`, `report.json`, `plan.json`, `comparison.png`, the
    training log and the best checkpoint.

    Args:
        original: The trained model; it is left as it was.
        policy: What its sites become: a plan, or a budget that is fitted to images.
        train: Training images, as `finetune` takes them.
        val: Validation images with labels.
        out: Folder, made if it is missing.
        config: Settings of the fine-tuning.
        tell: Called with a line of text as each step begins.
        include: With a budget: patterns of the sites that may change; a plan knows.
        exclude: With a budget: patterns of sites that are kept.

    Returns:
        The converted, recovered model and the report.

    Raises:
        SurgeryError: `out` cannot be written, or a step fails; the message says what to do.
    """
    folder = writable(out)
    config = config or FinetuneConfig()
    check_optimizer(config)
    steps = []

    def step(name: str, work: Callable[[], Any], model: nn.Module) -> Any:
        """Do one step; `work` returns the model where it makes a new one."""
        tell(name)
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        steps.append(Step(name, evaluate(model if result is None else result, val), seconds))
        return result

    step("original", lambda: original, original)
    fast, example = _surgery(original, policy, include, exclude, train, step, tell)
    step("fine-tuned", lambda: _finetune(fast, original, train, val, config, folder), fast)
    tell("measuring")
    fast.eval()
    original.eval()
    report = Report(record(fast).plans[-1], tuple(steps), compare(original, fast, example))
    _write(folder, fast, report)
    return fast, report


def _surgery(
    original: nn.Module,
    policy: Plan | DataPolicy,
    include: Patterns,
    exclude: Patterns,
    train: Any,
    step: Callable[[str, Callable[[], Any], nn.Module], Any],
    tell: Tell,
) -> tuple[nn.Module, Tensor]:
    """Convert and recover as far as it goes without training; the model and one image."""
    images = first_images(unlabelled_images(train, original), _CALIBRATION_IMAGES)
    example = images[0][:1]
    if not isinstance(policy, Plan):
        fit = partial(convert, original, policy, include=include, exclude=exclude, tell=tell)
        fitted: nn.Module = step(
            "fitted to images", lambda: fit(example=example, images=images), original
        )
        return fitted, example
    fast: nn.Module = step(
        "after surgery", lambda: convert(original, policy, example=example), original
    )
    step("norms re-estimated", lambda: _quietly(recalibrate, fast, images), fast)
    step("refitted", lambda: _quietly(reconstruct, fast, original, images, tell=tell), fast)
    return fast, example


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


def _quietly(work: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Run a step that changes the model in place, and forget what it returns."""
    work(*args, **kwargs)


def first_images(batches: Iterable[Tensor], images: int) -> list[Tensor]:
    """The first batches that hold about so many images, of 400 MB at the most."""
    kept: list[Tensor] = []
    size = 0
    for batch in batches:
        kept.append(batch)
        size += batch.nbytes
        if sum(len(b) for b in kept) >= images or size >= _MOST_BYTES:
            break
    return kept


def _finetune(
    model: nn.Module,
    teacher: nn.Module,
    train: Any,
    val: Any,
    config: FinetuneConfig,
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
    if any(decision.structure for decision in report.plan):
        report.plan.figure(folder / "structures.png")
