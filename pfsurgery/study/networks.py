"""Networks of bottlenecks for small images, and the operations in their middle."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pfsurgery.convert import convert, plan
from pfsurgery.errors import UnsupportedSiteError
from pfsurgery.modules import get_module, set_module
from pfsurgery.ops.window import Window
from pfsurgery.plan import Plan
from pfsurgery.policy import Policy, Rule
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
        model = ResNet(
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
            model.layer1 = model.layer1[:1]
        model.conv1 = nn.Conv2d(
            channels, 4 * setting.width, 3, setting.stem_stride, padding=1, bias=False
        )
    model.maxpool = nn.Identity()
    return model


def bottlenecks(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """The spatial convolutions of the bottlenecks, from the input to the output."""
    return tuple(site for site in scan(model, example) if site.bottleneck)


def with_operations(
    model: nn.Module, chosen: Mapping[str, str], example: Tensor, *, seed: int
) -> nn.Module:
    """A copy of a dense network with other operations in its bottlenecks.

    A parameter-free operation takes the place of convolution, norm and activation, as in the
    paper's efficient bottleneck. `mixed` gives an equal share of the channels to maximum, average
    and shift. All other weights are those of `model`.

    Args:
        model: From `dense_network`.
        chosen: `dense`, `depthwise`, `mixed` or the name of an op, by the site's name.
        example: Images (N, C, H, W).
        seed: Of the weights of depthwise convolutions.

    Raises:
        UnsupportedSiteError: An op cannot stand at its site.
        UnknownNameError: There is no such op.
    """
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in (name for name, op in chosen.items() if op == DEPTHWISE):
            set_module(model, name, _depthwise(get_module(model, name)))
    rules = tuple(
        Rule(_FITTED if op == MIXED else op, tail="drop", name=name)
        for name, op in chosen.items()
        if op not in (DENSE, DEPTHWISE)
    )
    if not rules:
        return model
    made = plan(model, Policy("study", rules), example=example)
    return convert(model, _with_shares(made, [str(rule.name) for rule in rules]), example=example)


def _depthwise(conv: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d)
    channels = conv.in_channels
    return nn.Conv2d(channels, channels, 3, conv.stride[0], padding=1, groups=channels, bias=False)


def _with_shares(made: Plan, wanted: Sequence[str]) -> Plan:
    """The plan with the structure of the mixed sites; all that are wanted must change."""
    decisions = []
    for decision in made:
        if decision.site.name in wanted and not decision.replaced:
            raise UnsupportedSiteError(f"{decision.site.name} stays: {decision.reason}.")
        if decision.op == _FITTED:
            decision = replace(decision, structure=equal_shares(decision.site.geometry))
        decisions.append(decision)
    return replace(made, decisions=tuple(decisions))


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
