"""The main job on embedded data: handwritten digits and a small network trained on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from pfsurgery.base import Base, set_base
from pfsurgery.convert import plan
from pfsurgery.digits import ImageSet, digits
from pfsurgery.example import set_image_config
from pfsurgery.job import Report, run_job
from pfsurgery.policy import DataPolicy, PolicyLike, Tell
from pfsurgery.recover import FinetuneConfig, finetune

# A residual network of eight bottlenecks, narrow enough to be trained in half a minute.
NETWORK = Base(
    "timm",
    "resnet26d",
    {"num_classes": 10, "channels": [16, 32, 64, 128], "layers": [2, 3, 2, 1]},
)
TRAINING = {"epochs": 8, "lr": 3e-3, "weight_decay": 0.05, "label_smoothing": 0.1}
RECOVERY = {"epochs": 6, "lr": 1e-3}


def run(
    out: str | Path,
    *,
    policy: PolicyLike | DataPolicy = "maxpool_all",
    seed: int = 0,
    tell: Tell = lambda line: None,
) -> Report:
    """Train the demo's network on digits, convert it by `policy`, recover it, write the report.

    Args:
        out: Folder for model, report and log.
        policy: What the sites become.
        seed: Of weights and of the order of images.
        tell: Called with a line of text as each step begins.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        SurgeryError: A step fails; the message says what to do.
    """
    data = digits()
    with _one_thread():
        tell(f"training a {NETWORK.name} on {len(data.train)} digits as the original")
        original = _network(data, seed)
        training = FinetuneConfig(seed=seed, **TRAINING)  # type: ignore[arg-type]
        finetune(original, train=data.train, config=training)
        example = torch.zeros(1, *data.input_size)
        chosen = (
            policy if isinstance(policy, DataPolicy) else plan(original, policy, example=example)
        )
        recovery = FinetuneConfig(seed=seed, **RECOVERY)  # type: ignore[arg-type]
        _, report = run_job(
            original, chosen, train=data.train, val=data.val, out=out, config=recovery, tell=tell
        )
    return report


def _network(data: ImageSet, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORK.build()
    set_base(model, NETWORK)
    seen = {"input_size": data.input_size, "mean": data.mean, "std": data.std}
    set_image_config(model, seen)
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """A network this small gains nothing from threads, and loses much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
