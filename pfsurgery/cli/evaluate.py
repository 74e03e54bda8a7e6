"""`pfsurgery eval`."""

from __future__ import annotations

from dataclasses import asdict

from pfsurgery.cli import options
from pfsurgery.recover import evaluate as evaluate_model


def evaluate(
    model: options.Model,
    data: options.Data,
    pretrained: options.Pretrained = True,
    checkpoint: options.Checkpoint = None,
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
    json: options.Json = False,
) -> None:
    """Accuracy of a model on the validation part of a data set.

    Example: pfsurgery eval --model fast/ --data imagenet/
    """
    net = options.opened(model, pretrained, checkpoint, num_classes, model_kwarg, size)
    found = evaluate_model(net, data)
    line = (
        f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f} "
        f"on {found.images} images"
    )
    options.emit(line, json, asdict(found))
