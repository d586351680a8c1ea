"""ActNorm on a power-of-two grid, undone bit for bit: see `_exact_scaling`."""

import torch
from torch import Tensor

from revlib.reference._actnorm import actnorm_log_det, per_channel, space, sum_per_channel
from revlib.reference._exact_scaling import (
    divisor,
    has_finite_sum,
    ratio_of,
    scale_and_shift,
    scales_fit,
    unshift_and_unscale,
)


def exact_actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    s, shift = divisor_and_shift(log_scale, bias, x)
    y, overflow = scale_and_shift(x, s, shift, state, bits)
    return y, -log_ratio(s, x), overflow | ~(scales_fit(log_scale) & has_finite_sum(bias))


def exact_actnorm_inverse(
    y: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    s, shift = divisor_and_shift(log_scale, bias, y)
    x, overflow = unshift_and_unscale(y, s, shift, state, bits)
    return x, log_ratio(s, y), overflow | ~(scales_fit(log_scale) & has_finite_sum(bias))


def exact_actnorm_backward(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, shift = divisor_and_shift(log_scale, bias, y)
    x, _ = unshift_and_unscale(y, s, shift, state, bits)
    return x, *exact_actnorm_gradients(x, log_scale, bias, dy, dlog_det)


def exact_actnorm_inverse_backward(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    state: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, shift = divisor_and_shift(log_scale, bias, x)
    y, _ = scale_and_shift(x, s, shift, state, bits)
    return y, *exact_actnorm_inverse_gradients(x, log_scale, bias, dx, dlog_det)


def exact_actnorm_gradients(
    x: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, log_scale and bias, from x: those of ``y = x * a + bias``."""
    s, _ = divisor_and_shift(log_scale, bias, x)
    a = ratio_of(s).reciprocal_()
    dlog_scale = a.flatten() * sum_per_channel(dy * x) + space(x) * dlog_det.sum()
    dbias = sum_per_channel(dy)
    return (dy * a).to(x.dtype), dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


def exact_actnorm_inverse_gradients(
    x: Tensor, log_scale: Tensor, bias: Tensor, dx: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y, log_scale and bias, from x: those of ``x = (y - bias) / a``."""
    s, _ = divisor_and_shift(log_scale, bias, x)
    ratio = ratio_of(s)
    dlog_scale = -sum_per_channel(dx * x) - space(x) * dlog_det.sum()
    dbias = -ratio.flatten() * sum_per_channel(dx)
    return (dx * ratio).to(x.dtype), dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


def divisor_and_shift(log_scale: Tensor, bias: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    """S and the bias, shaped to meet the stream, in float64 if any is and float32 otherwise."""
    dtype = torch.promote_types(stream.dtype, torch.promote_types(log_scale.dtype, bias.dtype))
    s = divisor(log_scale.to(dtype))
    return per_channel(s, stream), per_channel(bias.to(dtype), stream)


def log_ratio(s: Tensor, stream: Tensor) -> Tensor:
    """The sum of ln(s / R) per sample."""
    return actnorm_log_det(stream, ratio_of(s).log_())
