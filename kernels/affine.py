"""The arithmetic of affine couplings, on what a program has loaded.

`revlib.reference.log_scale` defines the bounds of the log-scale, by the same names.
"""

import triton
import triton.language as tl

from revlib.kernels.arithmetic import atan, exp, sigmoid, tanh


@triton.jit
def transform(
    x, raw, shift, INVERSE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr
):  # fmt: skip
    """What goes in comes out as y, with the log-scale of the direction."""
    log_s, _ = log_scale(raw, SCALE, CLAMP)
    if INVERSE:
        return (x - shift) * exp(-log_s), -log_s
    else:
        return x * factor(raw, log_s, SCALE) + shift, log_s


@triton.jit
def transform_bwd(
    given, raw, shift, dy, dlog_det,
    FROM_OUTPUT: tl.constexpr, INVERSE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """The input x, and the gradients dx, draw and dshift, from what came out or what went in."""
    log_s, slope = log_scale(raw, SCALE, CLAMP)
    if INVERSE:
        y = given if FROM_OUTPUT else (given - shift) * exp(-log_s)
        x = y * exp(log_s) + shift if FROM_OUTPUT else given
        dx = dy * exp(-log_s)
        dshift = -dx
        dlog_s = -dy * y - dlog_det
    else:
        s = factor(raw, log_s, SCALE)
        scaled = given - shift if FROM_OUTPUT else given * s
        x = scaled / s if FROM_OUTPUT else given
        dx = dy * s
        dshift = dy
        dlog_s = dy * scaled + dlog_det
    return x, dx, dlog_s * slope, dshift


@triton.jit
def factor(raw, log_s, SCALE: tl.constexpr):
    """The scale itself, for a sigmoid without the detour over its logarithm."""
    if SCALE == "sigmoid":
        return sigmoid(raw + 2) + 1e-3
    else:
        return exp(log_s)


@triton.jit
def log_scale(raw, SCALE: tl.constexpr, CLAMP: tl.constexpr):
    """The log-scale and its derivative with respect to raw."""
    if SCALE == "exp":
        return raw, tl.full(raw.shape, 1, raw.dtype)
    elif SCALE == "tanh":
        bounded = tanh(raw / CLAMP)
        return CLAMP * bounded, 1 - bounded * bounded
    elif SCALE == "sigmoid":
        gate = sigmoid(raw + 2)
        return tl.log(gate + 1e-3), gate * (1 - gate) / (gate + 1e-3)
    else:
        tl.static_assert(SCALE == "atan")
        return (CLAMP * 0.636) * atan(raw), (CLAMP * 0.636) / (1 + raw * raw)
