"""The arithmetic of exact scaling, on what a program has loaded.

`revlib.reference` defines it, in the same letters. Whatever undoes must find the very S that was
used: kernels that compute it are compiled without fusing multiplications and additions, which a
compiler does here and not there.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import triton
import triton.language as tl
from torch import Tensor

from revlib.kernels.arithmetic import exp, floor_divide, round_half_even
from revlib.kernels.walk import walkable

R_BITS = tl.constexpr(16)
R = tl.constexpr(2**16)
LARGEST_S = tl.constexpr(2.0**31)
SMALLEST_LOG_SCALE = tl.constexpr(math.log(2.0**-15))
LARGEST_LOG_SCALE = tl.constexpr(math.log(2.0**16))
STATE_LIMIT = tl.constexpr(2.0**61)
# X * R is below 2**62 in size; r, C and q add less than 2**33 to it.
WRAP_LIMIT = tl.constexpr(2.0**62 + 2.0**33)
TWO_TO_63 = tl.constexpr(2.0**63)
# For launches, beside what a walk says.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def divisor(log_s):
    """S, whole but a float; of a log_s out of range the nearest, and of NaN 1."""
    s = round_half_even(exp(-log_s) * R)
    return tl.where(s >= 1, tl.minimum(s, LARGEST_S), 1)


@triton.jit
def scale_is_inside(log_s):
    return (log_s >= SMALLEST_LOG_SCALE) & (log_s <= LARGEST_LOG_SCALE)


@triton.jit
def ratio(s):
    """s / R, without rounding: R is a power of two."""
    return s * (1 / R)


@triton.jit
def transform(x, s, shift, state, INVERSE: tl.constexpr, STEPS: tl.constexpr, LIMIT: tl.constexpr):
    """What goes in comes out as y, with the state's new value, and whether all is in range."""
    given, inside = whole(x * STEPS, LIMIT)
    offset, offset_inside = whole(round_half_even(shift * STEPS), TWO_TO_63)
    s = s.to(tl.int64)
    centre = (s >> 1) - R // 2
    inside = inside & offset_inside
    if INVERSE:
        popped = state // s
        # Where a product wraps around, what comes out of it may seem in range.
        left = given - offset
        inside = inside & (tl.abs(left.to(tl.float64)) * s.to(tl.float64) < WRAP_LIMIT)
        inside = inside & (popped.to(tl.float64) * R < STATE_LIMIT)
        v = left * s + (state - popped * s) - centre
        result = v >> R_BITS
        state = popped * R + (v & (R - 1))
    else:
        popped = state >> R_BITS
        inside = inside & (popped.to(tl.float64) * s.to(tl.float64) < STATE_LIMIT)
        v = given * R + (state & (R - 1)) + centre
        quotient, rest = floor_divide(v, s)
        result = quotient + offset
        state = popped * s + rest
    y = result.to(x.dtype) * (1 / STEPS)
    return y, state, inside & (tl.abs(y) * STEPS < LIMIT)


@triton.jit
def whole(value, LIMIT: tl.constexpr):
    """A whole float as an integer, and whether it is below a limit; if not, or NaN, it is 0."""
    inside = tl.abs(value) < LIMIT
    return tl.where(inside, value, 0).to(tl.int64), inside


@triton.jit
def flag(overflow_ptr, outside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes True if anything is outside, as everyone writes it who meets such a value."""
    everywhere = tl.broadcast_to(overflow_ptr, [ROWS, COLUMNS])
    tl.store(everywhere, tl.full([ROWS, COLUMNS], True, tl.int1), mask=outside)


@contextmanager
def walkable_state(state: Tensor) -> Iterator[Tensor]:
    """The state, or a copy of it that is written back."""
    (u,) = walkable(state)
    yield u
    if u is not state:
        state.copy_(u)
