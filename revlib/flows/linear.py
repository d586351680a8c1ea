"""Layers that are the same linear map in every sample, or at every pixel of it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import functional
from revlib.evaluate import Evaluate, Replay
from revlib.flows.finite import NonFiniteError, is_finite
from revlib.flows.layer import FlowLayer, zeros
from revlib.functional._checks import check_integer
from revlib.streams import Streams, memory_format


class DiagonalScaling(FlowLayer):
    r"""Scales each element of a sample by a factor of its own: the last layer of NICE.

    .. math:: y_i = x_i \cdot \exp(s_i), \qquad \log\left|\det J\right| = \sum_i s_i

    Args:
        shape: The shape of one sample.

    Shape:
        [batch, *shape].

    References:
        NICE (Dinh et al., 2015), section 3.3, https://arxiv.org/abs/1410.8516

    Example:
        >>> layer = revlib.flows.DiagonalScaling((4,))
        >>> z, log_det = layer(torch.randn(3, 4))
        >>> log_det.tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"shape must be that of a sample, such as (3, 32, 32); got {shape}")
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def weights(self) -> Streams:
        return (self.log_scale,)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,), (log_scale,) = streams, evaluate.weights(self)
        self._check(x, evaluate)
        return (x * log_scale.exp()).to(x.dtype), zeros(x) + log_scale.sum()

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,), (log_scale,) = streams, evaluate.weights(self)
        self._check(y, evaluate)
        return (y * (-log_scale).exp()).to(y.dtype), zeros(y) - log_scale.sum()

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        (log_scale,), pullback = evaluate.vjp_weights(self)
        pullback(((dy * y).sum(0) + dlog_det.sum(),))
        return (y * (-log_scale).exp(),), (dy * log_scale.exp(),)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, dlog_det) = outputs, gradients
        (log_scale,), pullback = evaluate.vjp_weights(self)
        pullback((-(dx * x).sum(0) - dlog_det.sum(),))
        return (x * log_scale.exp(),), (dx * (-log_scale).exp(),)

    def _check(self, x: Tensor, evaluate: Evaluate) -> None:
        shape = self.log_scale.shape
        if x.shape[1:] != shape:
            raise ValueError(
                f"{evaluate.label}: samples must have the shape {list(shape)}; "
                f"got {list(x.shape[1:])}"
            )


