"""Log density of a Normal, summed over each sample."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revlib import reference
from revlib.dispatch import gradient_is_recorded, kernels_apply_to
from revlib.functional._checks import check_batch_and_channels, check_shape, check_tensors


def gaussian_log_prob(x: Tensor, h: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
    r"""Gives the log density of each sample under a Normal whose elements are independent.

    .. math:: \log p(x) = \sum -\frac{1}{2} z^2 - \log\sigma - \frac{1}{2} \log 2\pi,
              \qquad z = \frac{x - \mu}{\sigma}

    Without `h` the Normal is the standard one: :math:`\mu = 0` and :math:`\sigma = 1`. A
    conditioner's output `h` holds a mean :math:`\mu` and a log standard deviation
    :math:`\log\sigma` for every element of `x`: the learned prior of what a multi-scale flow
    factors out. Expanded views of a smaller `h` are read as they are, without a copy.

    Args:
        x: The latent.
        h: The conditioner's output; its dtype may differ from `x`'s, as under autocast.
        interleaved: Whether the means are channels 0, 2, ... of `h` and the log standard
            deviations 1, 3, ...; otherwise they are its first and its second half.

    Returns:
        The log density of each sample, summed in a fixed order.

    Shape:
        `x` is [batch, channels, ...] and `h` is [batch, 2 * channels, ...]; what is returned is
        [batch], in float64 if an input is and in float32 otherwise.

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules.

    References:
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> x, h = torch.randn(16, 3, 8, 8), torch.randn(16, 6, 8, 8)
        >>> log_prob = revlib.functional.gaussian_log_prob(x, h)
        >>> mean, log_std = h.chunk(2, 1)
        >>> prior = torch.distributions.Normal(mean, log_std.exp())
        >>> torch.allclose(log_prob, prior.log_prob(x).sum((1, 2, 3)), rtol=1e-4)
        True
    """
    op = "gaussian_log_prob"
    inputs = {"x": x} if h is None else {"x": x, "h": h}
    check_tensors(op, **inputs)
    check_batch_and_channels(op, "x", x)
    if h is not None:
        batch, channels, *space = x.shape
        check_shape(op, "h", h, (batch, 2 * channels, *space), "[batch, 2 * channels, ...] of x")
    if not kernels_apply_to(*inputs.values()):
        return reference.gaussian_log_prob(x, h, interleaved)
    if gradient_is_recorded(*inputs.values()):
        return GaussianLogProbFunction.apply(x, h, interleaved)

    from revlib.kernels import gaussian_log_prob as kernels

    return kernels.gaussian_log_prob(x, h, interleaved)


class GaussianLogProbFunction(torch.autograd.Function):
    """Keeps the two inputs and nothing of their size beside them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor | None, interleaved: bool) -> Tensor:
        from revlib.kernels import gaussian_log_prob as kernels

        ctx.save_for_backward(x, h)
        ctx.interleaved = interleaved
        return kernels.gaussian_log_prob(x, h, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlog_prob: Tensor) -> tuple[Tensor | None, ...]:
        from revlib.kernels import gaussian_log_prob as kernels

        x, h = ctx.saved_tensors
        dx, *dh = kernels.gaussian_log_prob_gradients(x, h, dlog_prob, ctx.interleaved)
        return dx, (dh[0] if dh else None), None
