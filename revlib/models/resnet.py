"""CIFAR-style pre-activation ResNets, the twins that RevNets are compared with."""

from collections.abc import Sequence

from torch import Tensor, nn

from revlib.models.residual import Shortcut, head, initialize, residual_function, stem


class ResidualBlock(nn.Module):
    """Adds a residual function to the identity path: `y = shortcut(x) + f(x)`."""

    def __init__(self, f: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.f(x)


class ResNet(nn.Module):
    """A residual classifier of small images, with three or more stages.

    Args:
        units: The number of residual blocks of each stage.
        widths: The channels of the stem and of each stage (before the bottleneck's factor 4).
        bottleneck: Whether residual functions are bottlenecks, with outputs 4 times as wide.
        num_classes: The number of classes.
        in_channels: The channels of the images.
        dropout: The probability of dropout inside the residual functions.

    Shape:
        Images `[batch, in_channels, height, width]` to logits `[batch, num_classes]`. Every
        stage but the first halves height and width.

    References:
        Deep Residual Learning (He et al., 2016), https://arxiv.org/abs/1512.03385

    Example:
        >>> model = revlib.models.ResNet((1, 1, 1), (16, 16, 32, 64))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        units: Sequence[int],
        widths: Sequence[int],
        *,
        bottleneck: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = stem(in_channels, widths[0])
        blocks, c_in = [], widths[0]
        for stage, (depth, width) in enumerate(zip(units, widths[1:], strict=True)):
            c_out = 4 * width if bottleneck else width
            for unit in range(depth):
                stride = 2 if stage > 0 and unit == 0 else 1
                f = residual_function(
                    c_in, c_out, stride=stride, bottleneck=bottleneck, dropout=dropout
                )
                changes = stride > 1 or c_in != c_out
                shortcut = Shortcut(c_in, c_out, stride) if changes else nn.Identity()
                blocks.append(ResidualBlock(f, shortcut))
                c_in = c_out
        self.trunk = nn.Sequential(*blocks)
        self.head = head(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(x)))
