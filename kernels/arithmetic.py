"""Elementary functions in Triton's own primitives, for float32 and float64 alike.

Triton's interpreter has no libdevice, and `tl.exp` in float32 rounds its argument before the
hardware's power of two, which costs several units in the last place away from zero. On a GPU as
fast as an H200 a kernel that moves two bytes an element has time for about fifty instructions
an element, so the float32 forms are short. The approximations of tanh and atan are those of the
Cephes library (S. Moshier, https://netlib.org/cephes), good to the last bits of their dtype.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln(2) in two parts: multiples of the first by small integers are exact in float32.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.1219444005469058e-4)
# Powers of two beyond these are infinite, or so small that the rest does not matter.
LARGEST_POWER = tl.constexpr(127.0)
SMALLEST_POWER = tl.constexpr(-200.0)
# From 2**23 on every float32 is an integer, and from 2**52 on every float64.
TWO_TO_23 = tl.constexpr(8388608.0)
TWO_TO_52 = tl.constexpr(4503599627370496.0)
PI_QUARTER = tl.constexpr(0.7853981633974483)
# What the float32 and the float64 nearest to pi / 4 leave out.
PI_QUARTER_LOW_32 = tl.constexpr(-2.1855694143368964e-8)
PI_QUARTER_LOW_64 = tl.constexpr(3.061616997868383e-17)
TAN_PI_8 = tl.constexpr(0.4142135623730950)
TAN_3_PI_8 = tl.constexpr(2.414213562373095)


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    # The bounds keep an infinite x from meeting itself: inf - inf is NaN.
    power = tl.minimum(tl.maximum(x * LOG2_E, SMALLEST_POWER), LARGEST_POWER)
    # Adding a number of spacing 1 rounds to an integer.
    power = (power + 1.5 * TWO_TO_23) - 1.5 * TWO_TO_23
    rest = x - power * LN2_HIGH - power * LN2_LOW
    return tl.exp2(power) * tl.exp2(rest * LOG2_E)


@triton.jit
def sigmoid(x):
    return 1 / (1 + exp(-x))


@triton.jit
def softplus(x):
    # log(1 + e) by the series of 2 * artanh(e / (2 + e)), which needs no digit of 1 + e.
    e = exp(-tl.abs(x))
    root = e / (2 + e)
    square = root * root
    series = tl.full(x.shape, 1 / 37, x.dtype)
    for i in tl.static_range(17 if x.dtype == tl.float64 else 7, -1, -1):
        series = series * square + 1 / (2 * i + 1)
    return tl.maximum(x, 0) + 2 * root * series


@triton.jit
def tanh(x):
    size = tl.abs(x)
    square = x * x
    if x.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square
        p = p - 1.61468768441708447952e3
        q = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square
        small = p / (q + 4.84406305325125486048e3)
        growth = tl.exp(2 * size)
    else:
        small = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
        small = (small * square + 1.33314422036e-1) * square - 3.33332819422e-1
        # From 0.625 on, at most a third of what this is off by reaches the result.
        growth = tl.exp2(size * (2 * LOG2_E))
    far = 1 - 2 / (growth + 1)
    return tl.where(size < 0.625, x + x * square * small, tl.where(x < 0, -far, far))


@triton.jit
def atan(x):
    size = tl.abs(x)
    steep = size > TAN_3_PI_8
    middle = (size > TAN_PI_8) & ~steep
    # -1 / size, (size - 1) / (size + 1) or size itself, by one division.
    above = tl.where(steep, -1, tl.where(middle, size - 1, size))
    below = tl.where(steep, size, tl.where(middle, size + 1, 1))
    reduced = above / below
    quarters = tl.where(steep, 2.0, tl.where(middle, 1.0, 0.0)).to(x.dtype)

    z = reduced * reduced
    if x.dtype == tl.float64:
        p = (-8.750608600031904122785e-1 * z - 1.615753718733365076637e1) * z
        p = (p - 7.500855792314704667340e1) * z - 1.228866684490136173410e2
        p = p * z - 6.485021904942025371773e1
        q = (z + 2.485846490142306297962e1) * z + 1.650270098316988542046e2
        q = (q * z + 4.328810604912902668951e2) * z + 4.853903996359136964868e2
        small = p / (q * z + 1.945506571482613964425e2)
        low = PI_QUARTER_LOW_64
    else:
        small = (8.05374449538e-2 * z - 1.38776856032e-1) * z + 1.99777106478e-1
        small = small * z - 3.33329491539e-1
        low = PI_QUARTER_LOW_32
    angle = quarters * PI_QUARTER + (reduced * z * small + reduced + quarters * low)
    return tl.where(x < 0, -angle, angle)


@triton.jit
def round_half_even(x):
    size = tl.abs(x)
    integers = TWO_TO_52 if x.dtype == tl.float64 else TWO_TO_23
    rounded = (size + integers) - integers
    rounded = tl.where(size < integers, rounded, size)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def floor_divide(number, divisor):
    """Quotient and remainder of integers; the remainder is never below 0, nor is the divisor."""
    # Triton rounds towards 0, as the hardware does.
    quotient = number // divisor
    rest = number - quotient * divisor
    below = rest < 0
    return tl.where(below, quotient - 1, quotient), tl.where(below, rest + divisor, rest)
