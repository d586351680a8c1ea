"""Activation normalization: a scale and a bias per channel."""

import math

import torch
from torch import Tensor

# Of the standard deviation, as in Glow: it keeps the scale of a constant channel finite.
SMALLEST_STD = 1e-6


def actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scale = per_channel(log_scale.exp(), x)
    y = torch.addcmul(per_channel(bias, x), x, scale, out=out)
    return y.to(x.dtype), actnorm_log_det(x, log_scale)


def actnorm_inverse(
    y: Tensor, log_scale: Tensor, bias: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scale = (-log_scale).exp()
    x = torch.addcmul(per_channel(-bias * scale, y), y, per_channel(scale, y), out=out)
    return x.to(y.dtype), -actnorm_log_det(y, log_scale)


def actnorm_backward(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_s, scaled = per_channel(log_scale, y), y - per_channel(bias, y)
    x = scaled * (-log_s).exp()
    dx = dy * log_s.exp()
    dlog_scale = sum_per_channel(dy * scaled) + space(y) * dlog_det.sum()
    dbias = sum_per_channel(dy)
    return x.to(y.dtype), dx.to(y.dtype), dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


def actnorm_inverse_backward(
    x: Tensor, log_scale: Tensor, bias: Tensor, dx: Tensor, dlog_det: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_s, shift = per_channel(log_scale, x), per_channel(bias, x)
    y = x * log_s.exp() + shift
    dy = dx * (-log_s).exp()
    dlog_scale = -sum_per_channel(dx * x) - space(x) * dlog_det.sum()
    dbias = -sum_per_channel(dy)
    return y.to(x.dtype), dy.to(x.dtype), dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


def actnorm_init(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x, all_but_channels(x), correction=0)
    scale = variance.sqrt().clamp(min=SMALLEST_STD).reciprocal()
    return scale.log(), -mean * scale


def actnorm_log_det(x: Tensor, log_scale: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, log_scale.dtype), torch.float32)
    return (space(x) * log_scale.sum(dtype=dtype)).repeat(x.shape[0])


def per_channel(value: Tensor, like: Tensor) -> Tensor:
    """A value per channel, shaped to meet the elements of each."""
    return value.view(-1, *(1,) * (like.ndim - 2))


def sum_per_channel(x: Tensor) -> Tensor:
    return x.sum(all_but_channels(x), dtype=torch.promote_types(x.dtype, torch.float32))


def all_but_channels(x: Tensor) -> tuple[int, ...]:
    return 0, *range(2, x.ndim)


def space(x: Tensor) -> int:
    """How many elements a channel of a sample has."""
    return math.prod(x.shape[2:])
