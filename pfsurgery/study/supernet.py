"""A network in which every bottleneck has all candidate operations, and a weight for each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pfsurgery.modules import get_module, set_module
from pfsurgery.sites import Site
from pfsurgery.study.networks import DENSE, DEPTHWISE, depthwise, parameter_free


class Choice(nn.Module):
    """A weighted sum of candidates: (N, C, H, W) to (N, C, H', W').

    The weights are a softmax over `logits`. Each candidate ends in a norm without weights, so that
    none is chosen for the size of its numbers, and trained ones in an activation.

    Args:
        candidates: Modules by name, all of one output shape.
    """

    def __init__(self, candidates: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict(candidates)
        self.logits = nn.Parameter(torch.zeros(len(candidates)))

    def forward(self, x: Tensor) -> Tensor:
        """The candidates' outputs, weighted and added."""
        weights = self.logits.softmax(0)
        outputs = [candidate(x) for candidate in self.candidates.values()]
        mixed: Tensor = weights[0] * outputs[0]
        for weight, output in zip(weights[1:], outputs[1:], strict=True):
            mixed = mixed + weight * output
        return mixed

    def weights(self) -> dict[str, float]:
        """Probability of each candidate."""
        return dict(zip(self.candidates, self.logits.softmax(0).tolist(), strict=True))


def supernet(
    dense: nn.Module, sites: Sequence[Site], candidates: Sequence[str], *, seed: int
) -> nn.Module:
    """A copy of a dense network with a `Choice` at each of the sites.

    Args:
        dense: From `networks.dense_network`.
        sites: Where to choose.
        candidates: As `networks.with_operations` takes them.
        seed: Of the weights of depthwise convolutions.

    Raises:
        UnsupportedSiteError: A candidate cannot stand at a site.
        UnknownNameError: There is no such op.
    """
    model = copy.deepcopy(dense)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for site in sites:
            conv = get_module(model, site.name)
            made = {op: _candidate(op, site, conv) for op in candidates}
            set_module(model, site.name, Choice(made))
            for name in site.neighbours.tail:
                set_module(model, name, nn.Identity())
    return model


def choices(model: nn.Module) -> list[Choice]:
    """The choices of a supernet, from the input to the output."""
    return [module for module in model.modules() if isinstance(module, Choice)]


def _candidate(op: str, site: Site, conv: nn.Module) -> nn.Module:
    norm = nn.BatchNorm2d(site.geometry.out_channels, affine=False)
    if op in (DENSE, DEPTHWISE):
        trained = depthwise(conv) if op == DEPTHWISE else copy.deepcopy(conv)
        return nn.Sequential(trained, norm, nn.ReLU())
    return nn.Sequential(parameter_free(site, op), norm)
