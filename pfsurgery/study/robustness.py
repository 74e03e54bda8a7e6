"""The original against the converted model: corruptions, attacks, and where they look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from pfsurgery.batches import Images, open_images, read, report_skipped, split_batch
from pfsurgery.digests import digest
from pfsurgery.errors import DataError, ShapeError, SurgeryError
from pfsurgery.measure.state import undisturbed
from pfsurgery.policy import Tell
from pfsurgery.recover.evaluate import check_labels, logits_of
from pfsurgery.recover.logs import cut_log, json_lines, read_lines
from pfsurgery.recover.state import placement, writable_folder
from pfsurgery.run_folder import SETTING, check_same, note_run, write_json
from pfsurgery.study.attacks import fgsm, pgd
from pfsurgery.study.corruptions import PARAMETERS, SEVERITIES, corrupt
from pfsurgery.study.gradcam import draw_maps, grad_cam
from pfsurgery.study.pixels import Normalisation, normalisation_of

if TYPE_CHECKING:
    from rich.table import Table

RESULT = "robustness.json"
TRIALS = "trials.jsonl"
PICTURE = "gradcam.png"
MODELS = ("original", "converted")
EPSILONS = (1.0, 2.0, 4.0, 8.0)  # in units of 1/255
_ATTACKS = ("fgsm", "pgd")
_SHOWN = 4  # images in the picture

Batch = tuple[int, Tensor, Tensor]  # place of the first image, pixels, labels
Prepare = Callable[[Tensor, Tensor, int], Callable[[nn.Module], Tensor]]


@dataclass(frozen=True, slots=True)
class Corrupted:
    """Accuracy on corrupted images.

    Attributes:
        name: The corruption.
        severity: 1 to 5.
        top1: Of each model, in percent.
    """

    name: str
    severity: int
    top1: dict[str, float]


@dataclass(frozen=True, slots=True)
class Attacked:
    """Accuracy on images that were changed against each model by its own gradients.

    Attributes:
        name: The attack.
        epsilon: Largest change of a pixel's value, in units of 1/255.
        top1: Of each model, in percent.
    """

    name: str
    epsilon: float
    top1: dict[str, float]


@dataclass(frozen=True, slots=True)
class Robustness:
    """What came of the study.

    Attributes:
        setting: What the results depend on, and the number of images.
        clean: Top-1 of each model on the images as they are, in percent.
        corruptions: One entry a corruption and severity.
        attacks: One entry an attack and epsilon.
        gradcam: Name of the picture in the run folder; None if a model has no spatial layer.
    """

    setting: dict[str, Any]
    clean: dict[str, float]
    corruptions: tuple[Corrupted, ...]
    attacks: tuple[Attacked, ...]
    gradcam: str | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {
            "setting": self.setting,
            "models": list(MODELS),
            "clean": self.clean,
            "corruptions": [asdict(row) for row in self.corruptions],
            "attacks": [asdict(row) for row in self.attacks],
            "gradcam": self.gradcam,
        }

    def mean(self, name: str) -> dict[str, float]:
        """Top-1 of each model over the severities of a corruption, or the epsilons of an attack."""
        found = [row.top1 for row in self.corruptions if row.name == name]
        found += [row.top1 for row in self.attacks if row.name == name]
        return {model: sum(top1[model] for top1 in found) / len(found) for model in MODELS}

    def __rich__(self) -> Table:
        """One row a corruption or attack and its strength."""
        from pfsurgery.tables import add_numbers, titled

        table = titled(f"Top-1 on {self.setting['images']:,} images, in percent")
        table.add_column("images")
        table.add_column("strength")
        for column in (*MODELS, "difference"):
            add_numbers(table, column)

        def row(name: str, strength: str, top1: Mapping[str, float], last: bool) -> None:
            before, after = (top1[model] for model in MODELS)
            values = (f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}")
            table.add_row(name, strength, *values, end_section=last)

        row("clean", "", self.clean, True)
        groups: dict[str, list[tuple[str, dict[str, float]]]] = {}
        for c in self.corruptions:
            groups.setdefault(c.name, []).append((f"severity {c.severity}", c.top1))
        for a in self.attacks:
            groups.setdefault(a.name, []).append((f"epsilon {a.epsilon:g}/255", a.top1))
        for name, rows in groups.items():
            for strength, top1 in rows:
                row(name, strength, top1, False)
            row(name, "mean", self.mean(name), True)
        return table


def robustness(
    original: nn.Module,
    converted: nn.Module,
    images: Images | str | Path,
    out: str | Path,
    *,
    number: int | None = None,
    severities: Sequence[int] = SEVERITIES,
    epsilons: Sequence[float] = EPSILONS,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    normalisation: Normalisation | None = None,
    tell: Tell = lambda line: None,
) -> Robustness:
    """Accuracy of both models under corruptions and attacks, and Grad-CAM of both side by side.

    Both see the same corrupted images; attacks change the images against each model by its own
    gradients. Models run where they are, in eval mode, and are left as they were. `out` receives
    `run.json`, `robustness.json`, `gradcam.png`, and `trials.jsonl` with each result as soon as it
    is known: a study that is repeated with the same `out` goes on behind the last of them.

    Args:
        original: A classifier: (N, C, H, W) -> (N, classes).
        converted: What it was converted to.
        images: As for `evaluate`, in a fixed order; colour images.
        out: Folder, made if it is missing.
        number: How many images, spread over a path or data set, the first ones of other iterables;
            all of them by default.
        severities: Of the corruptions.
        epsilons: Bounds of the attacks in units of 1/255.
        steps: Of PGD.
        seed: Of noise, shifts and the start of PGD.
        batch_size: As for `evaluate`; it does not change what is random.
        normalisation: Of the images; by default as `converted` says (see `normalisation_of`).
        tell: Called with a line of text as each part begins.

    Raises:
        DataError: The images cannot be opened, have no labels, or are not in colour.
        SurgeryError: `out` cannot be written, or holds a study with another setting.
        TrainingError: A model does not return one tensor of logits, or passes no gradient.
    """
    folder = writable_folder(out)
    models = dict(zip(MODELS, (original, converted), strict=True))
    normalisation = normalisation or normalisation_of(converted, images)
    setting = {
        **{name: digest(model) for name, model in models.items()},
        "data": str(images) if isinstance(images, (str, Path)) else type(images).__name__,
        "number": number,
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "seed": seed,
        "pgd_steps": steps,
    }
    check_same(folder / SETTING, setting)
    known = _taken_up(folder / TRIALS)
    keep = json_lines(folder / TRIALS)
    note_run(folder, "robustness", model=converted)
    loader = open_images(images, converted, training=False, batch_size=batch_size)
    spread = _spread(loader, number, batch_size)

    def batches() -> Iterator[Batch]:
        return _batches(spread, normalisation, number)

    def trial(name: str, strength: float, prepare: Prepare) -> dict[str, Any]:
        if (name, strength) not in known:
            tell(name if name == "clean" else f"{name} {strength:g}")
            top1, count = _top1(models, batches(), normalisation, prepare)
            known[name, strength] = {"top1": top1, "images": count}
            keep({"name": name, "strength": strength, **known[name, strength]})
        return known[name, strength]

    with undisturbed(original, converted):
        clean = trial("clean", 0, lambda pixels, labels, first: lambda model: pixels)
        corruptions = [
            Corrupted(
                name, severity, trial(name, severity, _corruption(name, severity, seed))["top1"]
            )
            for name, severity in product(PARAMETERS, severities)
        ]
        attacks = [
            Attacked(
                name,
                float(epsilon),
                trial(name, epsilon, _attack(name, epsilon, normalisation, steps, seed))["top1"],
            )
            for name, epsilon in product(_ATTACKS, epsilons)
        ]
        tell("Grad-CAM")
        picture = _picture(models, batches(), clean["images"], normalisation, folder / PICTURE)
    report_skipped(loader)
    result = Robustness(
        {**setting, "images": clean["images"]},
        clean["top1"],
        tuple(corruptions),
        tuple(attacks),
        picture,
    )
    write_json(folder / RESULT, result.to_dict())
    return result


def _taken_up(path: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """Results of an earlier run by name and strength.

    Raises:
        SurgeryError: The file cannot be read, or is of something else.
    """
    try:
        cut_log(path, 0)  # drops what a killed write left of a line
        records = read_lines(path) if path.exists() else []
        return {(r["name"], r["strength"]): {k: r[k] for k in ("top1", "images")} for r in records}
    except (OSError, UnicodeDecodeError) as error:
        raise SurgeryError(f"{path} cannot be read: {error}.") from None
    except (KeyError, TypeError):
        raise SurgeryError(
            f"{path} is not of this study; give another folder for the results."
        ) from None


def _spread(loader: Iterable[Any], number: int | None, batch_size: int) -> Iterable[Any]:
    """A loader of `number` images at equal distances, where the data set can be asked for them."""
    dataset = getattr(loader, "dataset", None)
    if number is None or not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
        return loader
    size = len(dataset)  # type: ignore[arg-type]
    if size <= number:
        return loader
    indices = [place * size // number for place in range(number)]
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )


def _batches(
    loader: Iterable[Any], normalisation: Normalisation, number: int | None
) -> Iterator[Batch]:
    first = 0
    for batch in read(loader):
        images, labels = split_batch(batch)
        if labels is None:
            raise DataError("Robustness needs labels: give batches of (images, labels).")
        left = len(images) if number is None else number - first
        pixels, labels = normalisation.undo(images[:left]), labels[:left]
        yield first, pixels, labels
        first += len(pixels)
        if number is not None and first >= number:
            return


def _corruption(name: str, severity: int, seed: int) -> Prepare:
    def prepare(pixels: Tensor, labels: Tensor, first: int) -> Callable[[nn.Module], Tensor]:
        corrupted = corrupt(pixels, name, severity, seed=seed, first=first)
        return lambda model: corrupted

    return prepare


def _attack(
    name: str, epsilon: float, normalisation: Normalisation, steps: int, seed: int
) -> Prepare:
    def prepare(pixels: Tensor, labels: Tensor, first: int) -> Callable[[nn.Module], Tensor]:
        given: dict[str, Any] = {"normalisation": normalisation}
        if name == "pgd":
            given |= {"steps": steps, "seed": seed, "first": first}
        attack = fgsm if name == "fgsm" else pgd
        return lambda model: attack(model, pixels, labels, epsilon, **given)

    return prepare


def _top1(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    normalisation: Normalisation,
    prepare: Prepare,
) -> tuple[dict[str, float], int]:
    """Top-1 of each model in percent, and the number of images with a label."""
    right = dict.fromkeys(models, 0)
    count = 0
    for first, pixels, labels in batches:
        changed = prepare(pixels, labels, first)
        for name, model in models.items():
            device, dtype = placement(model)
            logits = logits_of(model, normalisation.redo(changed(model)).to(device, dtype))
            check_labels(labels, logits, lowest=-1)
            right[name] += int((logits.argmax(1).cpu() == labels.cpu()).sum())
        count += int((labels >= 0).sum())
    if not count:
        raise DataError("There is no labelled image to measure robustness on; give at least one.")
    return {name: round(100 * hits / count, 4) for name, hits in right.items()}, count


def _picture(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    count: int,
    normalisation: Normalisation,
    path: Path,
) -> str | None:
    """Draw Grad-CAM of a few images at equal distances; None where a model has no spatial layer."""
    every = max(1, count // _SHOWN)
    kept: list[tuple[Tensor, Tensor]] = []
    seen = 0
    for _, pixels, labels in batches:
        for image, label in zip(pixels[labels >= 0], labels[labels >= 0], strict=True):
            if seen % every == 0 and len(kept) < _SHOWN:
                kept.append((image.cpu(), label.cpu()))
            seen += 1
    pixels, labels = (torch.stack(values) for values in zip(*kept, strict=True))
    images = normalisation.redo(pixels)
    try:
        maps = {name: grad_cam(model, images, labels) for name, model in models.items()}
    except ShapeError:
        return None
    try:
        draw_maps(pixels, labels.tolist(), maps, path)
    except OSError as error:
        raise SurgeryError(f"{path} cannot be written: {error.strerror}.") from None
    return path.name
