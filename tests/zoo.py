"""Small networks, each with one trap that surgery must not fall into."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm_act(inputs: int, outputs: int, **kwargs) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False, **kwargs),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Plain(nn.Module):
    """A stem, a dense and a strided site, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm_act(3, 8)
        self.dense = conv_norm_act(8, 8)
        self.down = conv_norm_act(8, 16, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.dense(self.stem(x))).mean((2, 3)))


class CalledTwice(Plain):
    """One module, two calls with different sizes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(self.stem(x))
        x = self.dense(F.max_pool2d(x, 2))
        return self.head(self.down(x).mean((2, 3)))


class Aliased(Plain):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.dense


class SharedActivation(nn.Module):
    """A bottleneck whose single activation module is called three times, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm_act(3, 16)
        self.reduce = nn.Conv2d(16, 8, 1)
        self.norm1 = nn.BatchNorm2d(8)
        self.spatial = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.relu(self.norm1(self.reduce(x)))
        y = self.relu(self.norm2(self.spatial(y)))
        return self.head(self.relu(x + self.expand(y)).mean((2, 3)))


class InPlaceAfter(nn.Module):
    """The site's input is read again after an in-place activation behind the site."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.act(self.depthwise(x)) + x)


class MyConv(nn.Conv2d):
    """A subclass that does more than convolve."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Subclassed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.dense[0] = MyConv(8, 8, 3, padding=1)


class WeightReader(Plain):
    """Code outside the convolution reads its weight."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.dense[0].weight, padding=1)
        return self.head(self.down(self.dense(x)).mean((2, 3)))


class Functional(Plain):
    """A convolution without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.weight, padding=1)
        return self.head(self.down(self.dense(x)).mean((2, 3)))


class DenseOutput(nn.Module):
    """A network whose last convolution is its output, as in segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm_act(3, 8)
        self.body = conv_norm_act(8, 8)
        self.out = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.out(self.body(self.stem(x)))}


class DataDependent(Plain):
    """Control flow that depends on values, so that no trace without data can follow it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.abs().mean().item() >= 0:
            x = self.dense(x)
        return self.head(self.down(x).mean((2, 3)))


class ReadsGeometry(Plain):
    """Code outside the convolution reads its attributes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        margin = self.dense[0].kernel_size[0] // 2
        x = self.dense(F.pad(x, (margin,) * 4))
        return self.head(self.down(x).mean((2, 3)))


class Parametrized(Plain):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.dense[0])


TRAPS = (
    Plain,
    CalledTwice,
    Aliased,
    SharedActivation,
    InPlaceAfter,
    Subclassed,
    WeightReader,
    Functional,
    DenseOutput,
    DataDependent,
    ReadsGeometry,
    Parametrized,
)
EXAMPLE = torch.zeros(1, 3, 16, 16)
