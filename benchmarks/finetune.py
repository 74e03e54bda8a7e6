"""Our fine-tuning loop against timm's, the same work: images/s, peak memory, where a step goes.

    python benchmarks/finetune.py --json benchmarks/results/finetune_cpu.json
    python benchmarks/finetune.py --data DIR --net basic    # CIFAR-10 from DIR's tar files

timm's loop is written out as its documentation and training script show it: optimiser, schedule,
autocast, loss, backward, step, a running mean of the loss. Both loops train copies of one model on
the same batches in the same order; the time of a step is the time between two batches that a loop
asks for. Loops run in turns, so that what disturbs the machine disturbs all. Run it on an idle one.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import machine
import timm
import torch
from torch import Tensor, nn

import pfsurgery
from pfsurgery.recover.distill import recovery_loss

WARM_UP = 3
Batch = tuple[Tensor, Tensor]


class Clocked:
    """Batches that can be iterated again; notes when each was asked for."""

    def __init__(self, batches: list[Batch], steps: int, wait: Callable[[], None]) -> None:
        self.batches, self.steps, self.wait = batches, steps, wait
        self.asked: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            self.wait()
            self.asked.append(time.perf_counter())
            yield self.batches[step % len(self.batches)]
        self.wait()
        self.asked.append(time.perf_counter())

    def step_times(self) -> list[float]:
        """Seconds of each step, without the first ones."""
        steps = [after - before for before, after in zip(self.asked, self.asked[1:], strict=False)]
        return steps[WARM_UP:]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What both loops are told."""
    return {"lr": 0.01, "weight_decay": 1e-4, "opt": "sgd", "precision": args.precision}


def ours(model: nn.Module, teacher: nn.Module | None, data: Clocked, args: Any) -> None:
    """`pfsurgery.finetune`."""
    told = settings(args)
    config = pfsurgery.FinetuneConfig(
        optimizer=told["opt"],
        lr=told["lr"],
        weight_decay=told["weight_decay"],
        mixed_precision=told["precision"],
        channels_last=args.channels_last,
        epochs=1,
    )
    pfsurgery.finetune(model, train=data, teacher=teacher, config=config, progress=False)


