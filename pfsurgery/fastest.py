"""The policy `fastest`: an op only where it is measured faster than the convolution."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from pfsurgery.measure.latency import latency
from pfsurgery.plan import Decision, decide
from pfsurgery.policy import KEEP, Rule, register_policy
from pfsurgery.rewrite import replacement
from pfsurgery.sites import CONVOLUTIONS, Site

_ROUNDS = 15
_MARGIN = 0.97  # of the convolution's time; nearer is noise


@dataclass(frozen=True, slots=True)
class Fastest:
    """Max-pooling wherever that is faster than the convolution, alone, on the model's device.

    Each site is timed with random weights at its own input size, its op (with the pointwise
    convolution that it needs) and the convolution in turns, channels innermost.

    Attributes:
        name: What the registry and the plan call it.
        op: Name of the op.
        summary: One line for listings.
        device: Where to time; set by `on`.
        dtype: In which dtype; set by `on`.
    """

    name: str = "fastest"
    op: str = "max_pool"
    summary: str = "max_pool where it is measured faster than the convolution, on this device"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def attention(self) -> bool:
        """Self-attentions are no sites for it."""
        return False

    def on(self, model: nn.Module) -> Fastest:
        """The policy that times on the device and in the dtype of `model`."""
        parameter = next(model.parameters(), torch.empty(0))
        return replace(self, device=parameter.device, dtype=parameter.dtype)

    def decide(self, site: Site) -> Rule | None:
        """The op where it is faster; kept, with both times, where it is not."""
        rule = Rule(self.op)
        decision = decide(site, rule)
        if not decision.replaced:
            return rule
        before, after = self._times(site, decision)
        told = f"{after:.4g} ms in place of {before:.4g}"
        return replace(rule, op=self.op if after < _MARGIN * before else KEEP, why=told)

    def _times(self, site: Site, decision: Decision) -> tuple[float, float]:
        """The ms of the convolution and of what would take its place."""
        geometry = site.geometry
        with torch.random.fork_rng(devices=[]):
            convolution = CONVOLUTIONS[geometry.dims](
                geometry.in_channels,
                geometry.out_channels,
                geometry.kernel_size,
                geometry.stride,
                geometry.padding if geometry.padding != "same" else _half(geometry.kernel_size),
                geometry.dilation,
                geometry.groups,
                bias=geometry.bias,
            )
        pair = {"before": convolution, "after": replacement(decision, copy.deepcopy(convolution))}
        x = torch.zeros(site.input_shape, device=self.device, dtype=self.dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        for module in pair.values():
            module.eval().to(self.device, self.dtype)
            if x.ndim == 4:
                module.to(memory_format=torch.channels_last)
        taken = latency(pair, x, repeats=_ROUNDS)
        return taken["before"].median_ms, taken["after"].median_ms


def _half(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // 2 for size in kernel_size)


register_policy(Fastest())
