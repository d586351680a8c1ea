"""RevNets: ResNets whose residual blocks are additive couplings."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revlib.autograd import Policy
from revlib.coupling import AdditiveCoupling
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
from revlib.sequential import ReversibleSequential


class Transition(nn.Module):
    r"""A coupling whose identity path loses detail, so that it has no inverse.

    .. math:: y_1 = s_1(x_1) + f(x_2), \qquad y_2 = s_2(x_2) + g(y_1)

    It stands where a stage changes the number of channels or the resolution.
    """

    def __init__(self, f: nn.Module, g: nn.Module, s1: nn.Module, s2: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.g = g
        self.s1 = s1
        self.s2 = s2

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = self.s1(x1) + self.f(x2)
        y2 = self.s2(x2) + self.g(y1)
        return torch.cat((y1, y2), 1)


class RevNet(nn.Module):
    """A reversible residual classifier, of any number of stages.

    In backward all couplings are rebuilt; the transitions between the stages and the head are
    recomputed from their inputs, and the stem is stored. So memory grows with the number of
    stages, not of blocks.

    Args:
        units: The number of couplings of each stage.
        widths: The channels of the stem and of each stage, both halves together (before the
            bottleneck's factor 4).
        bottleneck: Whether residual functions are bottlenecks, with outputs 4 times as wide.
        num_classes: The number of classes.
        in_channels: The channels of the images.
        dropout: The probability of dropout inside the residual functions.
        large_images: Whether it is built as for ImageNet: the stem takes height and width to a
            quarter, and a shortcut that changes its shape is a 1x1 convolution.
        policy: The policy of the couplings, or a list of each block's, in which a transition that
            is to be rebuilt is recomputed; under "store" transitions and head are stored, too.
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
        large_images: bool = False,
        policy: Policy | Sequence[Policy] = "rebuild",
        exact: bool = False,
    ) -> None:
        super().__init__()
        units, widths = check_stages(units, widths)
        check_at_least(1, num_classes=num_classes, in_channels=in_channels)
        check_dropout(dropout)
        if any(width % 2 for width in widths):
            raise ValueError(f"widths must be even, to be split in halves; got {widths}")
        self.stem = stem(in_channels, widths[0], large_images=large_images)
        blocks = []
        halves = [width // 2 for width in widths]
        for c_in, c_out, stride in block_shapes(units, halves, bottleneck):
            f = residual_function(
                c_in, c_out, stride=stride, bottleneck=bottleneck, dropout=dropout
            )
            g = residual_function(c_out, c_out, bottleneck=bottleneck, dropout=dropout)
            if stride > 1 or c_in != c_out:
                s1, s2 = (shortcut(c_in, c_out, stride, learned=large_images) for _ in "12")
                blocks.append(Transition(f, g, s1, s2))
            else:
                blocks.append(AdditiveCoupling(f, g))
        self.trunk = ReversibleSequential(*blocks, policy="store", exact=exact)
        self.head = ReversibleSequential(*head(2 * c_out, num_classes), policy="store")
        self.policy = policy
        initialize(self)

    @property
    def policy(self) -> Policy | list[Policy]:
        """The policy of the trunk's blocks; it may be set anew, which sets the head's, too."""
        return self.trunk.policy

    @policy.setter
    def policy(self, policy: Policy | Sequence[Policy]) -> None:
        without_inverse = "store" if policy == "store" else "recompute"
        by_block = [policy] * len(self.trunk) if policy == "rebuild" else policy
        if isinstance(by_block, Sequence) and not isinstance(by_block, str):
            transitions = [i for i, b in enumerate(self.trunk) if isinstance(b, Transition)]
            by_block = [
                without_inverse if each == "rebuild" and i in transitions else each
                for i, each in enumerate(by_block)
            ]
        self.trunk.policy = by_block
        self.head.policy = [without_inverse, "store"]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(x)))
