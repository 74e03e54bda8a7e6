"""Every reason for which a site may be kept, in one closed list: none of them is a catch-all.

The sweep's report, and the tests, fail on a reason that is not in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason.

    Attributes:
        pattern: A regular expression that matches the whole of what a plan says.
        said: The same without the names of one model.
        holds: What is so at each site that is kept for it.
        usual: A policy keeps such a site in nearly every network.
    """

    pattern: str
    said: str
    holds: str
    usual: bool = False


REASONS = (
    Reason(
        r"stem: it reads the model's input",
        "stem: it reads the model's input",
        "no layer with weights stands between the image and it",
        usual=True,
    ),
    Reason(
        r"it feeds the model's output",
        "it feeds the model's output",
        "neither a layer with weights, a norm nor a global pooling stands between it and an output",
        usual=True,
    ),
    Reason(
        r"it has a single channel: a filter along a vector, as in channel attention",
        "it has a single channel: a filter along a vector, as in channel attention",
        "a 1-D convolution of one channel, such as ECA's gate",
    ),
    Reason(
        r"it is transposed: it enlarges its input, which no pool or shift does",
        "it is transposed: it enlarges its input, which no pool or shift does",
        "a transposed convolution with a stride",
    ),
    Reason(
        r"it is transposed, though without a stride: write it as a convolution of the flipped "
        r"kernel before converting",
        "it is transposed, though without a stride: write it as a convolution of the flipped "
        "kernel before converting",
        "a transposed convolution with a stride of 1",
    ),
    Reason(
        r"a fixed filter inside \S+, without weights of its own",
        "a fixed filter inside a module, without weights of its own",
        "the module has no parameters: anti-aliasing, a Sobel filter",
    ),
    Reason(
        r"the filters of \S+ are mixed anew for each image, by weights passed to it",
        "the filters of a module are mixed anew for each image, by weights passed to it",
        "timm's CondConv2d",
    ),
    Reason(
        r"a functional \S+ in the code of \S+: there is no module to replace; in a graph "
        r"there is: convert torch\.export\.export\(model, \(example,\)\)\.module\(\)",
        "a functional convolution in the code of a module: there is no module to replace; in a "
        "graph there is",
        "the module that calls it has parameters, and is no convolution",
    ),
    Reason(
        r"\S+ on what the graph computes, never trains or also reads elsewhere",
        "a convolution in a graph, of what the graph computes, never trains or also reads",
        "only in a torch.fx.GraphModule",
    ),
    Reason(
        r"its weight is parametrised; remove the parametrisation before converting",
        "its weight is parametrised; remove the parametrisation before converting",
        "weight norm, spectral norm and the like",
    ),
    Reason(
        r"\S+ is a subclass of Conv\dd that may do more than convolve; declare it with "
        r"pfsurgery\.register_convolution if it does not",
        "a class that is a subclass of a convolution, and may do more than convolve",
        "the class is neither torch's nor one that was looked at",
    ),
    Reason(
        r"its weight is also read by the code of (\S+|the model itself)",
        "its weight is also read by the code of another module",
        "a forward pass reads the weight outside the convolution",
    ),
    Reason(
        r"its weight is shared with \S+",
        "its weight is shared with another module",
        "another module holds the same parameter",
    ),
    Reason(
        r"it is quantised; convert the floating-point model, and quantise what comes out",
        "it is quantised; convert the floating-point model, and quantise what comes out",
        "its weights are integers",
    ),
    Reason(
        r"max_pool: padding \d+ around a kernel that spans \d+ pixels: border windows could hold "
        r"nothing but padding",
        "max_pool: padding around a kernel: border windows could hold nothing but padding",
        "more padding than half the kernel, or a dilated even one",
    ),
    Reason(
        r"max_pool: a dilated even kernel with 'same' padding can miss every pixel",
        "max_pool: a dilated even kernel with 'same' padding can miss every pixel",
        "as it says",
    ),
)


def reason_of(text: str) -> Reason | None:
    """The reason that `text` gives, None where the list has none such."""
    return next((reason for reason in REASONS if re.fullmatch(reason.pattern, text)), None)
