"""Scaling of each element by a factor of its own."""

import torch
from torch import Tensor, nn

from revlib.evaluate import Evaluate, Replay
from revlib.flows.checks import check_sample_shape, checked_shape
from revlib.flows.layer import FlowLayer, wide_sum, zeros
from revlib.streams import Streams

EXACT_OP = "exact_affine_coupling"  # with a shift of 0


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

    can_be_exact = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(checked_shape("DiagonalScaling", shape)))

    def weights(self) -> Streams:
        return (self.log_scale,)

    def forward_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (x,), (log_scale,) = streams, evaluate.weights(self)
        check_sample_shape(evaluate.label, x, self.log_scale.shape)
        if evaluate.exact is not None:
            return evaluate.exact.scale(
                EXACT_OP, x, as_h(log_scale, x), label=evaluate.label, inverse=False, scale="exp"
            )
        return (x * log_scale.exp()).to(x.dtype), zeros(x) + wide_sum(log_scale)

    def inverse_streams(self, streams: Streams, evaluate: Evaluate) -> Streams:
        (y,), (log_scale,) = streams, evaluate.weights(self)
        check_sample_shape(evaluate.label, y, self.log_scale.shape)
        if evaluate.exact is not None:
            return evaluate.exact.scale(
                EXACT_OP, y, as_h(log_scale, y), label=evaluate.label, inverse=True, scale="exp"
            )
        return (y * (-log_scale).exp()).to(y.dtype), zeros(y) - wide_sum(log_scale)

    def backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (y,), (dy, dlog_det) = outputs, gradients
        (log_scale,), pullback = evaluate.vjp_weights(self)
        if evaluate.exact is not None:
            x, dx, dh = evaluate.exact.scale_backward(
                EXACT_OP, y, as_h(log_scale, y), dy, dlog_det, inverse=False, scale="exp"
            )
            pullback((dh.sum(0)[: len(log_scale)],))
            return (x,), (dx,)
        pullback(((dy * y).sum(0) + dlog_det.sum(),))
        x, dx = y * (-log_scale).exp(), dy * log_scale.exp()
        return (x.to(y.dtype),), (dx.to(y.dtype),)

    def inverse_backward_streams(
        self, outputs: Streams, gradients: Streams, evaluate: Replay
    ) -> tuple[Streams, Streams]:
        (x,), (dx, dlog_det) = outputs, gradients
        (log_scale,), pullback = evaluate.vjp_weights(self)
        if evaluate.exact is not None:
            y, dy, dh = evaluate.exact.scale_backward(
                EXACT_OP, x, as_h(log_scale, x), dx, dlog_det, inverse=True, scale="exp"
            )
            pullback((dh.sum(0)[: len(log_scale)],))
            return (y,), (dy,)
        pullback((-(dx * x).sum(0) - dlog_det.sum(),))
        y, dy = x * log_scale.exp(), dx * (-log_scale).exp()
        return (y.to(x.dtype),), (dy.to(x.dtype),)


def as_h(log_scale: Tensor, x: Tensor) -> Tensor:
    """Returns what a conditioner would say for the same scaling of every sample."""
    h = torch.cat((log_scale, torch.zeros_like(log_scale)))
    return h.expand(len(x), *h.shape)
