"""Layers that move elements without changing them: their log_det is 0."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from revlib import functional
from revlib.evaluate import Evaluate, Replay
from revlib.flows.checks import (
    check_channel_count,
    check_channels,
    check_sample_shape,
    checked_indices,
    checked_shape,
)
from revlib.flows.layer import FlowLayer
from revlib.functional._checks import check_integer
from revlib.streams import Streams, memory_format


class Rearrangement(FlowLayer):
    """Base class: subclasses define how elements move, and how they move back."""

    can_be_exact = True

    def move(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def move_back(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self.move(*streams), None

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        return self.move_back(*streams), None

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return (self.move_back(*outputs),), (self.move_back(gradients[0]),)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return (self.move(*outputs),), (self.move(gradients[0]),)


class Permutation(FlowLayer):
    """Puts the channels in another order: `y[:, i] = x[:, indices[i]]`.

    Args:
        indices: Every number from 0 to channels - 1 once.

    Shape:
        [batch, channels, ...].

    Example:
        >>> z, _ = revlib.flows.Permutation([2, 0, 1])(torch.tensor([[0.0, 1.0, 2.0]]))
        >>> z.tolist()
        [[2.0, 0.0, 1.0]]
        >>> revlib.flows.Permutation.reverse(4).indices.tolist()
        [3, 2, 1, 0]
    """

    can_be_exact = True

    def __init__(self, indices: Sequence[int] | Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", checked_indices(indices))

    @classmethod
    def reverse(cls, channels: int) -> Self:
        """Returns the layer that puts the last channel first."""
        check_channel_count("Permutation.reverse", channels)
        return cls(torch.arange(channels).flip(0))

    @classmethod
    def random(cls, channels: int) -> Self:
        """Returns a layer with an order drawn at random, which its state dict keeps."""
        check_channel_count("Permutation.random", channels)
        return cls(torch.randperm(channels))

    def weights(self) -> Streams:
        return (self.indices,)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,), (indices,) = streams, evaluate.weights(self)
        check_channels(evaluate.label, x, len(indices))
        return selected(x, indices), None

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,), (indices,) = streams, evaluate.weights(self)
        check_channels(evaluate.label, y, len(indices))
        return selected(y, indices.argsort()), None

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, _), (indices,) = outputs, gradients, evaluate.weights(self)
        back = indices.argsort()
        return (selected(y, back),), (selected(dy, back),)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, _), (indices,) = outputs, gradients, evaluate.weights(self)
        return (selected(x, indices),), (selected(dx, indices),)

    def extra_repr(self) -> str:
        return f"channels={len(self.indices)}"


class Flatten(Rearrangement):
    """Makes vectors of samples of a given shape.

    Args:
        shape: The shape of one sample.

    Shape:
        [batch, *shape] becomes [batch, elements].

    Example:
        >>> z, _ = revlib.flows.Flatten((3, 8, 8))(torch.randn(2, 3, 8, 8))
        >>> z.shape
        torch.Size([2, 192])
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = checked_shape("Flatten", shape)

    def move(self, x: Tensor) -> Tensor:
        check_sample_shape("Flatten", x, self.shape)
        return x.reshape(-1, math.prod(self.shape))

    def move_back(self, y: Tensor) -> Tensor:
        check_sample_shape("Flatten", y, [math.prod(self.shape)])
        return y.reshape(-1, *self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class Squeeze(Rearrangement):
    """Moves squares of space into channels, see :func:`revlib.functional.squeeze`.

    Args:
        factor: The side of the squares.

    Shape:
        [batch, channels, height, width] becomes
        [batch, channels * factor**2, height / factor, width / factor].

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803

    Example:
        >>> z, _ = revlib.flows.Squeeze()(torch.randn(2, 3, 8, 8))
        >>> z.shape
        torch.Size([2, 12, 4, 4])
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_integer(type(self).__name__, "factor", factor, 2, 2**15)
        self.factor = factor

    def move(self, x: Tensor) -> Tensor:
        return functional.squeeze(x, self.factor)

    def move_back(self, y: Tensor) -> Tensor:
        return functional.unsqueeze(y, self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Unsqueeze(Squeeze):
    """Moves channels into squares of space: undoes :class:`revlib.flows.Squeeze`.

    Args:
        factor: The side of the squares.

    Shape:
        [batch, channels, height, width] becomes
        [batch, channels / factor**2, height * factor, width * factor].

    Example:
        >>> z, _ = revlib.flows.Unsqueeze()(torch.randn(2, 12, 4, 4))
        >>> z.shape
        torch.Size([2, 3, 8, 8])
    """

    def move(self, x: Tensor) -> Tensor:
        return functional.unsqueeze(x, self.factor)

    def move_back(self, y: Tensor) -> Tensor:
        return functional.squeeze(y, self.factor)


def selected(x: Tensor, indices: Tensor) -> Tensor:
    """Gathers channels, in the memory format of `x`."""
    if memory_format(x) == torch.contiguous_format:
        return x.index_select(1, indices)
    return x.movedim(1, -1).index_select(-1, indices).movedim(-1, 1)
