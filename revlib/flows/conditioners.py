"""Sub-networks of couplings: a perceptron for vectors, convolutional networks for images.

The last layer of each starts as zero, so that a coupling starts as the identity, or with
`scale="sigmoid"` near it. A ReLU writes over what it is given where that is the result of a
convolution, which no gradient needs. Nothing writes over the input: it is the coupling's stream.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib.functional._checks import check_integer

LARGEST = 2**31


class MLP(nn.Module):
    """A multilayer perceptron that starts as zero: the conditioner for vectors.

    Args:
        c_in: The number of input features.
        c_out: The number of output features.
        hidden: The width of each hidden layer.
        context_features: The number of features of the context, 0 for none.
        activation: Builds what follows a hidden layer, called without arguments.

    Shape:
        The input is [batch, c_in], the output [batch, c_out]. The context, [batch,
        context_features], is appended to the input.

    Raises:
        ValueError: If the input or the context has another shape, or if there is a context
            where none was announced, or none where one was.

    References:
        NICE (Dinh et al., 2015), section 5.1, https://arxiv.org/abs/1410.8516

    Example:
        >>> net = revlib.flows.MLP(3, 6, hidden=(32, 32), context_features=2)
        >>> net(torch.randn(5, 3), torch.randn(5, 2)).shape
        torch.Size([5, 6])
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        hidden: Sequence[int] = (64, 64),
        context_features: int = 0,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        check_sizes("MLP", c_in=c_in, c_out=c_out)
        check_integer("MLP", "context_features", context_features, 0, LARGEST)
        if not isinstance(hidden, Sequence):
            raise TypeError(f"MLP: hidden must be a sequence of widths; got {hidden!r}")
        for i, width in enumerate(hidden):
            check_sizes("MLP", **{f"hidden[{i}]": width})
        if isinstance(activation, nn.Module) or not callable(activation):
            raise TypeError(
                "MLP: activation must build a module when it is called without arguments, such "
                f"as nn.ReLU; got {activation!r}"
            )
        self.c_in = c_in
        self.context_features = context_features
        widths = [c_in + context_features, *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        self.layers = nn.Sequential(*layers, starting_as_zero(nn.Linear(widths[-1], c_out)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_shape("MLP", "x", x, ("batch", self.c_in))
        check_presence("MLP", context, "context_features", self.context_features)
        if context is None:
            return self.layers(x)
        check_shape("MLP", "context", context, (len(x), self.context_features))
        return self.layers(torch.cat((x, context), 1))


class ResidualConvNet(nn.Module):
    """A residual network that keeps height and width and starts as zero, as RealNVP uses it.

    A 3x3 convolution, pre-activation residual blocks of two 3x3 convolutions, ReLU, and a 1x1
    convolution that starts as zero.

    Unlike the paper's, the network has no normalization. Batch normalization would make the
    density of a sample depend on the rest of its batch in training, and be another function in
    evaluation; weight normalization would leave the functions the same, and only how they are
    learned would change. The authors' code also feeds the input with both signs and the mask,
    and sums a 1x1 convolution of every block's output before the last layer.

    Args:
        c_in: The number of input channels.
        c_out: The number of output channels.
        hidden: The number of channels in between.
        blocks: The number of residual blocks.
        context_channels: The number of channels of the context, 0 for none.

    Shape:
        The input is [batch, c_in, height, width], the output [batch, c_out, height, width]. A 1x1
        convolution of the context is added to the result of the first convolution; the context
        is [batch, context_channels, height, width], or without height and width the same at
        every pixel. Of a context whose height and width are multiples of the input's, such as an
        image at the resolution of the data on a level that is smaller, averages are taken.

    Raises:
        ValueError: As for :class:`revlib.flows.MLP`.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803

    Example:
        >>> net = revlib.flows.ResidualConvNet(3, 6, hidden=16)
        >>> net(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 6, 8, 8])
    """

    def __init__(
        self, c_in: int, c_out: int, hidden: int = 64, blocks: int = 2, context_channels: int = 0
    ) -> None:
        super().__init__()
        check_sizes("ResidualConvNet", c_in=c_in, c_out=c_out, hidden=hidden, blocks=blocks)
        self.first = ConvWithContext("ResidualConvNet", c_in, hidden, context_channels)
        self.blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(blocks))
        self.last = starting_as_zero(nn.Conv2d(hidden, c_out, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x, context)
        # Not as an nn.Sequential, which would hold the first h to the end: one more at the peak.
        for block in self.blocks:
            h = block(h)
        return self.last(h.relu_())


class GlowConvNet(nn.Module):
    """The three convolutions of Glow's couplings, of which the last one starts as zero.

    A 3x3 convolution, ReLU, a 1x1 convolution, ReLU, and a 3x3 convolution.

    This is the network that the paper describes. The authors' code has activation normalization
    in place of the first two biases and a learned factor exp(3 s) on each output channel, neither
    of which changes what functions the network can be; and for each 3x3 convolution an input
    channel that marks the border of the image.

    Args:
        c_in: The number of input channels.
        c_out: The number of output channels.
        hidden: The number of channels in between.
        context_channels: The number of channels of the context, 0 for none.

    Shape:
        As for :class:`revlib.flows.ResidualConvNet`.

    Raises:
        ValueError: As for :class:`revlib.flows.MLP`.

    References:
        Glow (Kingma and Dhariwal, 2018), section B, https://arxiv.org/abs/1807.03039

    Example:
        >>> net = revlib.flows.GlowConvNet(3, 6, hidden=16, context_channels=2)
        >>> net(torch.randn(5, 3, 8, 8), torch.randn(5, 2)).shape
        torch.Size([5, 6, 8, 8])
    """

    def __init__(
        self, c_in: int, c_out: int, hidden: int = 512, context_channels: int = 0
    ) -> None:
        super().__init__()
        check_sizes("GlowConvNet", c_in=c_in, c_out=c_out, hidden=hidden)
        self.first = ConvWithContext("GlowConvNet", c_in, hidden, context_channels)
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.last = starting_as_zero(nn.Conv2d(hidden, c_out, 3, padding=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.middle(self.first(x, context).relu_()).relu_())


class ResidualBlock(nn.Module):
    """ReLU and 3x3 convolution, twice, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x.relu()).relu_())


class ConvWithContext(nn.Module):
    """A 3x3 convolution of the input, plus a 1x1 convolution of the context if there is one.

    A context that is larger is averaged to the size of the input.
    """

    def __init__(self, net: str, c_in: int, c_out: int, context_channels: int) -> None:
        super().__init__()
        check_integer(net, "context_channels", context_channels, 0, LARGEST)
        self.net = net
        self.context_channels = context_channels
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        if context_channels:
            self.context_conv = nn.Conv2d(context_channels, c_out, 1, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_shape(self.net, "x", x, ("batch", self.conv.in_channels, "height", "width"))
        check_presence(self.net, context, "context_channels", self.context_channels)
        if context is None:
            return self.conv(x)
        vector = (len(x), self.context_channels)
        check_shape(self.net, "context", context, vector, (*vector, "height", "width"))
        if context.ndim == 2:
            context = context[:, :, None, None]
        elif context.shape[2:] != x.shape[2:]:
            context = averaged(self.net, context, *x.shape[2:])
        return self.conv(x) + self.context_conv(context)


def averaged(net: str, context: Tensor, height: int, width: int) -> Tensor:
    """Takes the means of rectangles, so that the context gets the height and width."""
    for size, wanted in zip(context.shape[2:], (height, width), strict=True):
        if size < wanted or size % wanted:
            raise ValueError(
                f"{net}: height and width of context must be those of x, {height} and {width}, or "
                f"multiples of them; got {context.shape[2]} and {context.shape[3]}"
            )
    # Not adaptive_avg_pool2d, whose gradient on a GPU is not deterministic.
    return F.avg_pool2d(context, (context.shape[2] // height, context.shape[3] // width))


def starting_as_zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def check_sizes(net: str, **sizes: int) -> None:
    for name, size in sizes.items():
        check_integer(net, name, size, 1, LARGEST)


def check_presence(net: str, context: Tensor | None, name: str, size: int) -> None:
    """Raises where there is a context that the network was not built for, or the reverse."""
    if (context is not None) != (size > 0):
        rule = "given" if size else "None"
        got = "None" if context is None else f"one of shape {list(context.shape)}"
        raise ValueError(f"{net}: context must be {rule}, for {name} is {size}; got {got}")


def check_shape(net: str, name: str, x: Tensor, *allowed: tuple[int | str, ...]) -> None:
    """Raises where `x` has none of the allowed shapes, in which a name stands for any size."""
    for shape in allowed:
        if x.ndim == len(shape) and all(
            isinstance(want, str) or got == want for got, want in zip(x.shape, shape, strict=True)
        ):
            return
    shapes = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in allowed)
    raise ValueError(f"{net}: {name} must be {shapes}; got {list(x.shape)}")
