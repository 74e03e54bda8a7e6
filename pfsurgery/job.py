"""The main job: convert a model, win its accuracy back, and report what was saved."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pfsurgery.batches import first_images, release_workers, unlabelled_images
from pfsurgery.card import write_card
from pfsurgery.checkpoint import load, save
from pfsurgery.convert import convert
from pfsurgery.digests import digest
from pfsurgery.errors import SurgeryError
from pfsurgery.files import write_text
from pfsurgery.measure import Comparison, compare
from pfsurgery.plan import Plan
from pfsurgery.policy import DataPolicy, DevicePolicy, Tell, get_policy
from pfsurgery.record import record, remember_instead
from pfsurgery.recover import (
    Accuracy,
    FinetuneConfig,
    FinetuneResult,
    evaluate,
    finetune,
    recalibrate,
    reconstruct,
    snapshot,
)
from pfsurgery.recover.evaluate import logits_of
from pfsurgery.recover.finetune import check_run
from pfsurgery.recover.processes import first_process_first, training_device
from pfsurgery.recover.state import keep_train_flags, placement, writable_folder
from pfsurgery.recover.stop import workers_outlive_sigterm
from pfsurgery.run_folder import MODEL_FOLDER, RUN, SETTING, check_same, note_run, write_json
from pfsurgery.select import Patterns, as_patterns

if TYPE_CHECKING:
    from rich.table import Table

_log = logging.getLogger(__name__)

_CONVERTED_FOLDER = "converted"
_PLAN = "plan.json"
_STEPS = "steps.json"
_NEAR_CHANCE = 1.25


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
        given_back: Sites that have their convolution back, to keep the accuracy.
    """

    plan: Plan
    steps: tuple[Step, ...]
    comparison: Comparison
    given_back: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "policy": self.plan.policy,
            "given_back": list(self.given_back),
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
    images: int = 1000,
    resume: bool = False,
    tell: Tell = lambda line: None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Report]:
    """Convert `original`, recover it, and write model and report to `out`.

    The first training images, without their labels, serve to re-estimate norm statistics and to
    refit layers in closed form (`reconstruct`; a budget is fitted to them from the start). Then the
    model is fine-tuned with the original as its teacher; the best weights on `val` are kept. `out`
    receives `model/` (see `save`) with a model card, `report.md`, `report.json`, `plan.json`,
    `comparison.png`, `accuracy.png`, `run.json`, and what `finetune` writes. What was reached
    before the fine-tuning is kept in `converted/` and `steps.json`, for a run that is continued.

    In processes that `torchrun` or `accelerate launch` started, the first converts, the others
    take over what it made, and all train; the first one writes.

    Args:
        original: The trained model; it is left as it was. In the meantime it is on the GPU, if
            there is one.
        policy: What its sites become: a plan, or a budget that is fitted to images.
        train: Training images, as `finetune` takes them.
        val: Validation images with labels.
        out: Folder, made if it is missing.
        config: Settings of the fine-tuning.
        images: How many images to re-estimate and refit with, before the fine-tuning.
        resume: Whether to continue where an earlier run in `out` ended, if there was one.
        tell: Called with a line of text as each step begins.
        include: With a budget: patterns of the sites that may change; a plan knows.
        exclude: With a budget: patterns of sites that are kept.

    Returns:
        The converted, recovered model and the report.

    Raises:
        SurgeryError: `out` cannot be written, or a step fails; the message says what to do.
        TrainingError: The run in `out` is of another model, policy or choice of sites.
    """
    folder = writable_folder(out)
    config = config or FinetuneConfig()
    check_run(original, config, val=val, folder=folder, resume=resume)
    steps: list[Step] = []

    def step(name: str, work: Callable[[], Any], model: nn.Module) -> Any:
        """Do one step; `work` returns the model where it makes a new one."""
        tell(name)
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        steps.append(Step(name, evaluate(model if result is None else result, val), seconds))
        return result

    with (
        workers_outlive_sigterm(train, val),
        keep_train_flags(original),
        _moved(original, training_device()),
    ):
        with first_process_first() as first:
            continued = (folder / _STEPS).exists() and (resume or not first)
            if first:
                asked = _asked(original, policy, images, include, exclude)
                _begin(folder, asked, continued)
                if not (continued and (folder / RUN).exists()):
                    note_run(folder, "finetune", model=original)
            if continued:
                tell("taking over what was converted before")
                fast = _converted(folder / _CONVERTED_FOLDER, original)
                steps += _read_steps(folder)
                example = first_images(unlabelled_images(train, original), 1)[0][:1]
            else:
                step("original", lambda: original, original)
                seen = first_images(unlabelled_images(train, original), images)
                # of its own memory: what is seen is let go before the training
                example = seen[0][:1].clone().to(placement(original)[0])
                _check_original(original, example, steps[0].accuracy)
                fast = _surgery(original, policy, include, exclude, example, seen, step, tell)
                del seen
                save(fast, folder / _CONVERTED_FOLDER)
                write_text(folder / _CONVERTED_FOLDER / _PLAN, record(fast).plans[-1].to_json())
                _write_steps(folder, steps)
        for loader in (train, val):
            release_workers(loader)  # they hold what this process held when they began
        tell("fine-tuning")
        result = finetune(
            fast, train=train, val=val, teacher=original, config=config, out=folder, resume=resume
        )
        _take_best(fast, result)
        assert result.best is not None
        steps.append(Step("fine-tuned", result.best, result.seconds))
        fast.eval()
        original.eval()
        tell("measuring")
        device = placement(original)[0]
        with first_process_first():  # others would take time from what it measures
            comparison = compare(original, fast.to(device), example.to(device))
    report = Report(record(fast).plans[-1], tuple(steps), comparison, result.given_back)
    if first:
        _write(folder, fast, report, result)
    return fast, report


