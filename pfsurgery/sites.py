"""Frozen facts about the places of a model where surgery is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any, Literal

from torch import nn

Pair = tuple[int, int]
Size = tuple[int, ...]  # one number an axis: (length,), (height, width) or (depth, height, width)
Kind = Literal["depthwise", "grouped", "dense", "pointwise", "attention"]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # by number of axes
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a spatial convolution computes, without its weights.

    Sizes have one number an axis: (height, width) for images, (length,) for signals, (depth,
    height, width) for volumes.

    Attributes:
        in_channels: Channels read.
        out_channels: Channels written.
        kernel_size: (height, width) in pixels.
        stride: (vertical, horizontal) in pixels.
        padding: (vertical, horizontal) pixels on each side, or `"same"`: as many as give
            ceil(size / stride) outputs, an odd one at the bottom or right (TensorFlow's rule, which
            is PyTorch's `padding="same"` at stride 1).
        dilation: (vertical, horizontal) distance of two taps in pixels.
        groups: Number of independent channel groups.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        bias: Whether a bias is added.
        transposed: It is a transposed convolution, whose stride enlarges its input.
    """

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Size | Literal["same"] = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    transposed: bool = False

    @property
    def dims(self) -> int:
        """Axes that the kernel slides along: 2 for images."""
        return len(self.kernel_size)

    @property
    def strided(self) -> bool:
        """Whether it skips positions along some axis."""
        return any(step != 1 for step in self.stride)

    @property
    def kind(self) -> Kind:
        """`"depthwise"` (a filter a channel), `"grouped"`, `"dense"` or `"pointwise"` (1x1)."""
        if self.groups == 1:
            return "pointwise" if set(self.kernel_size) == {1} else "dense"
        return "depthwise" if self.groups == self.in_channels else "grouped"

    @property
    def parameters(self) -> int:
        """Number of weights, bias included."""
        return self.macs_per_position + (self.out_channels if self.bias else 0)

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds at one output position (equals the number of weights without bias)."""
        return self.out_channels * (self.in_channels // self.groups) * prod(self.kernel_size)

    def pads(self, size: Size) -> tuple[Pair, ...]:
        """((top, bottom), (left, right)) pixels of padding for an input of (H, W) pixels."""
        if self.padding != "same":
            return tuple((pixels, pixels) for pixels in self.padding)
        return tuple(
            _same_padding(s, k, t, d)
            for s, k, t, d in zip(size, self.kernel_size, self.stride, self.dilation, strict=True)
        )

    def output_size(self, size: tuple[int, int]) -> Pair:
        """Rows and columns of the output for an input of (H, W) pixels."""
        rows, columns = (
            (n + sum(pad) - d * (k - 1) - 1) // s + 1
            for n, pad, k, s, d in zip(
                *(size, self.pads(size), self.kernel_size, self.stride, self.dilation), strict=True
            )
        )
        return rows, columns

    def __str__(self) -> str:
        """For example `3x3 s2 64->128 g32`."""
        parts = ["x".join(map(str, self.kernel_size))]
        for letter, steps in (("s", self.stride), ("d", self.dilation)):
            if any(step != 1 for step in steps):
                parts.append(
                    letter + "x".join(map(str, steps if len(set(steps)) > 1 else steps[:1]))
                )
        same = self.in_channels == self.out_channels
        parts.append(f"{self.in_channels}" if same else f"{self.in_channels}->{self.out_channels}")
        if self.groups not in (1, self.in_channels):
            parts.append(f"g{self.groups}")
        if self.transposed:
            parts.append("transposed")
        return " ".join(parts)


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> Pair:
    total = max((ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True, slots=True)
class AttentionGeometry(Geometry):
    """What a self-attention computes, as a geometry: each token reads the whole grid of tokens.

    `in_channels` and `out_channels` are those of a token, `kernel_size` is the grid.

    Attributes:
        width: Query, key and value channels together: 3 * `in_channels` as a rule.
        heads: Number of heads.
        grid: (rows, columns) of tokens in the image, or in the window that attention is limited
            to; (0, 0) where the tokens form no grid.
        prefix: Tokens in front of the grid: class, distillation and register tokens. All tokens
            where there is no grid.
        block: Which attention of its stage it is, counted from 0; a stage is a run of attentions
            with the same channels.
        weights: Parameters of the whole module, position tables included.
    """

    width: int = 0
    heads: int = 1
    grid: Pair = (0, 0)
    prefix: int = 0
    block: int = 0
    weights: int = 0

    @property
    def kind(self) -> Kind:
        """`"attention"`."""
        return "attention"

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole module."""
        return self.weights

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds for one token: query, key, value, two products with all, and the output."""
        inner = self.width // 3
        tokens = self.grid[0] * self.grid[1] + self.prefix
        return self.in_channels * self.width + 2 * tokens * inner + inner * self.out_channels

    def __str__(self) -> str:
        """For example `14x14+1 tokens 192 h3`."""
        if not self.grid[0]:
            return f"{self.prefix} tokens {self.in_channels} h{self.heads}"
        extra = f"+{self.prefix}" if self.prefix else ""
        return f"{self.grid[0]}x{self.grid[1]}{extra} tokens {self.in_channels} h{self.heads}"


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What stands around a site in the data flow; names are module paths, None where absent.

    Attributes:
        norm: Norm behind the convolution.
        activation: Activation behind the convolution (behind its norm, where it has one).
        pointwise_before: 1x1 convolution or linear layer that feeds the site, with nothing but
            norms and activations between.
        pointwise_after: The one that mixes the site's channels next; gates such as
            squeeze-and-excitation may stand between.
        branch: Module that holds the branch which the site sits in: the innermost one whose
            output is added to a shortcut.
        tail: The norm and the activation, where nothing but this site leads to them: what
            `tail="drop"` turns into `nn.Identity`.
        tail_parameters: How many parameters the tail has.
        merge: Module that reads the sum of the site's output (behind its norm) and a shortcut, None
            where nothing is added or something else stands between.
    """

    norm: str | None = None
    activation: str | None = None
    pointwise_before: str | None = None
    pointwise_after: str | None = None
    branch: str | None = None
    tail: tuple[str, ...] = ()
    tail_parameters: int = 0
    merge: str | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """One place where surgery is possible: a spatial convolution (kernel larger than one pixel).

    Or, where those were asked for, a pointwise convolution or a self-attention, whose shapes are
    those of its tokens: (N, L, C).

    Attributes:
        name: Its first module path, as in `named_modules()`.
        names: All its paths; more than one where a module is shared.
        module: Qualified name of the module's class.
        geometry: What it computes.
        input_shape: (N, C, H, W) at its first call with the example input; (N, C, L) of a 1-D one.
        output_shape: (N, C', H', W') at its first call.
        calls: How often one forward pass calls it.
        positions: Output positions of all calls for one forward pass of the example, N included;
            input positions where it is transposed.
        stage: Index of its resolution stage, 0 for the finest output resolution.
        depth: Where it stands in the network, from 0 up to 1: stage / number of stages, or, where
            all sites share one resolution (and for attentions), its rank in the order of execution.
        neighbours: What stands around it.
        stem: It reads the model's input.
        output: It feeds the model's output, with nothing but reshaping between.
        blocked: Why nothing can take its place, None where an op may.
        images: Images of the example; N is more where the model cuts them into tiles or frames.
    """

    name: str
    names: tuple[str, ...]
    module: str
    geometry: Geometry
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int = 1
    positions: int = 0
    stage: int = 0
    depth: float = 0.0
    neighbours: Neighbours = field(default_factory=Neighbours)
    stem: bool = False
    output: bool = False
    blocked: str | None = None
    images: int = 1

    @property
    def kind(self) -> Kind:
        """`"depthwise"`, `"grouped"`, `"dense"`; `"pointwise"`, `"attention"` if asked for."""
        return self.geometry.kind

    @property
    def bottleneck(self) -> bool:
        """Whether pointwise convolutions stand on both sides."""
        around = self.neighbours
        return around.pointwise_before is not None and around.pointwise_after is not None

    @property
    def macs(self) -> int:
        """Multiply-adds of all calls in one forward pass of the example."""
        return self.geometry.macs_per_position * self.positions

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON-ready values."""
        return _to_json(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Site:
        """The site that `to_dict` wrote.

        Raises:
            KeyError: A fact is missing.
            TypeError: A fact has an unknown name.
        """
        values = {key: _tuples(value) for key, value in values.items()}
        geometry = _tuples_inside(values["geometry"])
        values["geometry"] = (AttentionGeometry if "heads" in geometry else Geometry)(**geometry)
        values["neighbours"] = Neighbours(**_tuples_inside(values["neighbours"]))
        return cls(**values)


def _to_json(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {key: _to_json(getattr(value, key)) for key in value.__dataclass_fields__}
    return list(value) if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tuples_inside(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _tuples(value) for key, value in values.items()}


# Classes whose geometry is known, by qualified name so that no library is imported. What they do to
# their weights does not matter to an op without weights. The value says whether the class pads
# dynamically, the way "same" is defined here; None that each of its modules says so.
_KNOWN_CONVOLUTIONS = {
    "torch.nn.modules.conv.Conv1d": False,
    "torch.nn.modules.conv.Conv2d": False,
    "torch.nn.modules.conv.Conv3d": False,
    "timm.layers.conv2d_same.Conv2dSame": True,
    "timm.layers.conv2d_same.Conv2dSameExport": True,
    "timm.layers.std_conv.StdConv2d": False,
    "timm.layers.std_conv.StdConv2dSame": None,
    "timm.layers.std_conv.ScaledStdConv2d": False,
    "timm.layers.std_conv.ScaledStdConv2dSame": None,
    "transformers.models.align.modeling_align.AlignVisionDepthwiseConv2d": False,
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d": None,
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d": False,
}


def class_name(module: nn.Module) -> str:
    """Module path and name of `module`'s class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def convolves(module: nn.Module) -> bool:
    """Whether `module` is a convolution of any kind: of 1 to 3 axes, transposed, quantised."""
    return isinstance(module, Convolution | Transposed) or is_quantised(module)


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is one of PyTorch's quantised or fake-quantised convolutions."""
    ours = any(base.__module__.startswith("torch.ao.nn.") for base in type(module).__mro__)
    return ours and hasattr(module, "kernel_size")