def timms(model: nn.Module, data: Clocked, args: Any) -> None:
    """The loop that timm documents."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter

    told = settings(args)
    model.to(args.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model, opt=told["opt"], lr=told["lr"], weight_decay=told["weight_decay"]
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=len(data)
    )
    loss_of, losses = nn.CrossEntropyLoss(), AverageMeter()
    model.train()
    for step, (images, labels) in enumerate(data, start=1):
        images, labels = images.to(args.device), labels.to(args.device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(args):
            loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(num_updates=step)
        if step % 10 == 0:
            losses.update(loss.item(), len(images))


def autocast(args: argparse.Namespace) -> Any:
    if args.precision == "no":
        return nullcontext()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float16
    return torch.autocast(args.device, dtype=dtype)


def split(
    model: nn.Module, teacher: nn.Module, batches: list[Batch], args: Any
) -> dict[str, list[float]]:
    """Milliseconds of the parts of some steps, each waited for."""
    wait = waiting(args)
    model, teacher = model.to(args.device).train(), teacher.to(args.device).eval()
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    teacher.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    taken: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wait()
        began = time.perf_counter()
        made = work()
        wait()
        taken.setdefault(name, []).append((time.perf_counter() - began) * 1000)
        return made

    def seen_by_teacher(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(args):
            return teacher(images)

    def seen_by_student(images: Tensor) -> Tensor:
        with autocast(args):
            return model(images)

    for step in range(WARM_UP + -(-args.steps // args.rounds)):
        images, labels = batches[step % len(batches)]
        images = timed(
            "data to device",
            lambda images=images: images.to(args.device, memory_format=layout),
        )
        labels = labels.to(args.device)
        wanted = timed("teacher", lambda images=images: seen_by_teacher(images))
        logits = timed("forward", lambda images=images: seen_by_student(images))
        loss = recovery_loss(logits, labels, wanted, temperature=2.0, kd_weight=0.7)
        timed("backward", loss.backward)
        timed("optimiser", optimizer.step)
        optimizer.zero_grad()
    return {name: times[WARM_UP:] for name, times in taken.items()}


def waiting(args: argparse.Namespace) -> Callable[[], None]:
    return torch.cuda.synchronize if args.device == "cuda" else lambda: None


def prepared(args: argparse.Namespace) -> tuple[nn.Module, nn.Module, list[Batch]]:
    """Original, converted model, batches."""
    torch.manual_seed(0)
    if args.net is not None:
        import base_nets

        original = base_nets.load_net(args.net, args.data, args.cache)
        images, labels = base_nets.load_images("train", args.data, args.cache)
        size = images.shape[-1]
    else:
        original, size = timm.create_model(args.model, num_classes=args.classes).eval(), args.size
        images = torch.randint(0, 255, (8 * args.batch, 3, size, size), dtype=torch.uint8)
        labels = torch.randint(0, args.classes, (len(images),))
    batches = [
        ((x.float() / 255 - 0.45) / 0.25, y)
        for x, y in zip(
            images[: 8 * args.batch].split(args.batch),
            labels[: 8 * args.batch].split(args.batch),
            strict=True,
        )
    ]
    example = torch.zeros(1, 3, size, size)
    return original, pfsurgery.convert(original, args.policy, example=example), batches


def loops(
    original: nn.Module, fast: nn.Module, args: argparse.Namespace
) -> dict[str, Callable[[Clocked], None]]:
    """The contenders by name; each trains a copy."""
    return {
        "timm": lambda data: timms(copy.deepcopy(fast), data, args),
        "ours": lambda data: ours(copy.deepcopy(fast), None, data, args),
        "ours with teacher": lambda data: ours(copy.deepcopy(fast), original, data, args),
    }


def peak(name: str, args: argparse.Namespace) -> float:
    """Peak memory of one loop in MB, in a process of its own (on a GPU, of the GPU)."""
    words = [word for word in sys.argv[1:] if word != "--json"]
    if args.json is not None:
        words.remove(str(args.json))
    done = subprocess.run(
        [sys.executable, __file__, *words, "--peak-of", name],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def report_peak(args: argparse.Namespace) -> None:
    original, fast, batches = prepared(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loops(original, fast, args)[args.peak_of](Clocked(batches, WARM_UP + 2, waiting(args)))
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(_peak_of_this_process())


def _peak_of_this_process() -> float:
    """In MB; `getrusage` would count what the parent process held when it made this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    original, fast, batches = prepared(args)
    contenders = loops(original, fast, args)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    of_parts: dict[str, list[float]] = {}
    for turn in range(args.rounds):
        for name in list(contenders) if turn % 2 else list(contenders)[::-1]:
            data = Clocked(batches, WARM_UP + args.steps, waiting(args))
            contenders[name](data)
            times[name] += data.step_times()
        taken = split(copy.deepcopy(fast), copy.deepcopy(original), batches, args)
        for name, mine in taken.items():
            of_parts.setdefault(name, []).extend(mine)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    parts = {name: round(statistics.median(taken), 3) for name, taken in of_parts.items()}
    teacher = 1000 * (medians["ours with teacher"] - medians["ours"])
    return {
        "machine": machine.describe(args.device),
        "timm": timm.__version__,
        "settings": {
            k: str(v)
            for k, v in vars(args).items()
            if k not in ("json", "peak_of", "cache", "data")
        },
        "step_ms": {name: round(1000 * median, 3) for name, median in medians.items()},
        "images_per_s": {name: round(args.batch / median, 1) for name, median in medians.items()},
        "ours_to_timm": round(medians["timm"] / medians["ours"], 3),
        "teacher_ms": {"in the loop": round(teacher, 3), "its forward pass": parts["teacher"]},
        "split_ms": parts,
        "peak_mb": {name: round(peak(name, args), 1) for name in contenders},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet26d", help="timm's name")
    parser.add_argument("--policy", default="maxpool_deep")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--net", help="a base network of base_nets.py on CIFAR-10 instead")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's tar files")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of is not None:
        report_peak(args)
        return
    text = json.dumps(measured(args), indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
