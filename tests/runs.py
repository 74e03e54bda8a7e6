"""Small run folders of every kind, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageDraw

import pfsurgery
from pfsurgery.plan import Plan
from pfsurgery.run_folder import Kind, note_run, write_json

Values = dict[str, Any]
OPS = ("max_pool", "avg_pool", "shift", "thin: 16 -> 24")


def plan() -> Plan:
    """Of a small network, by a rule."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    return pfsurgery.plan(model, "maxpool_deep")


def write(folder: Path, kind: Kind, values: Any) -> Path:
    """A run folder with `run.json` and the kind's file."""
    note_run(folder, kind, model=timm.create_model("test_resnet", num_classes=2))
    if kind == "sensitivity":
        lines = "".join(json.dumps(record) + "\n" for record in values)
        (folder / "sensitivity.jsonl").write_text(lines)
    else:
        write_json(folder / f"{kind}.json", values)
    return folder


def sensitivity() -> list[Values]:
    sites = [decision.site for decision in plan()]
    return [
        {
            "site": site.name,
            "depth": place / len(sites),
            "kind": site.kind,
            "op": op,
            "damage": 0.002 * math.exp(3 * math.sin(place + 2 * number)),
            "top1": 80 - 3 * number - place if number else None,
            "macs": int(site.macs * (0.9 - 0.2 * number)),
            "params": int(site.geometry.parameters * 0.9),
            "ms": 0.4 * math.cos(place + number),
            "seconds": 1.5,
        }
        for place, site in enumerate(sites)
        for number, op in enumerate(OPS)
    ]


def search() -> Values:
    points = [
        {
            "name": f"{origin} {number}",
            "origin": origin,
            "macs": int(4e8 - 4e7 * number + 1e7 * place),
            "params": int(1.2e6 - 1e5 * number),
            "ms": 12.0 - 0.9 * number + 0.3 * place,
            "damage": 0.01 * (1 + place) * math.exp(0.5 * number),
            "top1": 79.0 - number - place,
            "chosen": origin == "budget" and number == 5,
        }
        for place, origin in enumerate(("budget", "sensitivity", "optuna", "random", "policy"))
        for number in range(1, 8 if origin != "policy" else 3)
    ]
    return {
        "unit": "macs",
        "original": {"macs": int(4e8), "params": int(1.2e6), "ms": 12.4, "top1": 80.25},
        "points": points,
        "predicted_gain_ms": 5.1,
        "measured_gain_ms": 3.9,
        "plan": plan().to_dict(),
    }


def layer() -> Values:
    places = ("stage 1", "stage 2", "stage 3", "stage 4")
    return {
        "setting": {"data": "digits", "epochs": 20, "seeds": 3},
        "paper_setting": {"data": "ImageNet-1k", "epochs": "120"},
        "rows": [
            {
                "place": place,
                "op": op,
                "top1": [91 - 2 * n + i + seed / 3 for seed in range(3)],
                "params": 100_000 - 9000 * n,
                "macs": 12_000_000 - 900_000 * n * (i + 1),
                "ms": 1.2 - 0.1 * n,
            }
            for i, place in enumerate(places)
            for n, op in enumerate(("conv3x3", "depthwise", "max_pool", "avg_pool", "shift"))
        ],
    }


def nas() -> Values:
    candidates = ["conv3x3", "depthwise", "max_pool", "identity"]
    cells = []
    for number in range(8):
        raw = [math.exp(math.sin(number * (k + 1))) for k in range(4)]
        weights = {op: value / sum(raw) for op, value in zip(candidates, raw, strict=True)}
        cells.append(
            {
                "cell": number,
                "depth": number / 8,
                "kind": "reduction" if number in (2, 5) else "normal",
                "chosen": max(weights, key=lambda op: weights[op]),
                "weights": weights,
            }
        )
    costs = {"params": 54_000, "macs": 8_200_000, "ms": 0.9}
    return {
        "setting": {"data": "digits", "steps": 400},
        "paper_setting": {"data": "CIFAR-10", "steps": "50 epochs"},
        "candidates": candidates,
        "cells": cells,
        "history": [
            {"step": 20 * i, "loss": 2.3 * math.exp(-i / 8), "top1": 95 - 80 * math.exp(-i / 6)}
            for i in range(21)
        ],
        "found": {"top1": 95.2, **costs},
        "baselines": [
            {"name": "all conv3x3", "top1": 96.1, **costs, "macs": 21_000_000},
            {"name": "all max_pool", "top1": 92.4, **costs, "macs": 3_000_000},
        ],
    }


def robustness(folder: Path) -> Values:
    image = Image.new("RGB", (480, 160), "#406070")
    ImageDraw.Draw(image).ellipse((60, 30, 160, 130), fill="#e0a63a")
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / "gradcam.png")
    models = ["resnet50", "resnet50 (maxpool_deep)"]
    names = ("gaussian noise", "motion blur", "fog", "contrast", "jpeg compression", "pixelate")

    def top1(loss: float) -> dict[str, float]:
        return {models[0]: 80 - loss, models[1]: 78 - 1.1 * loss}

    return {
        "setting": {"data": "digits", "images": 360},
        "models": models,
        "clean": top1(0),
        "corruptions": [
            {"name": name, "severity": severity, "top1": top1(severity * (3 + i))}
            for i, name in enumerate(names)
            for severity in range(1, 6)
        ],
        "attacks": [
            {"name": name, "epsilon": e, "top1": top1(70 * (1 - math.exp(-e / scale)))}
            for name, scale in (("FGSM", 4.0), ("PGD", 2.0))
            for e in (0.5, 1, 2, 4, 8)
        ],
        "gradcam": "gradcam.png",
    }