def is_known_convolution(module: nn.Module) -> bool:
    """Whether the exact class of `module` is one whose geometry is known."""
    return class_name(module) in _KNOWN_CONVOLUTIONS


def register_convolution(cls: type[nn.Conv2d], *, same: bool = False) -> None:
    """Declare that `cls`, a subclass of `nn.Conv2d`, may be replaced.

    Args:
        cls: The class. Its attributes must mean what they mean on `nn.Conv2d`.
        same: It pads its input itself, to ceil(size / stride) outputs, an odd pixel at the bottom
            or right.
    """
    _KNOWN_CONVOLUTIONS[f"{cls.__module__}.{cls.__qualname__}"] = same


def geometry_of(conv: nn.Module) -> Geometry:
    """The geometry of what `convolves`; of an unknown subclass, as its attributes state it."""
    settings: Any = conv
    same = _KNOWN_CONVOLUTIONS.get(class_name(conv), False)
    if same is None:
        padded_before = getattr(conv, "pad", None)  # by Hugging Face's BiT
        same = bool(getattr(conv, "same_pad", False)) or padded_before is not None
    padding: Size | Literal["same"]
    if same or settings.padding == "same":
        padding = "same"
    elif settings.padding == "valid":
        padding = (0,) * len(settings.kernel_size)
    else:
        padding = _size(settings.padding)
    bias = settings.bias() if callable(settings.bias) else settings.bias
    return Geometry(
        in_channels=settings.in_channels,
        out_channels=settings.out_channels,
        kernel_size=_size(settings.kernel_size),
        stride=_size(settings.stride),
        padding=padding,
        dilation=_size(settings.dilation),
        groups=settings.groups,
        padding_mode=settings.padding_mode,
        bias=bias is not None,
        transposed=bool(getattr(settings, "transposed", False)),
    )


def _size(values: Sequence[int]) -> Size:
    return tuple(int(value) for value in values)
