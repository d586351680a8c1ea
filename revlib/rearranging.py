"""Blocks that move elements without computing: squeezing space into channels, and padding."""

import torch.nn.functional as F
from torch import Tensor

from revlib import functional
from revlib.evaluate import Evaluate, Replay
from revlib.functional._checks import check_integer
from revlib.invertible import InvertibleModule
from revlib.streams import Streams


class Rearrangement(InvertibleModule):
    """Base class: subclasses define how elements move, and how they move back."""

    can_be_exact = True

    def move(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def move_back(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.move(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self.move_back(y)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return (self.move(*streams),)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return (self.move_back(*streams),)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return (self.move_back(*outputs),), (self.move_back(*gradients),)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return (self.move(*outputs),), (self.move(*gradients),)


class Squeeze(Rearrangement):
    """Moves squares of space into channels, places first, as i-RevNet does.

    Args:
        factor: The side of the squares.

    Shape:
        [batch, channels, height, width] becomes
        [batch, channels * factor**2, height / factor, width / factor]. See
        :func:`revlib.functional.squeeze` for the order of the channels. The layer of a flow, with
        a log_det and the channels in another order, is :class:`revlib.flows.Squeeze`.

    Example:
        >>> revlib.Squeeze()(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 12, 4, 4])
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_integer(type(self).__name__, "factor", factor, 2, 2**15)
        self.factor = factor

    def move(self, x: Tensor) -> Tensor:
        return functional.squeeze(x, self.factor, places_first=True)

    def move_back(self, y: Tensor) -> Tensor:
        return functional.unsqueeze(y, self.factor, places_first=True)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class PadChannels(Rearrangement):
    """Appends channels of zeros, so that a chain may be wider than its input: an injection.

    Its inverse drops them, whatever they hold by then. So `chain.inverse` undoes `chain`, while
    `chain` undoes `chain.inverse` only where those channels were zeros; a chain that is trained
    through `inverse` therefore keeps the padded stream beside its output.

    In a chain of floats the zeros would come back as rounding errors, which a norm and a ReLU
    take for values; so the next block of the chain that computes is recomputed from its input.
    Where zeros go further, use `exact=True` (docs/engine.md, "What a chain cannot see").

    Args:
        extra: How many channels to append.

    Shape:
        [batch, channels, ...] becomes [batch, channels + extra, ...].

    Example:
        >>> block = revlib.PadChannels(2)
        >>> block(torch.ones(1, 1)).tolist(), block.inverse(torch.ones(1, 3)).tolist()
        ([[1.0, 0.0, 0.0]], [[1.0]])
    """

    cheap_forward = False

    def __init__(self, extra: int) -> None:
        super().__init__()
        check_integer(type(self).__name__, "extra", extra, 1, 2**31)
        self.extra = extra

    def move(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.extra))

    def move_back(self, y: Tensor) -> Tensor:
        if y.shape[1] <= self.extra:
            raise ValueError(
                f"PadChannels drops {self.extra} channels, so y must have more; "
                f"got {list(y.shape)}"
            )
        return y[:, : -self.extra]

    def extra_repr(self) -> str:
        return f"extra={self.extra}"
