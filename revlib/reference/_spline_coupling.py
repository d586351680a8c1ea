"""Rational-quadratic spline coupling of Neural Spline Flows, with linear tails.

The arithmetic is in float32 or wider: in half precision, the knots of narrow bins coincide.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softmax, softplus

from revlib.reference._sums import sum_per_sample


class Spline(NamedTuple):
    """The splines of all elements, in the last dimension: bins + 1 knots, and the slopes there."""

    x: Tensor
    y: Tensor
    slope: Tensor


class Bin(NamedTuple):
    """The bin in which each element lies, and the slopes at its ends."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    slope_left: Tensor
    slope_right: Tensor


def spline_coupling(
    x: Tensor,
    h: Tensor,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_slope: float,
) -> tuple[Tensor, Tensor]:
    spline = splines(x, h, bins, bound, min_width, min_height, min_slope)
    outside, inner = tails(x, spline, bound)
    bin = bin_at(inner, spline.x, spline)
    theta = (inner - bin.left) / bin.width
    y, log_slope = value_and_log_slope(theta, bin)
    y = torch.where(outside, x, y)
    return y.to(x.dtype), sum_per_sample(log_slope.masked_fill(outside, 0))


def spline_coupling_inverse(
    y: Tensor,
    h: Tensor,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_slope: float,
) -> tuple[Tensor, Tensor]:
    spline = splines(y, h, bins, bound, min_width, min_height, min_slope)
    outside, inner = tails(y, spline, bound)
    bin = bin_at(inner, spline.y, spline)
    theta = solve(inner, bin)
    _, log_slope = value_and_log_slope(theta, bin)
    x = torch.where(outside, y, bin.left + theta * bin.width)
    return x.to(y.dtype), -sum_per_sample(log_slope.masked_fill(outside, 0))


def spline_coupling_backward(
    y: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (bins, bound, min_width, min_height, min_slope)
    x, _ = spline_coupling_inverse(y, h, *options)
    return x, *gradients(spline_coupling, x, h, dy, dlog_det, options)


def spline_coupling_inverse_backward(
    x: Tensor,
    h: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (bins, bound, min_width, min_height, min_slope)
    y, _ = spline_coupling(x, h, *options)
    return y, *gradients(spline_coupling_inverse, y, h, dx, dlog_det, options)


def splines(
    x: Tensor,
    h: Tensor,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_slope: float,
) -> Spline:
    """The splines that h holds for the elements of x."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, h.dtype), torch.float32)
    parameters = h.to(dtype).unflatten(1, (x.shape[1], 3 * bins - 1)).movedim(2, -1)
    width_logits, height_logits, raw_slopes = parameters.split((bins, bins, bins - 1), -1)
    # A slope of 1 at both ends, where the tails go on with that slope.
    slopes = pad(min_slope + softplus(raw_slopes), (1, 1), value=1.0)
    return Spline(
        knots(width_logits, min_width, bound), knots(height_logits, min_height, bound), slopes
    )


def knots(logits: Tensor, minimum: float, bound: float) -> Tensor:
    """Divides [-bound, bound] into bins, each at least the minimum's share of it."""
    shares = minimum + (1 - minimum * logits.shape[-1]) * softmax(logits, -1)
    inner = 2 * bound * shares.cumsum(-1)[..., :-1] - bound
    return pad(pad(inner, (1, 0), value=-bound), (0, 1), value=bound)


def tails(x: Tensor, spline: Spline, bound: float) -> tuple[Tensor, Tensor]:
    """Which elements lie outside the spline, and x with those set to 0.  NaN is inside."""
    x = x.to(spline.x.dtype)
    outside = x.abs() > bound
    return outside, x.masked_fill(outside, 0)


def bin_at(x: Tensor, knots: Tensor, spline: Spline) -> Bin:
    """The bin between whose knots each element of x lies; a knot begins the bin to its right."""
    index = (x[..., None] >= knots[..., 1:-1]).sum(-1, keepdim=True)
    left, bottom, slope_left = (values.gather(-1, index).squeeze(-1) for values in spline)
    right, top, slope_right = (values.gather(-1, index + 1).squeeze(-1) for values in spline)
    return Bin(left, right - left, bottom, top - bottom, slope_left, slope_right)


def value_and_log_slope(theta: Tensor, bin: Bin) -> tuple[Tensor, Tensor]:
    """y, and the logarithm of dy/dx, at the place theta in the bin, which goes from 0 to 1."""
    _, width, bottom, height, slope_left, slope_right = bin
    s = height / width
    between = theta * (1 - theta)
    denominator = s + (slope_left + slope_right - 2 * s) * between
    y = bottom + height * (s * theta**2 + slope_left * between) / denominator
    slope = slope_right * theta**2 + 2 * s * between + slope_left * (1 - theta) ** 2
    return y, 2 * (s.log() - denominator.log()) + slope.log()


def solve(y: Tensor, bin: Bin) -> Tensor:
    """The theta at which the spline is y: a root of a quadratic, without cancellation near 0."""
    _, width, bottom, height, slope_left, slope_right = bin
    s = height / width
    rise = y - bottom
    bend = rise * (slope_left + slope_right - 2 * s)
    a = height * (s - slope_left) + bend
    b = height * slope_left - bend
    c = -s * rise
    discriminant = (b**2 - 4 * a * c).clamp(min=0)
    theta = 2 * c / (-b - discriminant.sqrt())
    # Where a bin is steep, rounding may put it outside, and there a slope may be negative; its
    # gradient stays, as in the kernel.
    return theta + (theta.clamp(0, 1) - theta).detach()


@torch.enable_grad()
def gradients(
    op: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    options: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Those of x and h, which autograd finds in the definition."""
    x, h = x.detach().requires_grad_(), h.detach().requires_grad_()
    y, log_det = op(x, h, *options)
    dy, dlog_det = dy.to(y.dtype), dlog_det.to(log_det.dtype)
    return torch.autograd.grad((y, log_det), (x, h), (dy, dlog_det))
