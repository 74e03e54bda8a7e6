"""Networks on CIFAR-10, converted, recovered, and fine-tuned for a quarter of their training.

    python benchmarks/finetune_cifar.py --data DIR --net basic --policy maxpool_deep

`DIR` holds `train.tar` and `val.tar` (see base_nets.py). `--policy stride_1` puts max-pooling at
every site that has no stride; `--policy bare_stride_1` puts there one operation a channel, chosen
from images, and `--policy budget_stride_1` fitted columns at the multiply-adds of `stride_1`.
Figure and JSON go to `benchmarks/results/`; a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import base_nets
import machine
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import pfsurgery
from pfsurgery.measure import count
from pfsurgery.policy import Policy, Rule

STRIDE_1 = Policy("stride_1", (Rule("max_pool", stride=False),))


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of padded images, half of them mirrored, normalised."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = torch.nn.functional.pad(images, (2, 2, 2, 2))
        self.labels, self.size = labels, images.shape[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left, mirrored = torch.randint(0, 5, (3,)).tolist()
        image = self.images[index, :, top : top + self.size, left : left + self.size]
        image = image.flip(-1) if mirrored % 2 else image
        return base_nets.normalise(image[None])[0], self.labels[index]


def without_stride(site: pfsurgery.Site) -> bool:
    return site.geometry.stride == (1, 1)


def recovered(original: nn.Module, policy: str, calibration: Sequence[Tensor]) -> nn.Module:
    """The converted network, refitted without training."""
    example = torch.zeros(1, 3, 32, 32)
    fit = None
    if policy == "bare_stride_1":
        fit = pfsurgery.bare()
    elif policy == "budget_stride_1":
        pooled = pfsurgery.convert(original, STRIDE_1, example=example)
        fit = pfsurgery.budget(macs=count(pooled, example).macs, thin=False)
    if fit is not None:
        return pfsurgery.convert(
            original, fit, example=example, where=without_stride, images=calibration
        )
    fast = pfsurgery.convert(
        original, STRIDE_1 if policy == "stride_1" else policy, example=example
    )
    pfsurgery.recalibrate(fast, calibration)
    pfsurgery.reconstruct(fast, original, list(calibration))
    return fast


def fine_tuned(args: argparse.Namespace) -> dict[str, Any]:
    original = base_nets.load_net(args.net, args.data, args.cache)
    base = base_nets.facts_of(args.net, args.cache)
    images, labels = base_nets.load_images("train", args.data, args.cache)
    val_images, val_labels = base_nets.load_images("val", args.data, args.cache)
    val = TensorDataset(base_nets.normalise(val_images), val_labels)
    quarter = int(base["epochs"]) * (len(labels) // base_nets.BATCH) // 4
    steps = args.steps or quarter

    fast = recovered(original, args.policy, base_nets.normalise(images[:2000]).split(100))
    before = pfsurgery.evaluate(fast, val, batch_size=500)

    config = pfsurgery.FinetuneConfig(
        epochs=1 + steps * base_nets.BATCH // len(labels),
        max_steps=steps,
        batch_size=base_nets.BATCH,
        optimizer="sgd",
        lr=args.lr,
        weight_decay=5e-4,
        warmup=0.25,
        kd_weight=0.9,
        temperature=2.0,
        match_weight=args.match_weight,
        changed_lr=args.changed_lr,
        channels_last=True,
        save_every=100,
    )
    name = f"finetune_{args.net}_{args.policy}"
    result = pfsurgery.finetune(
        fast,
        train=Crops(images, labels),
        val=val,
        teacher=copy.deepcopy(original),
        config=config,
        out=args.out / name,
        resume=True,
    )
    result.figure(args.results / f"{name}.png")
    assert result.last is not None
    assert result.teacher is not None
    return {
        "machine": machine.describe("cpu"),
        "base_top1": result.teacher.top1,
        "before_training": before.top1,
        "top1": result.last.top1,
        "points_of_the_base": round(result.last.top1 - result.teacher.top1, 2),
        "steps": result.steps,
        "a_quarter_of_the_base": quarter,
        "seconds": round(result.seconds),
        "config": asdict(config),
        "history": [asdict(entry) for entry in result.history],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's tar files")
    parser.add_argument("--cache", type=Path, default=here / "cache")
    parser.add_argument("--net", choices=list(base_nets.CYCLES), default="basic")
    parser.add_argument(
        "--policy",
        default="maxpool_deep",
        help="a policy's name, or stride_1, bare_stride_1, budget_stride_1",
    )
    parser.add_argument("--lr", type=float, default=0.12)
    parser.add_argument("--match-weight", type=float, default=0.0)
    parser.add_argument("--changed-lr", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="a quarter of the base's by default")
    parser.add_argument("--out", type=Path, default=here / "cache", help="folder for checkpoints")
    parser.add_argument("--results", type=Path, default=here / "results")
    args = parser.parse_args()
    made = fine_tuned(args)
    text = json.dumps(made, indent=1)
    (args.results / f"finetune_{args.net}_{args.policy}.json").write_text(text + "\n")
    kept = {name: value for name, value in made.items() if name not in ("history", "config")}
    print(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
