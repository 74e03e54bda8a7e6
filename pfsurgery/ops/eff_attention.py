"""The efficient layer of transformers: two linear layers around a maximum on the token grid."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfsurgery.errors import ShapeError, UnsupportedSiteError
from pfsurgery.ops.base import Op, Support, register_op
from pfsurgery.ops.pool import MaxPool
from pfsurgery.ops.window import Window
from pfsurgery.sites import AttentionGeometry, Pair, Site

_REACH = (-1, 0, 1)
_MASKS = ("attn_mask", "attention_mask", "key_padding_mask")


class EffAttention(nn.Module):
    """Linear, GELU, 3x3 maximum on the token grid, GELU, linear: (N, L, C) to (N, L, C).

    From Han et al., ICLR 2022, where it stands in place of every second self-attention. Tokens in
    front of the grid (class, distillation, register tokens) pass around the maximum. At the border
    of the grid, padding never wins. Under a mask, as Swin's shifted windows have it, the maximum
    is taken over the neighbours that the mask lets a token attend to.

    Multiply-adds per token: 2 C width; comparisons: 8 width. Parameters: 2 C width + width + C.

    Args:
        channels: Channels C of a token.
        width: Channels between the linear layers, 3 C in the paper.
        grid: (rows, columns) of tokens. Other numbers of tokens are taken to form a grid with the
            same ratio of sides.
        prefix: Tokens in front of the grid.
        returns_pair: Return (tokens, None), as attentions do that can return their weights too.
    """

    neighbours: Tensor

    def __init__(
        self,
        channels: int,
        width: int,
        grid: Pair,
        prefix: int = 0,
        *,
        returns_pair: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.prefix = prefix
        self.returns_pair = returns_pair
        self.qkv = nn.Linear(channels, width)
        self.pool = MaxPool(Window((3, 3), padding=(1, 1)))
        self.proj = nn.Linear(width, channels)
        self.proj_drop: nn.Module = nn.Identity()
        self.register_buffer("neighbours", _neighbours(grid), persistent=False)

    def forward(self, x: Tensor, *_: Any, mask: Tensor | None = None, **further: Any) -> Any:
        """Tokens (N, L, C) to as many; further arguments concern the attention that stood here.

        Args:
            x: The tokens.
            mask: (windows, L, L), 0 where a token may look and negative elsewhere, for N = batch *
                windows.
            **further: What else the attention took.

        Raises:
            ShapeError: L does not fit the grid.
            UnsupportedSiteError: A mask of another kind is given.
        """
        if further.get("is_causal") or any(further.get(name) is not None for name in _MASKS):
            raise UnsupportedSiteError(
                "An EffAttention pools over all neighbours and cannot respect a mask of tokens: "
                "call the model without one, or keep its attention."
            )
        hidden = F.gelu(self.qkv(x))
        tokens = hidden[:, self.prefix :] if self.prefix else hidden
        pooled = self._pooled(tokens) if mask is None else self._masked(tokens, mask)
        if self.prefix:
            pooled = torch.cat((hidden[:, : self.prefix], pooled), dim=1)
        out = self.proj_drop(self.proj(F.gelu(pooled)))
        return (out, None) if self.returns_pair else out

    def _pooled(self, tokens: Tensor) -> Tensor:
        number, count, width = tokens.shape
        rows, columns = self._sides(count)
        planes = tokens.reshape(number, rows, columns, width).permute(0, 3, 1, 2)
        return self.pool(planes).permute(0, 2, 3, 1).reshape(number, count, width)  # type: ignore[no-any-return]

    def _masked(self, tokens: Tensor, mask: Tensor) -> Tensor:
        windows, count, _ = mask.shape
        own = torch.arange(count, device=tokens.device)[:, None]
        near = self.neighbours.expand(windows, -1, -1)
        near = torch.where(mask.gather(2, near) < 0, own, near)
        grouped = tokens.reshape(-1, windows, count, tokens.shape[2])
        first = torch.arange(windows, device=tokens.device)[:, None, None]
        return grouped[:, first, near].amax(3).reshape(tokens.shape)

    def _sides(self, count: int) -> Pair:
        rows, columns = self.grid
        if count == rows * columns:
            return self.grid
        ratio = math.gcd(rows, columns)
        rows, columns = rows // ratio, columns // ratio
        scale = math.isqrt(count // (rows * columns))
        if scale * scale * rows * columns != count:
            raise ShapeError(
                f"{count} tokens do not form a grid with sides {self.grid[0]}:{self.grid[1]}, "
                f"which an EffAttention was made for (and {self.prefix} tokens in front): convert "
                f"the model with an example= of the size that it will run on."
            )
        return rows * scale, columns * scale

    @torch.no_grad()
    def copy_from(self, weight: Tensor, bias: Tensor | None, output: nn.Linear) -> None:
        """Take over what can be from an attention.

        The first layer is that of query, key and value. The output layer reads the values as it
        did, and nothing else yet: attention gives it means of values, this gives it their maxima.

        Args:
            weight: Of query, key and value together, (width, C).
            bias: Theirs, (width,), if there is one.
            output: The attention's output layer.
        """
        self.qkv.weight.copy_(weight)
        self.qkv.bias.zero_() if bias is None else self.qkv.bias.copy_(bias)
        self.proj.weight.zero_()
        self.proj.weight[:, -output.in_features :] = output.weight
        self.proj.bias.zero_() if output.bias is None else self.proj.bias.copy_(output.bias)

    def extra_repr(self) -> str:
        """The grid, for printing."""
        extra = f" + {self.prefix}" if self.prefix else ""
        return f"{self.grid[0]}x{self.grid[1]}{extra} tokens"


def _neighbours(grid: Pair) -> Tensor:
    """Indices of the tokens around each one of the grid, itself for those outside, (L, 9)."""
    rows, columns = (torch.arange(side) for side in grid)
    own = rows[:, None] * grid[1] + columns
    around = []
    for down in _REACH:
        for right in _REACH:
            y, x = (rows + down)[:, None], columns + right
            inside = (y >= 0) & (y < grid[0]) & (x >= 0) & (x < grid[1])
            around.append(torch.where(inside, y * grid[1] + x, own).flatten())
    return torch.stack(around, dim=1)


class EffAttentionOp(Op):
    """Two linear layers around a 3x3 maximum on the token grid (Han et al., ICLR 2022)."""

    name = "eff_attention"
    summary = "linear, GELU, 3x3 maximum on the token grid, GELU, linear (for self-attention)"
    attention = True

    def supports(self, site: Site) -> Support:
        """Any self-attention over a grid of tokens."""
        attends = isinstance(site.geometry, AttentionGeometry)
        return Support() if attends else Support("it takes the place of attention")

    def build(self, site: Site) -> nn.Module:
        """An `EffAttention` for the site's tokens, its weights not set."""
        geometry = site.geometry
        if not isinstance(geometry, AttentionGeometry):
            raise ShapeError(f"{site.name} is no attention.")
        with torch.device("meta"):
            made = EffAttention(
                geometry.in_channels, geometry.width, geometry.grid, geometry.prefix
            )
        made = made.to_empty(device="cpu")
        made.neighbours = _neighbours(geometry.grid)
        return made

    def parameters(self, site: Site) -> int:
        """Weights and biases of the two linear layers."""
        geometry = site.geometry
        width = geometry.width if isinstance(geometry, AttentionGeometry) else 0
        return 2 * geometry.in_channels * width + width + geometry.in_channels

    def macs_per_position(self, site: Site) -> int:
        """Multiply-adds of the two linear layers for one token."""
        geometry = site.geometry
        width = geometry.width if isinstance(geometry, AttentionGeometry) else 0
        return 2 * geometry.in_channels * width


register_op(EffAttentionOp())
