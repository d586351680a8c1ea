"""Layers that apply one matrix to the channels of every pixel."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib.evaluate import Evaluate, Replay
from revlib.flows.actnorm import ActNorm
from revlib.flows.checks import check_channel_count, check_channels
from revlib.flows.layer import FlowLayer, wide_sum, zeros
from revlib.functional._checks import check_flags
from revlib.reference._actnorm import space, sum_per_channel
from revlib.replay import autocast_off
from revlib.streams import Streams, memory_format


class ChannelMap(FlowLayer):
    """Base class of the layers that apply one matrix to the channels of every pixel.

    Subclasses define `weights`, which returns the matrix, the bias or None, and log |det| of the
    matrix, as differentiable functions of their parameters.

    The map is computed in the dtype of the stream and never under autocast, whose short floats
    could not be inverted.
    """

    channels: int

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        raise NotImplementedError

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(evaluate.label, x, self.channels)
        matrix, bias, log_abs_det = evaluate.weights(self)
        return shifted(mapped(x, matrix), bias), zeros(x) + space(x) * log_abs_det

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,) = streams
        check_channels(evaluate.label, y, self.channels)
        matrix, bias, log_abs_det = evaluate.weights(self)
        inverse = inverted(matrix)
        return shifted(mapped(y, inverse), unshifted(inverse, bias)), zeros(y) - space(
            y
        ) * log_abs_det

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        (matrix, bias, _), pullback = evaluate.vjp_weights(self)
        inverse = inverted(matrix)
        x = shifted(mapped(y, inverse), unshifted(inverse, bias))
        dx = mapped(dy, matrix.T)
        pullback((outer(dy, x), sum_per_channel(dy), space(y) * dlog_det.sum()))
        return (x,), (dx,)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, dlog_det) = outputs, gradients
        (matrix, bias, _), pullback = evaluate.vjp_weights(self)
        y = shifted(mapped(x, matrix), bias)
        dy = mapped(dx, inverted(matrix).T)
        # With x = V (y - b) and V the inverse of W, dW = -V^T dx (y - b)^T V^T = -dy x^T.
        pullback((-outer(dy, x), -sum_per_channel(dy), -space(x) * dlog_det.sum()))
        return (y,), (dy,)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class InvertibleConv1x1(ChannelMap):
    r"""Mixes the channels of every pixel by a learned invertible matrix.

    .. math:: y_{:hw} = W x_{:hw}, \qquad \log\left|\det J\right| = n \log |\det W|

    where n is the number of pixels. The matrix starts as a random rotation.

    Args:
        channels: The number of channels.
        lu: Learn the factors of :math:`W = P L (U + \operatorname{diag}(s))` rather than W: P is
            a fixed permutation, L and U are triangular, and the signs of s are fixed. Then the
            log_det is a sum, and W stays invertible.

    Shape:
        [batch, channels, ...].

    References:
        Glow (Kingma and Dhariwal, 2018), section 3.2, https://arxiv.org/abs/1807.03039

    Example:
        >>> layer = revlib.flows.InvertibleConv1x1(4)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> z, log_det = layer(x)
        >>> torch.allclose(layer.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, channels: int, *, lu: bool = True) -> None:
        super().__init__()
        check_channel_count("InvertibleConv1x1", channels)
        check_flags("InvertibleConv1x1", lu=lu)
        self.channels = channels
        self.lu = lu
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        if not lu:
            self.weight = nn.Parameter(rotation)
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def weights(self) -> tuple[Tensor, None, Tensor]:
        if not self.lu:
            weight = self.weight  # once: a parametrization may give another one each time
            return weight, None, torch.linalg.slogdet(weight).logabsdet
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        with autocast_off(upper.device):
            product = torch.addmm(upper, self.lower.tril(-1), upper)  # L U, without L's diagonal
            return self.permutation @ product, None, wide_sum(self.log_diagonal)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lu={self.lu}"


class ActNormConv1x1(ChannelMap):
    """`ActNorm` and then `InvertibleConv1x1`, folded into one map: one pass instead of two.

    Args:
        channels: The number of channels.
        lu: As in :class:`revlib.flows.InvertibleConv1x1`.

    Shape:
        [batch, channels, ...].

    References:
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> layer = revlib.flows.ActNormConv1x1(4).eval()
        >>> x = torch.randn(2, 4, 8, 8)
        >>> in_two_passes = revlib.flows.FlowSequential(layer.actnorm, layer.conv)
        >>> torch.allclose(layer(x)[0], in_two_passes(x)[0], atol=1e-6)
        True
    """

    def __init__(self, channels: int, *, lu: bool = True) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels, lu=lu)
        self.channels = channels

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        log_scale, bias = self.actnorm.weights()
        matrix, _, log_abs_det = self.conv.weights()
        with autocast_off(matrix.device):
            return matrix * log_scale.exp(), matrix @ bias, log_abs_det + wide_sum(log_scale)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(evaluate.label, x, self.channels)
        self.actnorm.initialize(x, evaluate)
        return super().forward_streams(streams, evaluate)


def mapped(x: Tensor, matrix: Tensor) -> Tensor:
    """Applies a matrix to the channels of every pixel; keeps dtype and memory format."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, matrix = x.to(dtype), matrix.to(dtype)
    # Not a convolution, which on a GPU may round its factors to TF32.
    with autocast_off(x.device):
        if x.ndim == 2 or memory_format(x) != torch.contiguous_format:
            y = F.linear(wide.movedim(1, -1), matrix).movedim(-1, 1)
        else:
            y = (matrix @ wide.flatten(2)).view_as(x)
    return y.to(x.dtype)


def shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a bias to a tensor that was made here, per channel."""
    return x if bias is None else x.add_(bias.to(x.dtype).view(-1, *(1,) * (x.ndim - 2)))


def unshifted(inverse: Tensor, bias: Tensor | None) -> Tensor | None:
    """Returns the bias of the inverse map."""
    if bias is None:
        return None
    with autocast_off(bias.device):
        return -inverse @ bias


def inverted(matrix: Tensor) -> Tensor:
    """Inverts a small matrix in float64, and gives the result in its own dtype."""
    # inv_ex does not make the CPU wait for the GPU to say whether the matrix is singular.
    return torch.linalg.inv_ex(matrix.double()).inverse.to(matrix.dtype)


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """Sums the outer products of the channels over all pixels of all samples."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy, x = dy.to(dtype), x.to(dtype)
    with autocast_off(x.device):
        if x.ndim == 2:
            return dy.T @ x
        return (dy.flatten(2) @ x.flatten(2).mT).sum(0)
