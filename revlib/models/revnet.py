"""CIFAR-style RevNets: ResNets whose residual blocks are additive couplings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revlib.autograd import Policy
from revlib.coupling import AdditiveCoupling
from revlib.models.residual import (
    Shortcut,
    block_shapes,
    head,
    initialize,
    residual_function,
    stem,
)
from revlib.sequential import ReversibleSequential


class Transition(nn.Module):
    r"""A coupling whose identity path loses detail, so that it has no inverse.

    .. math:: y_1 = s(x_1) + f(x_2), \qquad y_2 = s(x_2) + g(y_1)

    It stands where a stage changes the number of channels or the resolution.
    """

    def __init__(self, f: nn.Module, g: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = self.shortcut(x1) + self.f(x2)
        y2 = self.shortcut(x2) + self.g(y1)
        return torch.cat((y1, y2), 1)


class RevNet(nn.Module):
    """A reversible residual classifier of small images, of any number of stages.

    All couplings between two transitions are rebuilt in backward; the stem, the transitions
    and the head are stored. So memory grows with the number of stages, not of blocks.

    Args:
        units: The number of couplings of each stage.
        widths: The channels of the stem and of each stage, both halves together (before the
            bottleneck's factor 4).
        bottleneck: Whether residual functions are bottlenecks, with outputs 4 times as wide.
        num_classes: The number of classes.
        in_channels: The channels of the images.
        dropout: The probability of dropout inside the residual functions.
        policy: The policy of the couplings.
        exact: As for :class:`revlib.ReversibleSequential`.

    Shape:
        Images `[batch, in_channels, height, width]` to logits `[batch, num_classes]`. Every
        stage but the first halves height and width.

    References:
        The Reversible Residual Network (Gomez et al., 2017),
        https://arxiv.org/abs/1707.04585

    Example:
        >>> model = revlib.models.RevNet((2, 2, 2), (32, 32, 64, 112))
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
        policy: Policy = "rebuild",
        exact: bool = False,
    ) -> None:
        super().__init__()
        if any(width % 2 for width in widths):
            raise ValueError(f"widths must be even, to be split in halves; got {tuple(widths)}")
        self.stem = stem(in_channels, widths[0])
        self.trunk = ReversibleSequential(exact=exact)
        halves = [width // 2 for width in widths]
        for c_in, c_out, stride in block_shapes(units, halves, bottleneck):
            f = residual_function(
                c_in, c_out, stride=stride, bottleneck=bottleneck, dropout=dropout
            )
            g = residual_function(c_out, c_out, bottleneck=bottleneck, dropout=dropout)
            if stride > 1 or c_in != c_out:
                self.trunk.append(Transition(f, g, Shortcut(c_in, c_out, stride)), "store")
            else:
                self.trunk.append(AdditiveCoupling(f, g), policy)
        self.head = head(2 * c_out, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(x)))