class ActNorm(FlowLayer):
    r"""Scales and shifts each channel; the first batch decides by how much to begin with.

    .. math:: y = x \cdot \exp(s) + b, \qquad \log\left|\det J\right| = n \sum s

    where n is the number of pixels. The first batch that goes forward in training mode sets the
    parameters so that every channel of y has mean 0 and variance 1 over that batch; unless they
    were trained before, through `inverse`. Where `torch.distributed` is in use, they are set to
    the mean over all processes, so that these start alike: all of them must make that call.

    Args:
        channels: The number of channels.

    Shape:
        [batch, channels, ...].

    Attributes:
        initialized: A buffer that tells whether a batch has set the parameters. It is saved with
            them, so that a resumed run keeps what it has learned.

    References:
        Glow (Kingma and Dhariwal, 2018), section 3.1, https://arxiv.org/abs/1807.03039

    Example:
        >>> layer = revlib.flows.ActNorm(4)
        >>> z, log_det = layer(5 + 3 * torch.randn(64, 4))
        >>> z.mean().abs().item() < 1e-5, z.var(0, correction=0).round(decimals=3).tolist()
        (True, [1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_integer("ActNorm", "channels", channels, 1, 2**31)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        # Reading the buffer stops for the GPU, so it is not read again once it was True.
        self._seen_initialized = False

    def weights(self) -> Streams:
        return self.log_scale, self.bias

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(x, len(self.log_scale), evaluate)
        self.initialize(x)
        return functional.actnorm(x, *evaluate.weights(self))

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,) = streams
        check_channels(y, len(self.log_scale), evaluate)
        return functional.actnorm_inverse(y, *evaluate.weights(self))

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        weights, pullback = evaluate.vjp_weights(self)
        x, dx, *dweights = functional.actnorm_backward(y, *weights, dy, dlog_det)
        pullback(dweights)
        return (x,), (dx,)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, dlog_det) = outputs, gradients
        weights, pullback = evaluate.vjp_weights(self)
        y, dy, *dweights = functional.actnorm_inverse_backward(x, *weights, dx, dlog_det)
        pullback(dweights)
        return (y,), (dy,)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the parameters from `x`, if this is the batch that decides."""
        if self._seen_initialized or not self.training or not len(x):
            return
        if not (self.initialized or self.log_scale.any() or self.bias.any()):
            log_scale, bias = map(mean_over_processes, functional.actnorm_init(x))
            if not is_finite(log_scale, bias):
                raise NonFiniteError("ActNorm cannot start from a batch that is not finite")
            self.log_scale.copy_(log_scale)
            self.bias.copy_(bias)
            self.initialized.fill_(True)
        self._seen_initialized = True

    def extra_repr(self) -> str:
        return f"channels={len(self.log_scale)}"

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen_initialized = False


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
        check_channels(x, self.channels, evaluate)
        matrix, bias, log_abs_det = evaluate.weights(self)
        return shifted(mapped(x, matrix), bias), zeros(x) + space(x) * log_abs_det

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,) = streams
        check_channels(y, self.channels, evaluate)
        matrix, bias, log_abs_det = evaluate.weights(self)
        inverse = inverted(matrix)
        bias = None if bias is None else -inverse @ bias
        return shifted(mapped(y, inverse), bias), zeros(y) - space(y) * log_abs_det

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        (matrix, bias, _), pullback = evaluate.vjp_weights(self)
        inverse = inverted(matrix)
        x = shifted(mapped(y, inverse), None if bias is None else -inverse @ bias)
        dx = mapped(dy, matrix.T)
        pullback((outer(dy, x), per_channel(dy), space(y) * dlog_det.sum()))
        return (x,), (dx,)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, dlog_det) = outputs, gradients
        (matrix, bias, _), pullback = evaluate.vjp_weights(self)
        y = shifted(mapped(x, matrix), bias)
        dy = mapped(dx, inverted(matrix).T)
        # With x = V (y - b) and V the inverse of W, dW = -V^T dx (y - b)^T V^T = -dy x^T.
        pullback((-outer(dy, x), -per_channel(dy), -space(x) * dlog_det.sum()))
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
        check_integer("InvertibleConv1x1", "channels", channels, 1, 2**31)
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
            return self.weight, None, torch.linalg.slogdet(self.weight).logabsdet
        lower = self.lower.tril(-1) + torch.eye(self.channels).to(self.lower)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        with torch.autocast(lower.device.type, enabled=False):
            return self.permutation @ lower @ upper, None, self.log_diagonal.sum()

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
        self.channels = channels
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels, lu=lu)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        log_scale, bias = self.actnorm.weights()
        matrix, _, log_abs_det = self.conv.weights()
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix * log_scale.exp(), matrix @ bias, log_abs_det + log_scale.sum()

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(x, self.channels, evaluate)
        self.actnorm.initialize(x)
        return super().forward_streams(streams, evaluate)


def mapped(x: Tensor, matrix: Tensor) -> Tensor:
    """Applies a matrix to the channels of every pixel; keeps dtype and memory format."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, matrix = x.to(dtype), matrix.to(dtype)
    # Not a convolution, which on a GPU may round its factors to TF32.
    with torch.autocast(x.device.type, enabled=False):
        if x.ndim == 2 or memory_format(x) != torch.contiguous_format:
            y = F.linear(wide.movedim(1, -1), matrix).movedim(-1, 1)
        else:
            y = (matrix @ wide.flatten(2)).view_as(x)
    return y.to(x.dtype)


def shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a bias to a tensor that was made here, per channel."""
    return x if bias is None else x.add_(bias.to(x.dtype).view(-1, *(1,) * (x.ndim - 2)))


def inverted(matrix: Tensor) -> Tensor:
    """Inverts a small matrix in float64, and gives the result in its own dtype."""
    # inv_ex does not make the CPU wait for the GPU to say whether the matrix is singular.
    return torch.linalg.inv_ex(matrix.double()).inverse.to(matrix.dtype)


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """Sums the outer products of the channels over all pixels of all samples."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy, x = dy.to(dtype), x.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if x.ndim == 2:
            return dy.T @ x
        return (dy.flatten(2) @ x.flatten(2).mT).sum(0)


def per_channel(x: Tensor) -> Tensor:
    return x.sum((0, *range(2, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32))


def space(x: Tensor) -> int:
    """Returns the number of pixels of a sample."""
    return math.prod(x.shape[2:])


def check_channels(x: Tensor, channels: int, evaluate: Evaluate) -> None:
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{evaluate.label}: the stream must be [batch, {channels}, ...]; got {list(x.shape)}"
        )


def mean_over_processes(value: Tensor) -> Tensor:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value
