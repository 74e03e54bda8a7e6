"""Networks of bottlenecks for small images, and the operations in their middle."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pfsurgery.convert import convert
from pfsurgery.errors import UnsupportedSiteError
from pfsurgery.modules import get_module, set_module
from pfsurgery.ops import get_op
from pfsurgery.ops.bottleneck import fitted_module
from pfsurgery.ops.window import Window
from pfsurgery.plan import Decision, Plan, decide
from pfsurgery.policy import Rule
from pfsurgery.scan import scan
from pfsurgery.sites import Geometry, Site
from pfsurgery.structure import Run, Structure
from pfsurgery.study.setting import StudySetting

DENSE, DEPTHWISE, MIXED = "dense", "depthwise", "mixed"
_FITTED = "bare"  # the op whose structure says what each channel becomes


def dense_network(
    setting: StudySetting, *, channels: int, classes: int, seed: int, single: bool = False
) -> nn.Module:
    """A ResNet of timm's with a 3x3 stem and dense 3x3 convolutions in all bottlenecks.

    Args:
        setting: Stages, widths and stem.
        channels: Of the images.
        classes: Outputs.
        seed: Of the weights; the global random state is left as it is.
        single: Only the very first bottleneck.
    """
    from timm.models.resnet import Bottleneck, ResNet

    layers = (1,) if single else setting.layers
    widths = [setting.width * 2**stage for stage in range(len(layers))]
    missing = 4 - len(layers)  # timm's ResNet calls four stages; empty ones pass their input on
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = ResNet(
            Bottleneck,
            # timm divides by the number of blocks - 1, so a single one is made as two
            layers=(2, 0, 0, 0) if single else (*layers, *(0,) * missing),
            num_classes=classes,
            in_chans=channels,
            channels=(*widths, *widths[-1:] * missing),
            stem_type="deep",
            stem_width=2 * setting.width,
            zero_init_last=False,
        )
        if single:
            set_module(model, "layer1", nn.Sequential(get_module(model, "layer1.0")))
        model.conv1 = nn.Conv2d(
            channels, 4 * setting.width, 3, setting.stem_stride, padding=1, bias=False
        )
    model.maxpool = nn.Identity()
    return model


def bottlenecks(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """The spatial convolutions of the bottlenecks, from the input to the output."""
    return tuple(site for site in scan(model, example) if site.bottleneck)


def with_operations(
    model: nn.Module, sites: Sequence[Site], ops: Sequence[str], example: Tensor, *, seed: int
) -> nn.Module:
    """A copy of a dense network with other operations in its bottlenecks.

    A parameter-free operation takes the place of convolution, norm and activation, as in the
    paper's efficient bottleneck. `mixed` gives an equal share of the channels to maximum, average
    and shift. All other weights are those of `model`.

    Args:
        model: From `dense_network`.
        sites: Some of its `bottlenecks`.
        ops: For each of them `dense`, `depthwise`, `mixed` or the name of an op.
        example: Images (N, C, H, W).
        seed: Of the weights of depthwise convolutions.

    Raises:
        UnsupportedSiteError: An op cannot stand at its site.
        UnknownNameError: There is no such op.
    """
    model = copy.deepcopy(model)
    decisions = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for site, op in zip(sites, ops, strict=True):
            if op == DEPTHWISE:
                set_module(model, site.name, depthwise(get_module(model, site.name)))
            elif op != DENSE:
                decisions.append(_decision(site, op))
    if not decisions:
        return model
    return convert(model, Plan("study", tuple(decisions)), example=example)


def depthwise(conv: nn.Module) -> nn.Conv2d:
    """A fresh depthwise 3x3 convolution that reads what `conv` reads."""
    assert isinstance(conv, nn.Conv2d)
    channels = conv.in_channels
    return nn.Conv2d(channels, channels, 3, conv.stride[0], padding=1, groups=channels, bias=False)


def parameter_free(site: Site, op: str) -> nn.Module:
    """The module of `mixed` or of a parameter-free op at a site.

    Raises:
        UnsupportedSiteError: It cannot stand there.
        UnknownNameError: There is no such op.
    """
    decision = _decision(site, op)
    if decision.structure is not None:
        return fitted_module(site.geometry, decision.structure)
    return get_op(op).build(site)


def _decision(site: Site, op: str) -> Decision:
    decision = decide(site, Rule(_FITTED if op == MIXED else op, tail="drop"))
    if not decision.replaced:
        raise UnsupportedSiteError(f"{site.name} stays: {decision.reason}.")
    structure = equal_shares(site.geometry) if op == MIXED else None
    return replace(decision, structure=structure)


def equal_shares(geometry: Geometry) -> Structure:
    """A third of the channels under the maximum, the average, and a shift (one tap each)."""
    channels, (height, width) = range(geometry.in_channels), geometry.kernel_size
    shares = torch.tensor_split(torch.arange(len(channels)), 3)
    largest, mean, moved = (tuple(share.tolist()) for share in shares)
    taps = Window.of(geometry).near_taps()
    shifts = (
        Run("tap", top, left, 1, 1, tuple(part.tolist()))
        for (top, left), part in zip(
            taps, torch.tensor_split(torch.tensor(moved), len(taps)), strict=True
        )
        if len(part)
    )
    runs = (
        Run("maximum", 0, 0, height, width, largest),
        Run("average", 0, 0, height, width, mean),
        *shifts,
    )
    return Structure("bare", None, tuple(run for run in runs if run.channels), None, 0.0)
