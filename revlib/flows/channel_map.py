"""Layers that apply one matrix to the channels of every pixel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib.dispatch import gradient_is_recorded
from revlib.evaluate import Evaluate, Replay, apart
from revlib.flows.actnorm import ActNorm
from revlib.flows.checks import check_channel_count, check_channels
from revlib.flows.layer import FlowLayer, wide_sum, zeros
from revlib.flows.lu import LUFactors
from revlib.functional._checks import check_flags
from revlib.functional._exact_scaling import check_differentiated_once
from revlib.reference._actnorm import space, sum_per_channel
from revlib.replay import autocast_off, draws_nothing
from revlib.streams import Streams, memory_format

EXACT_OP = "exact_channel_map"

# From the gradients of weights to parameters, each with its gradient.
Gradients = list[tuple[Tensor, Tensor]]
Pullback = Callable[[Tensor, Tensor, Tensor], Gradients]


class ChannelMap(FlowLayer):
    """Base class of the layers that apply one matrix to the channels of every pixel.

    Subclasses define `weights`, which returns the matrix, the bias or None, and log |det| of the
    matrix, as differentiable functions of their parameters; and `factors`, which returns the
    matrix as P L (U + diag(d)), for exact arithmetic.

    The map is computed in the dtype of the stream and never under autocast, whose short floats
    could not be inverted.
    """

    can_be_exact = True
    channels: int

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        raise NotImplementedError

    @property
    def knows_pullback(self) -> bool:
        """Whether `weights_and_pullback` may be called, for autograd takes three times as long."""
        return False

    def weights_and_pullback(self) -> tuple[tuple[Tensor, Tensor, None], Pullback]:
        """Returns the matrix, the bias and None, and what gives the parameters' gradients.

        That is a function of the gradients of all that `weights` returns.
        """
        raise NotImplementedError

    def factors(self) -> tuple[Tensor | None, ...]:
        """Returns L, U, log |d|, the signs of d, P, and the bias or None."""
        raise NotImplementedError

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(evaluate.label, x, self.channels)
        matrix, bias, log_abs_det = evaluate.weights(self)
        if evaluate.exact is not None:
            return self._map_exactly(x, matrix, bias, log_abs_det, evaluate, inverse=False)
        with autocast_off(x.device):
            return mapped(x, matrix, bias), zeros(x) + space(x) * log_abs_det

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,) = streams
        check_channels(evaluate.label, y, self.channels)
        matrix, bias, log_abs_det = evaluate.weights(self)
        if evaluate.exact is not None:
            return self._map_exactly(y, matrix, bias, log_abs_det, evaluate, inverse=True)
        with autocast_off(y.device):
            return mapped(y, *inverted(matrix, bias)), zeros(y) - space(y) * log_abs_det

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._rebuild(outputs, gradients, evaluate, inverse=False)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        return self._rebuild(outputs, gradients, evaluate, inverse=True)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"

    def _rebuild(
        self, outputs: Streams, gradients: Streams, evaluate: Replay, *, inverse: bool
    ) -> tuple[Streams, Streams]:
        """Goes back through the map, or through its inverse: to what it was given."""
        (result,), (dresult, dlog_det) = outputs, gradients
        # Exact gradients are those of the stored run to the last bit, which are autograd's.
        in_closed_form = self.knows_pullback and evaluate.exact is None
        (matrix, bias, _), pullback = evaluate.vjp_weights(self, in_closed_form=in_closed_form)
        with autocast_off(result.device):
            if evaluate.exact is not None:
                factors = evaluate.factors(self)
                given, _ = evaluate.exact.scale(
                    EXACT_OP, result, *factors, label=evaluate.label, inverse=not inverse
                )
            elif inverse:
                given = mapped(result, matrix, bias)
            else:
                given = mapped(result, *inverted(matrix, bias))
            gradients_of = inverse_gradients_at if inverse else gradients_at
            x = result if inverse else given
            dgiven, *dweights = gradients_of(x, dresult, dlog_det, matrix)
        # Under the autocast that a stored run goes back under, too.
        pullback(dweights)
        return (given,), (dgiven,)

    def _map_exactly(
        self,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        log_abs_det: Tensor,
        evaluate: Evaluate,
        *,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            return evaluate.exact.scale(
                EXACT_OP, x, *factors, label=evaluate.label, inverse=inverse
            )

        factors = evaluate.factors(self)
        if gradient_is_recorded(x, matrix):
            return ExactMapFunction.apply(x, matrix, bias, log_abs_det, run, inverse)
        return run(x)


@draws_nothing
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
            weight = apart(self.weight)  # once: a parametrization may give another one each time
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            return weight, None, torch.linalg.slogdet(wide).logabsdet
        lu = self.lu_factors()
        lu = lu._replace(log_diagonal=apart(lu.log_diagonal))
        with autocast_off(lu.lower.device):
            return lu.matrix(), None, wide_sum(lu.log_diagonal)

    def matrix(self) -> Tensor:
        return self.lu_factors().matrix() if self.lu else self.weight

    def lu_factors(self) -> LUFactors:
        return LUFactors(self.lower, self.upper, self.log_diagonal, self.sign, self.permutation)

    def factors(self) -> tuple[Tensor | None, ...]:
        if self.lu:
            return *self.lu_factors(), None
        # In float32 or wider: torch decomposes nothing narrower.
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        permutation, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal()
        return lower, upper, diagonal.abs().log(), diagonal.sign(), permutation, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lu={self.lu}"


@draws_nothing
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
        log_scale = apart(log_scale)
        matrix, _, log_abs_det = self.conv.weights()
        with autocast_off(matrix.device):
            return matrix * log_scale.exp(), matrix @ bias, log_abs_det + wide_sum(log_scale)

    @property
    def knows_pullback(self) -> bool:
        # A parametrized module has a class of its own, and one without LU factors a parameter.
        classes = type(self), type(self.actnorm), type(self.conv)
        names = *self.actnorm._parameters, *self.conv._parameters
        return classes == (ActNormConv1x1, ActNorm, InvertibleConv1x1) and names == (
            "log_scale", "bias", "lower", "upper", "log_diagonal"
        )  # fmt: skip

    def weights_and_pullback(self) -> tuple[tuple[Tensor, Tensor, None], Pullback]:
        log_scale, bias = self.actnorm.weights()
        lu = self.conv.lu_factors()
        with autocast_off(bias.device):
            right, scale = lu.right(), log_scale.exp()
            unscaled = lu.product(right)
            matrix, moved = unscaled * scale, unscaled @ bias

        def pullback(dmatrix: Tensor, dbias: Tensor, dlog_abs_det: Tensor) -> Gradients:
            with autocast_off(bias.device):
                dmatrix, dbias = dmatrix.to(matrix.dtype), dbias.to(bias.dtype)
                dunscaled = torch.addr(dmatrix * scale, dbias, bias)
                dlower, dupper, dlog_diagonal = lu.gradients(right, dunscaled)
                return [
                    (log_scale, (dmatrix * matrix).sum(0) + dlog_abs_det),
                    (bias, unscaled.T @ dbias),
                    (lu.lower, dlower),
                    (lu.upper, dupper),
                    (lu.log_diagonal, dlog_diagonal + dlog_abs_det),
                ]

        return (matrix, moved, None), pullback

    def factors(self) -> tuple[Tensor | None, ...]:
        log_scale, bias = self.actnorm.weights()
        with autocast_off(bias.device):
            moved = self.conv.matrix() @ bias
        lower, upper, log_diagonal, sign, permutation, _ = self.conv.factors()
        return (
            lower, upper * log_scale.exp(), log_diagonal + log_scale, sign, permutation, moved
        )  # fmt: skip

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,) = streams
        check_channels(evaluate.label, x, self.channels)
        self.actnorm.initialize(x, evaluate)
        return super().forward_streams(streams, evaluate)


class ExactMapFunction(torch.autograd.Function):
    """Keeps the input of the map, whichever way it goes; gradients are those without rounding."""

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        log_abs_det: Tensor,
        run: Callable[[Tensor], tuple[Tensor, Tensor]],
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        result, log_det = run(given)
        ctx.save_for_backward(result if inverse else given, matrix)
        ctx.has_bias, ctx.inverse = bias is not None, inverse
        return result, log_det

    @staticmethod
    def backward(ctx: Any, dresult: Tensor, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once(EXACT_OP, ctx.inverse)
        x, matrix = ctx.saved_tensors
        gradients = inverse_gradients_at if ctx.inverse else gradients_at
        with autocast_off(x.device):
            dgiven, dmatrix, dbias, dlog_abs_det = gradients(x, dresult, dlog_det, matrix)
        dbias = dbias if ctx.has_bias else None
        return dgiven, dmatrix, dbias, dlog_abs_det, None, None


def gradients_at(x: Tensor, dy: Tensor, dlog_det: Tensor, matrix: Tensor) -> Streams:
    """The gradients of x, matrix, bias and log_abs_det, of y = W x + b."""
    dx = mapped(dy, matrix.T)
    return dx, outer(dy, x), sum_per_channel(dy), space(x) * dlog_det.sum()


def inverse_gradients_at(x: Tensor, dx: Tensor, dlog_det: Tensor, matrix: Tensor) -> Streams:
    """The gradients of y, matrix, bias and log_abs_det, of x = V (y - b), V the inverse of W."""
    inverse, _ = inverted(matrix)
    dy = mapped(dx, inverse.T)
    # dW = -V^T dx (y - b)^T V^T = -dy x^T.
    return dy, -outer(dy, x), -sum_per_channel(dy), -space(x) * dlog_det.sum()


def mapped(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Applies a matrix to the channels of every pixel; keeps dtype and memory format."""
    if x.dtype.itemsize < 4:
        return mapped(x.float(), matrix, bias).to(x.dtype)
    matrix = matrix.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    # Not a convolution, which on a GPU may round its factors to TF32.
    if x.ndim == 2 or memory_format(x) != torch.contiguous_format:
        return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)
    # Not `matrix @`, which rounds otherwise where the matrix requires grad.
    matrices, pixels = matrix.expand(len(x), -1, -1), x.flatten(2)
    if bias is None:
        return torch.bmm(matrices, pixels).view_as(x)
    return torch.baddbmm(bias.unsqueeze(1), matrices, pixels).view_as(x)


def inverted(matrix: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns the matrix, inverted in float64, and the bias of the inverse map."""
    # inv_ex does not make the CPU wait for the GPU to say whether the matrix is singular.
    inverse = torch.linalg.inv_ex(matrix.double()).inverse.to(matrix.dtype)
    return inverse, None if bias is None else -inverse @ bias


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """Sums the outer products of the channels over all pixels of all samples."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy, x = dy.to(dtype), x.to(dtype)
    if x.ndim == 2:
        return dy.T @ x
    return (dy.flatten(2) @ x.flatten(2).mT).sum(0)
