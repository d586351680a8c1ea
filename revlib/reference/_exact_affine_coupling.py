"""Affine coupling on a power-of-two grid, undone bit for bit: see `_exact_scaling`."""

import torch
from torch import Tensor

from revlib.reference import _affine_coupling
from revlib.reference._affine_coupling import (
    per_sample,
    raw_and_shift,
)
from revlib.reference._exact_scaling import (
    divisor,
    has_finite_sum,
    ratio_of,
    scale_and_shift,
    scales_fit,
    unshift_and_unscale,
)
from revlib.reference._sums import sum_per_sample


def exact_affine_coupling(
    x: Tensor, h: Tensor, state: Tensor, scale: str, clamp: float, interleaved: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    s, shift, h_fits = scaling(h, x, scale, clamp, interleaved)
    y, overflow = scale_and_shift(x, s, shift, state, bits)
    return y, -log_ratio(s), overflow | ~h_fits


def exact_affine_coupling_inverse(
    y: Tensor, h: Tensor, state: Tensor, scale: str, clamp: float, interleaved: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    s, shift, h_fits = scaling(h, y, scale, clamp, interleaved)
    x, overflow = unshift_and_unscale(y, s, shift, state, bits)
    return x, log_ratio(s), overflow | ~h_fits


def exact_affine_coupling_backward(
    y: Tensor,
    h: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    scale: str,
    clamp: float,
    interleaved: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    s, shift, slope = scaling_and_slope(h, y, scale, clamp, interleaved)
    x, _ = unshift_and_unscale(y, s, shift, state, bits)
    dx, draw = gradients(x, s, dy, dlog_det, slope)
    return x, dx, joined(draw, dy, h, interleaved)


def exact_affine_coupling_inverse_backward(
    x: Tensor,
    h: Tensor,
    state: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    scale: str,
    clamp: float,
    interleaved: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    s, shift, slope = scaling_and_slope(h, x, scale, clamp, interleaved)
    y, _ = scale_and_shift(x, s, shift, state, bits)
    dy, draw = inverse_gradients(x, s, dx, dlog_det, slope)
    return y, dy, joined(draw, -dy, h, interleaved)


def exact_affine_coupling_gradients(
    x: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and h, from x: bit for bit those of `exact_affine_coupling_backward`."""
    s, _, slope = scaling_and_slope(h, x, scale, clamp, interleaved)
    dx, draw = gradients(x, s, dy, dlog_det, slope)
    return dx, joined(draw, dy, h, interleaved)


def exact_affine_coupling_inverse_gradients(
    x: Tensor,
    h: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of y and h, from x, as of `exact_affine_coupling_inverse_backward`."""
    s, _, slope = scaling_and_slope(h, x, scale, clamp, interleaved)
    dy, draw = inverse_gradients(x, s, dx, dlog_det, slope)
    return dy, joined(draw, -dy, h, interleaved)


def scaling(
    h: Tensor, stream: Tensor, scale: str, clamp: float, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """S, the shift, and whether h is finite and its scales are in range."""
    h = widened(h, stream)
    raw, shift = raw_and_shift(h, interleaved)
    log_s = log_scale(raw, scale, clamp)
    return divisor(log_s), shift, scales_fit(log_s) & has_finite_sum(h)


def scaling_and_slope(
    h: Tensor, stream: Tensor, scale: str, clamp: float, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """S, the shift, and the derivative of the log-scale with respect to raw."""
    raw, shift = raw_and_shift(widened(h, stream), interleaved)
    log_s, slope = log_scale_and_slope(raw, scale, clamp)
    return divisor(log_s), shift, slope


def gradients(
    x: Tensor, s: Tensor, dy: Tensor, dlog_det: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """dx and draw of ``y = x * a + shift`` with a = R / s, as if s were not rounded."""
    a = ratio_of(s).reciprocal_()
    dlog_s = (x * a).mul_(dy).add_(per_sample(dlog_det, x))
    return (dy * a).to(x.dtype), dlog_s.mul_(slope)


def inverse_gradients(
    x: Tensor, s: Tensor, dx: Tensor, dlog_det: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """dy and draw of ``x = (y - shift) / a``."""
    dlog_s = (dx * x).neg_().sub_(per_sample(dlog_det, x))
    return (dx * ratio_of(s)).to(x.dtype), dlog_s.mul_(slope)


def log_scale(raw: Tensor, scale: str, clamp: float) -> Tensor:
    if scale == "tanh":
        # By a sigmoid, in a fifth of the time: near 0 it has fewer digits, but not fewer of exp.
        return raw.mul(2 / clamp).sigmoid_().mul_(2 * clamp).sub_(clamp)
    return _affine_coupling.log_scale(raw, scale, clamp)


def log_scale_and_slope(raw: Tensor, scale: str, clamp: float) -> tuple[Tensor, Tensor]:
    if scale == "tanh":
        log_s = log_scale(raw, scale, clamp)
        # From the tanh at hand: another one would cost as much as all else in `gradients`.
        return log_s, log_s.div(clamp).square_().neg_().add_(1)
    return _affine_coupling.log_scale_and_slope(raw, scale, clamp)


def joined(draw: Tensor, dshift: Tensor, h: Tensor, interleaved: bool) -> Tensor:
    """The gradient of h, in its dtype."""
    dh = torch.empty_like(h)
    if interleaved:
        parts = dh[:, 0::2], dh[:, 1::2]
    else:
        parts = dh.chunk(2, 1)
    for part, values in zip(parts, (draw, dshift), strict=True):
        part.copy_(values)
    return dh


def log_ratio(s: Tensor) -> Tensor:
    """The sum of ln(s / R) per sample."""
    return sum_per_sample(ratio_of(s).log_())


def widened(h: Tensor, stream: Tensor) -> Tensor:
    """In float64 if either is, and in float32 otherwise: what the arithmetic is done in."""
    return h.to(torch.promote_types(h.dtype, stream.dtype))
