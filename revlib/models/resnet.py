"""Pre-activation ResNets, the twins that RevNets are compared with."""

from collections.abc import Sequence

from torch import Tensor, nn

from revlib.models.checks import check_at_least, check_dropout
from revlib.models.residual import (
    block_shapes,
    check_stages,
    head,
    initialize,
    residual_function,
    shortcut,
    stem,
)


class ResidualBlock(nn.Module):
    """Adds a residual function to the identity path: `y = shortcut(x) + f(x)`."""

    def __init__(self, f: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.f(x)


class ResNet(nn.Module):
    """A residual classifier, of any number of stages.

    Args:
        units: The number of residual blocks of each stage.
        widths: The channels of the stem and of each stage (before the bottleneck's factor 4).
        bottleneck: Whether residual functions are bottlenecks, with outputs 4 times as wide.
        num_classes: The number of classes.
        in_channels: The channels of the images.
        dropout: The probability of dropout inside the residual functions.
        large_images: Whether it is built as for ImageNet: the stem takes height and width to a
            quarter, and a shortcut that changes its shape is a 1x1 convolution.

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
        large_images: bool = False,
    ) -> None:
        super().__init__()
        units, widths = check_stages(units, widths)
        check_at_least(1, num_classes=num_classes, in_channels=in_channels)
        check_dropout(dropout)
        self.stem = stem(in_channels, widths[0], large_images=large_images)
        blocks = []
        for c_in, c_out, stride in block_shapes(units, widths, bottleneck):
            f = residual_function(
                c_in, c_out, stride=stride, bottleneck=bottleneck, dropout=dropout
            )
            blocks.append(ResidualBlock(f, shortcut(c_in, c_out, stride, learned=large_images)))
        self.trunk = nn.Sequential(*blocks)
        self.head = head(c_out, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(x)))
