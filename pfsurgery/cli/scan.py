"""`pfsurgery scan`."""

from __future__ import annotations

from pfsurgery.cli import options
from pfsurgery.scan import scan as scan_model
from pfsurgery.tables import site_table


def scan(
    model: options.Model,
    num_classes: options.NumClasses = None,
    model_kwarg: options.ModelKwarg = None,
    size: options.Size = None,
    json: options.Json = False,
) -> None:
    """List every spatial convolution and every self-attention of a model.

    Example: pfsurgery scan --model mobilenetv2_100
    """
    net = options.opened(model, False, None, num_classes, model_kwarg, size)
    sites = scan_model(net, options.example_of(net), attention=True)
    options.emit(site_table(sites), json, [site.to_dict() for site in sites])
