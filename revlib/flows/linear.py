"""Layers that are the same linear map in every sample, or at every pixel of it."""

import math
import sys

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from revlib import functional
from revlib.evaluate import Evaluate, Replay
from revlib.flows.checks import (
    check_channel_count,
    check_channels,
    check_sample_shape,
    checked_shape,
)
from revlib.flows.finite import NonFiniteError, is_finite
from revlib.flows.layer import FlowLayer, zeros
from revlib.functional._checks import check_flags
from revlib.replay import autocast_off, in_backward
from revlib.streams import Streams, memory_format

# Of the typical standard deviation of a channel: below it a channel counts as constant.
STEADY = 1e-3
# Of a standard deviation: what `actnorm_init` gives for a constant channel, and a little more.
NOTHING = 2e-6


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
        self.log_scale = nn.Parameter(torch.zeros(checked_shape("DiagonalScaling", shape)))

    def weights(self) -> Streams:
        return (self.log_scale,)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,), (log_scale,) = streams, evaluate.weights(self)
        check_sample_shape(evaluate.label, x, self.log_scale.shape)
        return (x * log_scale.exp()).to(x.dtype), zeros(x) + wide_sum(log_scale)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,), (log_scale,) = streams, evaluate.weights(self)
        check_sample_shape(evaluate.label, y, self.log_scale.shape)
        return (y * (-log_scale).exp()).to(y.dtype), zeros(y) - wide_sum(log_scale)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        (log_scale,), pullback = evaluate.vjp_weights(self)
        pullback(((dy * y).sum(0) + dlog_det.sum(),))
        x, dx = y * (-log_scale).exp(), dy * log_scale.exp()
        return (x.to(y.dtype),), (dx.to(y.dtype),)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, dlog_det) = outputs, gradients
        (log_scale,), pullback = evaluate.vjp_weights(self)
        pullback((-(dx * x).sum(0) - dlog_det.sum(),))
        y, dy = x * log_scale.exp(), dx * (-log_scale).exp()
        return (y.to(x.dtype),), (dy.to(x.dtype),)


class ActNorm(FlowLayer):
    r"""Scales and shifts each channel; the first batch decides by how much to begin with.

    .. math:: y = x \cdot \exp(s) + b, \qquad \log\left|\det J\right| = n \sum s

    where n is the number of pixels. The first batch that goes forward in training mode sets the
    parameters so that every channel of y has mean 0 and variance 1 over that batch; unless they
    are not 0 any more, because they were trained or loaded. Where `torch.distributed` is in use,
    they are set to the mean over all processes, so that these start alike: all of them must make
    that call. Parameters that `fully_shard` has sharded cannot be set: let a batch pass before.

    Args:
        channels: The number of channels.

    Shape:
        [batch, channels, ...].

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
        check_channel_count("ActNorm", channels)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        # Looking at the parameters waits for the GPU, so it is done until they are not 0.
        self._seen_initialized = False

    @property
    def initialized(self) -> bool:
        """Whether the parameters are not 0 any more."""
        return bool(self.log_scale.any() or self.bias.any())

    def weights(self) -> Streams:
        return self.log_scale, self.bias

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(evaluate.label, x, len(self.log_scale))
        self.initialize(x, evaluate)
        return functional.actnorm(x, *evaluate.weights(self))

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,) = streams
        check_channels(evaluate.label, y, len(self.log_scale))
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
    def initialize(self, x: Tensor, evaluate: Evaluate) -> None:
        """Sets the parameters from `x`, if this is the batch that decides."""
        if self._seen_initialized or not self.training or in_backward() or not len(x):
            return
        if x.is_meta or isinstance(x, FakeTensor):
            return
        if not self.initialized:
            log_scale, bias = map(mean_over_processes, first_parameters(x))
            if not is_finite(log_scale, bias):
                raise NonFiniteError(
                    f"{evaluate.label}: ActNorm cannot start from a batch that is not finite"
                )
            for name, value in (("log_scale", log_scale), ("bias", bias)):
                if parametrize.is_parametrized(self, name):
                    setattr(self, name, value)
                else:
                    getattr(self, name).copy_(value)
        self._seen_initialized = self.initialized

    def extra_repr(self) -> str:
        return f"channels={len(self.log_scale)}"

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen_initialized = not self.log_scale.is_meta and self.initialized


def first_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-scales and biases that normalise a batch.

    A channel that hardly varies in it may vary in the next one, so it is scaled as the channels
    are on the whole. Where none varies, as in a batch of one vector, the result is 0.
    """
    log_scale, bias = functional.actnorm_init(x)
    std, mean = (-log_scale).exp(), -bias * (-log_scale).exp()
    typical = std.square().mean().sqrt()
    std = torch.where(std < STEADY * typical, typical, std)
    return tuple(torch.where(typical <= NOTHING, 0, t) for t in (-std.log(), -mean / std))


def refuse_sharded_start(module: nn.Module) -> None:
    """Raises if a module that `fully_shard` has sharded holds an ActNorm without parameters yet.

    What would be written to the gathered parameters never reaches the shards.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded if not imported
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return
    for name, part in module.named_modules():
        if isinstance(part, ActNorm) and part.training and not part.initialized:
            raise RuntimeError(
                f"{name} (ActNorm) is to be set by the first batch, but fully_shard has sharded "
                "its parameters; let a batch pass before fully_shard, or load a checkpoint"
            )


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


def per_channel(x: Tensor) -> Tensor:
    return x.sum((0, *range(2, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32))


def wide_sum(log_scale: Tensor) -> Tensor:
    return log_scale.sum(dtype=torch.promote_types(log_scale.dtype, torch.float32))


def space(x: Tensor) -> int:
    """Returns the number of pixels of a sample."""
    return math.prod(x.shape[2:])


def mean_over_processes(value: Tensor) -> Tensor:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value
