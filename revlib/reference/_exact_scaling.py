"""Scaling on a power-of-two grid that loses no bit: what a division drops goes into a state.

A stream is whole numbers X of grid steps, and a scale is a ratio of whole numbers, R / S with R =
2**16. Dividing X * R by S leaves a remainder, which is pushed onto the element's state u as a
digit onto a stack; the low digits that X * R lacks are popped from it. Undoing pops what was
pushed, pushes what was popped, and finds every bit:

    forward:  u, r = divmod(u, R);  Y, q = divmod(X * R + r + C, S);  u = u * S + q
    inverse:  u, q = divmod(u, S);  X, r = divmod(Y * S + q - C, R);  u = u * R + r

C = S // 2 - R // 2 centres the rounding: without it, each scaling by a would shift the stream by
(a - 1) / 2 steps. This is the modular scale transform of iFlow (Zhang et al., 2021,
https://arxiv.org/abs/2111.00965); the state is the information buffer of Maclaurin et al. (2015,
https://arxiv.org/abs/1502.03492).
"""

import math

import torch
from torch import Tensor

from revlib.grid import SCALING_LIMIT

R_BITS = 16
R = 2**R_BITS
LARGEST_S = 2**31
# Of R / S, with S from 1 on: what a log-scale beyond these asks for, no S can give.
LOG_SCALES = (math.log(R / LARGEST_S), math.log(R))
# Whole numbers of at most 63 bits hold u * S + q, with q < S, and X * R + r + C.
STATE_LIMIT = 2**61
# X * R is below 2**62 in size; r, C and q add less than 2**33 to it.
WRAP_LIMIT = 2**62 + 2**33


def divisor(log_s: Tensor) -> Tensor:
    """S, which is whole; of a log_s out of range the nearest, and of NaN 1."""
    s = log_s.neg().exp_().mul_(R).round_()
    return s.nan_to_num_(1.0).clamp_(1, LARGEST_S)


def scales_fit(log_s: Tensor) -> Tensor:
    """Whether all log-scales are in range, and none is NaN."""
    if log_s.numel() == 0:
        return log_s.new_ones((), dtype=torch.bool)
    (low, high), (lowest, highest) = torch.aminmax(log_s), LOG_SCALES
    return (low >= lowest) & (high <= highest)


def ratio_of(s: Tensor) -> Tensor:
    """s / R, without rounding: R is a power of two."""
    return s * (1 / R)


def scale_and_shift(
    x: Tensor, s: Tensor, shift: Tensor, state: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Returns y and whether a value is out of range, and writes the state."""
    steps, s = 2.0**bits, to_whole(s, x)
    low = state & (R - 1)
    state >>= R_BITS
    v = to_whole(x * (steps * R), x).add_(low).add_(centre(s))
    quotient = divide_(v, s)
    room = fits(state.double().mul_(s), STATE_LIMIT)
    state.mul_(s.long()).add_(v.long())
    y = quotient.add_(to_whole((shift * steps).round_(), x)).to(x.dtype).mul_(1 / steps)
    return y, ~(room & in_range(x, bits) & in_range(y, bits))


def unshift_and_unscale(
    y: Tensor, s: Tensor, shift: Tensor, state: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Returns x and whether a value is out of range, and writes the state."""
    steps, s = 2.0**bits, to_whole(s, y)
    whole_s = s.long()
    popped = torch.div(state, whole_s, rounding_mode="floor")
    low = torch.addcmul(state, popped, whole_s, value=-1)
    v = to_whole(y * steps, y).sub_(to_whole((shift * steps).round_(), y))
    room = fits(popped, STATE_LIMIT // R)
    if v.dtype == torch.int64:
        # Where the product wraps around, x may seem in range.
        room &= fits(v.double().mul_(s).abs_(), WRAP_LIMIT)
    v = v.mul_(s).add_(low).sub_(centre(s))
    quotient = divide_(v, v.new_full((), R))
    state.copy_(popped.bitwise_left_shift_(R_BITS).bitwise_or_(v.long()))
    x = quotient.to(y.dtype).mul_(1 / steps)
    return x, ~(room & in_range(x, bits) & in_range(y, bits))


def to_whole(values: Tensor, stream: Tensor) -> Tensor:
    """Values that are whole, in a dtype that loses no digit of them: see `divide_`."""
    return values.to(torch.float64 if stream.dtype == torch.float32 else torch.int64)


def divide_(number: Tensor, divisor: Tensor) -> Tensor:
    """The floored quotient; the remainder is left in number."""
    if number.is_floating_point():
        # Below a whole number n, a quotient is at most n - 1 / divisor. Rounding moves it by up to
        # 2**-53 * number / divisor, which is less: a number in range has 41 bits.
        quotient = (number / divisor).floor_()
    else:
        quotient = torch.div(number, divisor, rounding_mode="floor")
    number.addcmul_(quotient, divisor, value=-1)
    return quotient


def centre(s: Tensor) -> Tensor:
    """C, in steps of 1 / R."""
    if s.is_floating_point():
        return s.mul(0.5).floor_().sub_(R // 2)
    return (s >> 1).sub_(R // 2)


def in_range(stream: Tensor, bits: int) -> Tensor:
    # A square is one pass where an absolute value takes two, and as exact here: the limit is a
    # power of two.
    return fits(stream * stream, (SCALING_LIMIT[stream.dtype] / 2**bits) ** 2)


def fits(values: Tensor, limit: float) -> Tensor:
    """Whether all values are below the limit, and none is NaN."""
    if values.numel() == 0:
        return values.new_ones((), dtype=torch.bool)
    return values.amax() < limit


def has_finite_sum(values: Tensor) -> Tensor:
    """Whether all values are finite, in one pass, unless they are beyond all ranges."""
    return values.sum().isfinite()