@contextmanager
def _moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model is on another device while inside."""
    home = placement(model)[0]
    try:
        model.to(device)
        yield
    finally:
        model.to(home)


def _asked(
    original: nn.Module,
    policy: Plan | DataPolicy,
    images: int,
    include: Patterns,
    exclude: Patterns,
) -> dict[str, Any]:
    """What `converted/` was made from, for a run that is continued."""
    return {
        "model": digest(original),
        "policy": policy.policy if isinstance(policy, Plan) else policy.name,
        "plan": _digest_of(policy) if isinstance(policy, Plan) else None,
        "pointwise": not isinstance(policy, Plan) and policy.pointwise,
        "images": images,
        "include": list(as_patterns(include)),
        "exclude": list(as_patterns(exclude)),
    }


def _digest_of(plan: Plan) -> str | None:
    """None where the policy measures: it would not plan the same again."""
    with suppress(SurgeryError):  # the policy may be the caller's own
        if isinstance(get_policy(plan.policy), DevicePolicy):
            return None
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]


def _begin(folder: Path, asked: Mapping[str, Any], continued: bool) -> None:
    """Note what is asked for, or check that it is what was asked for before."""
    if not continued:
        snapshot.remove_all(folder)
        for name in (_STEPS, SETTING):
            (folder / name).unlink(missing_ok=True)
    check_same(folder / SETTING, asked)


def _converted(folder: Path, original: nn.Module) -> nn.Module:
    """What an earlier run converted, with its whole plan: `save` leaves out what was kept."""
    fast = load(folder, base=copy.deepcopy(original))
    plan = Plan.from_json((folder / _PLAN).read_text(encoding="utf-8"))
    remember_instead(fast, (*record(fast).plans[:-1], plan))
    return fast


def _write_steps(folder: Path, steps: list[Step]) -> None:
    write_json(folder / _STEPS, [asdict(step) for step in steps])


def _read_steps(folder: Path) -> list[Step]:
    values = json.loads((folder / _STEPS).read_text(encoding="utf-8"))
    return [Step(v["name"], Accuracy(**v["accuracy"]), v["seconds"]) for v in values]


def _surgery(
    original: nn.Module,
    policy: Plan | DataPolicy,
    include: Patterns,
    exclude: Patterns,
    example: Tensor,
    images: list[Tensor],
    step: Callable[[str, Callable[[], Any], nn.Module], Any],
    tell: Tell,
) -> nn.Module:
    """Convert and recover as far as it goes without training."""
    if not isinstance(policy, Plan):
        fit = partial(convert, original, policy, include=include, exclude=exclude, tell=tell)
        fitted: nn.Module = step(
            "fitted to images", lambda: fit(example=example, images=images), original
        )
        return fitted
    fast: nn.Module = step(
        "after surgery", lambda: convert(original, policy, example=example), original
    )
    step("norms re-estimated", lambda: _quietly(recalibrate, fast, images), fast)
    step("refitted", lambda: _quietly(reconstruct, fast, original, images, tell=tell), fast)
    return fast


def _check_original(original: nn.Module, example: Tensor, accuracy: Accuracy) -> None:
    """Warn where there is nothing to keep: a teacher that guesses is most often a mistake."""
    with torch.no_grad():
        classes = logits_of(original.eval(), example).shape[1]
    if accuracy.top1 <= _NEAR_CHANCE * 100 / classes:
        _log.warning(
            "The original is right on %.2f %% of the validation images, near chance for its %d "
            "classes. Check its weights, the order of its classes, and the size and normalisation "
            "of the images (pretrained_cfg; --size on the command line).",
            *(accuracy.top1, classes),
        )


def _quietly(work: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Run a step that changes the model in place, and forget what it returns."""
    work(*args, **kwargs)


def _take_best(model: nn.Module, result: FinetuneResult) -> None:
    from safetensors.torch import load_file

    if result.weights is not None:
        model.load_state_dict(load_file(result.weights))


def _write(folder: Path, model: nn.Module, report: Report, result: FinetuneResult) -> None:
    save(model, folder / MODEL_FOLDER)
    write_card(folder / MODEL_FOLDER, report)
    write_text(folder / "report.md", report.to_markdown())
    write_json(folder / "report.json", report.to_dict())
    write_text(folder / _PLAN, report.plan.to_json())
    report.comparison.figure(folder / "comparison.png")
    result.figure(folder / "accuracy.png")
    if any(decision.structure for decision in report.plan):
        report.plan.figure(folder / "structures.png")
