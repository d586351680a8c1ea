"""Rational-quadratic spline coupling, in one pass each way, log_det included.

The conditioner's output h holds 3 * bins - 1 parameters for each element: the logits of its bins'
widths, those of their heights, and the raw slopes at the knots between the bins. Each of the three
is read in place, as a tile [SAMPLES, ELEMENTS, BINS]. All knots are compared at once to find an
element's bin, and the rest is about that bin alone.

What is called gets x and gives y, whether it runs forward or inverse. Of the spline itself, the
horizontal axis is u, cut into widths, and the vertical axis v, cut into heights; theta, from 0 to
1, is the place in the bin:

    u = left + width * theta,    v = bottom + height * rise(theta),    g = dv / du

The gradient kernel finds theta from y, or from x where nobody needs x rebuilt, and differentiates
v and log g. That serves the inverse too: by the implicit function theorem, a gradient of its u is
one of v, divided by -g.

One warp works on a tile, and a thread of it on whole elements, so that nothing about a bin is
computed twice and no sum over bins crosses threads. Triton lays out a tile so because the stream
is loaded as [SAMPLES, ELEMENTS, 1], after the parameters, and meets them early, in `inside`.
Parameters that lie otherwise in memory, as in channels_last, change threads once. Without that,
a kernel had up to four times the instructions, and more than the memory leaves time for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.kernels.arithmetic import LOG2_E, sigmoid, softplus
from revlib.kernels.coupling_ops import CouplingOps
from revlib.kernels.walk import (
    Walk,
    accumulator,
    new_like,
    offsets,
    ordered_sum,
    store_sum,
    tile,
    triton_dtype,
)

# What a warp has registers for: elements times bins, and elements in either kernel.
TILE_SIZE = 1024
MOST_ELEMENTS = 128
MOST_ELEMENTS_BWD = 64


@triton.jit
def spline_coupling_kernel(
    x_ptr, h_ptr, y_ptr, sums_ptr,
    n_samples, n_elements, n_cols, n_tiles, h_step, x_strides, h_strides, y_strides,
    INVERSE: tl.constexpr, N_BINS: tl.constexpr, BOUND: tl.constexpr, MIN_WIDTH: tl.constexpr,
    MIN_HEIGHT: tl.constexpr, MIN_SLOPE: tl.constexpr, BINS: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, column = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    sample, element, mask = sample[:, :, None], element[:, :, None], mask[:, :, None]
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    y_offsets = offsets(sample, element, n_cols, y_strides, FLAT)
    bin = tl.arange(0, BINS)[None, None, :]

    widths, heights, slopes = load_parameters(h_ptr, h_offsets, h_step, mask, bin, N_BINS, FLOAT)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0).to(FLOAT)

    outside = tl.abs(x) > BOUND
    inner = inside(outside, x)
    widths, unit_width = softmax(inside(outside, widths), bin, N_BINS)
    heights, unit_height = softmax(inside(outside, heights), bin, N_BINS)
    slopes = inside(outside, slopes)
    us = knots(widths, unit_width, bin, N_BINS, MIN_WIDTH, BOUND)
    vs = knots(heights, unit_height, bin, N_BINS, MIN_HEIGHT, BOUND)
    index = search(vs if INVERSE else us, inner, bin, N_BINS)
    left, width = start_and_size(us, index, bin, BOUND)
    bottom, height = start_and_size(vs, index, bin, BOUND)
    slope_left, _ = slope_at(index, slopes, bin, N_BINS, MIN_SLOPE)
    slope_right, _ = slope_at(index + 1, slopes, bin, N_BINS, MIN_SLOPE)

    s = height / width
    if INVERSE:
        theta = solve(inner - bottom, height, s, slope_left, slope_right)
    else:
        theta = (inner - left) / width
    rise, g = rise_and_g(theta, s, slope_left, slope_right)
    if INVERSE:
        y = left + width * theta
        log_det = -tl.log(g)
    else:
        y = bottom + height * rise
        log_det = tl.log(g)

    tl.store(y_ptr + y_offsets, tl.where(outside, x, y), mask=mask)
    log_det = inside(outside, log_det)
    store_sum(sums_ptr, log_det, sample, column, mask, n_samples, n_tiles)


@triton.jit
def spline_coupling_bwd_kernel(
    given_ptr, h_ptr, dy_ptr, dlog_det_ptr, x_ptr, dx_ptr, dh_ptr,
    n_samples, n_elements, n_cols, n_tiles, dlog_det_stride, h_step, dh_step,
    given_strides, h_strides, dy_strides, x_strides, dx_strides, dh_strides,
    INVERSE: tl.constexpr, N_BINS: tl.constexpr, BOUND: tl.constexpr, MIN_WIDTH: tl.constexpr,
    MIN_HEIGHT: tl.constexpr, MIN_SLOPE: tl.constexpr, BINS: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, _ = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    sample, element, mask = sample[:, :, None], element[:, :, None], mask[:, :, None]
    given_offsets = offsets(sample, element, n_cols, given_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    dy_offsets = offsets(sample, element, n_cols, dy_strides, FLAT)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    dx_offsets = offsets(sample, element, n_cols, dx_strides, FLAT)
    dh_offsets = offsets(sample, element, n_cols, dh_strides, FLAT)
    bin = tl.arange(0, BINS)[None, None, :]

    widths, heights, slopes = load_parameters(h_ptr, h_offsets, h_step, mask, bin, N_BINS, FLOAT)
    dlog_det = tl.load(
        dlog_det_ptr + sample * dlog_det_stride, mask=sample < n_samples, other=0
    ).to(FLOAT)
    given = tl.load(given_ptr + given_offsets, mask=mask, other=0).to(FLOAT)
    dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0).to(FLOAT)

    on_u: tl.constexpr = INVERSE != (x_ptr is None)
    outside = tl.abs(given) > BOUND
    inner = inside(outside, given)
    widths, unit_width = softmax(inside(outside, widths), bin, N_BINS)
    heights, unit_height = softmax(inside(outside, heights), bin, N_BINS)
    slopes = inside(outside, slopes)
    us = knots(widths, unit_width, bin, N_BINS, MIN_WIDTH, BOUND)
    vs = knots(heights, unit_height, bin, N_BINS, MIN_HEIGHT, BOUND)
    index = search(us if on_u else vs, inner, bin, N_BINS)
    left, width = start_and_size(us, index, bin, BOUND)
    bottom, height = start_and_size(vs, index, bin, BOUND)
    slope_left, left_by_raw = slope_at(index, slopes, bin, N_BINS, MIN_SLOPE)
    slope_right, right_by_raw = slope_at(index + 1, slopes, bin, N_BINS, MIN_SLOPE)

    s = height / width
    if on_u:
        theta = (inner - left) / width
    else:
        theta = solve(inner - bottom, height, s, slope_left, slope_right)
    rise, g = rise_and_g(theta, s, slope_left, slope_right)
    # Derivatives: a_by_b is da / db.
    rest = 1 - theta
    between = theta * rest
    bend = slope_left + slope_right - 2 * s
    per_q = 1 / (s + bend * between)
    per_p = 1 / (slope_right * theta * theta + 2 * s * between + slope_left * rest * rest)
    scale = between * per_q * per_q
    rise_by_s = scale * (slope_right * theta * theta - slope_left * rest * rest)
    rise_by_left = scale * rest * (s * rest + slope_right * theta)
    rise_by_right = -scale * theta * (s * theta + slope_left * rest)
    p_by_theta = 2 * (slope_right * theta + s * (rest - theta) - slope_left * rest)
    log_g_by_theta = p_by_theta * per_p - 2 * bend * (rest - theta) * per_q
    log_g_by_s = 2 / s + 2 * between * per_p - 2 * (1 - 2 * between) * per_q
    log_g_by_left = rest * rest * per_p - 2 * between * per_q
    log_g_by_right = theta * theta * per_p - 2 * between * per_q

    # Gradients: du is that of u where the parameters are fixed.
    log_g_by_u = log_g_by_theta / width
    if INVERSE:
        dlog_g = inside(outside, -dlog_det)
        du = inside(outside, -dy)
        dv = (du - dlog_g * log_g_by_u) / g
        dx = -dv
    else:
        dlog_g = inside(outside, dlog_det)
        dv = inside(outside, dy)
        du = dv * g + dlog_g * log_g_by_u
        dx = du
    drise = dv * height
    ds = drise * rise_by_s + dlog_g * log_g_by_s
    dwidth = -du * theta - ds * s / width
    dheight = dv * rise + ds / width
    dslope_left = (drise * rise_by_left + dlog_g * log_g_by_left) * left_by_raw
    dslope_right = (drise * rise_by_right + dlog_g * log_g_by_right) * right_by_raw

    dwidths = softmax_gradient(
        widths, unit_width, -du, dwidth, index, bin, MIN_WIDTH, N_BINS, BOUND
    )
    dheights = softmax_gradient(
        heights, unit_height, dv, dheight, index, bin, MIN_HEIGHT, N_BINS, BOUND
    )
    dslopes = tl.where(bin == index - 1, dslope_left, tl.where(bin == index, dslope_right, 0))

    if x_ptr is not None:
        x = bottom + height * rise if INVERSE else left + width * theta
        tl.store(x_ptr + x_offsets, tl.where(outside, given, x), mask=mask)
    tl.store(dx_ptr + dx_offsets, tl.where(outside, dy, dx), mask=mask)
    store_parameters(dh_ptr, dh_offsets, dh_step, mask, bin, N_BINS, dwidths, dheights, dslopes)


@triton.jit
def load_parameters(
    h_ptr, h_offsets, h_step, mask, bin, N_BINS: tl.constexpr, FLOAT: tl.constexpr
):
    ptrs = h_ptr + (h_offsets + bin * h_step)
    mask = mask & (bin < N_BINS)
    widths = tl.load(ptrs, mask=mask, other=0).to(FLOAT)
    heights = tl.load(ptrs + N_BINS * h_step, mask=mask, other=0).to(FLOAT)
    mask = mask & (bin < N_BINS - 1)
    slopes = tl.load(ptrs + 2 * N_BINS * h_step, mask=mask, other=0).to(FLOAT)
    return widths, heights, slopes


@triton.jit
def store_parameters(
    h_ptr, h_offsets, h_step, mask, bin, N_BINS: tl.constexpr, widths, heights, slopes
):
    ptrs = h_ptr + (h_offsets + bin * h_step)
    mask = mask & (bin < N_BINS)
    tl.store(ptrs, widths, mask=mask)
    tl.store(ptrs + N_BINS * h_step, heights, mask=mask)
    mask = mask & (bin < N_BINS - 1)
    tl.store(ptrs + 2 * N_BINS * h_step, slopes, mask=mask)


@triton.jit
def inside(outside, values):
    return tl.where(outside, 0, values)


@triton.jit
def softmax(logits, bin, N_BINS: tl.constexpr):
    """The bins' weights, 0 where there is no bin, and what scales them to shares of 1."""
    logits = tl.where(bin < N_BINS, logits, float("-inf"))
    # As powers of two: what the product's rounding moves is the same for all, and cancels.
    largest = tl.max(logits, axis=2, keep_dims=True) * LOG2_E
    weights = tl.exp2(logits * LOG2_E - largest)
    return weights, 1 / tl.sum(weights, axis=2, keep_dims=True)


@triton.jit
def softmax_gradient(
    weights, unit, dstart, dsize, index, bin,
    MINIMUM: tl.constexpr, N_BINS: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """The logits' gradients, of where the element's bin starts and of its size.

    The bins before it move its start, and those after it nothing.
    """
    dshares = tl.where(bin == index, dsize, tl.where(bin < index, dstart, 0))
    mean = unit * tl.sum(weights * dshares, axis=2, keep_dims=True)
    unit = unit * (2 * BOUND * (1 - MINIMUM * N_BINS))
    return unit * weights * (dshares - mean)


@triton.jit
def knots(weights, unit, bin, N_BINS: tl.constexpr, MINIMUM: tl.constexpr, BOUND: tl.constexpr):
    """Where each bin ends."""
    # Summing what the bins have above the mean keeps the sums, and their rounding, small.
    unit = unit * (2 * BOUND * (1 - MINIMUM * N_BINS))
    excess = tl.cumsum(weights * unit - 2 * BOUND * (1 / N_BINS - MINIMUM), axis=2)
    ends = excess + ((bin + 1).to(weights.dtype) * (2 * BOUND / N_BINS) - BOUND)
    return tl.where(bin < N_BINS - 1, ends, BOUND)


@triton.jit
def search(knots, value, bin, N_BINS: tl.constexpr):
    """The bin of each value; a knot begins the bin to its right."""
    passed = (knots <= value) & (bin < N_BINS - 1)
    return tl.sum(passed.to(tl.int32), axis=2, keep_dims=True)


@triton.jit
def start_and_size(knots, index, bin, BOUND: tl.constexpr):
    start = tl.where(index == 0, -BOUND, pick(knots, bin, index - 1))
    return start, pick(knots, bin, index) - start


@triton.jit
def slope_at(knot, raw, bin, N_BINS: tl.constexpr, MIN_SLOPE: tl.constexpr):
    """The slope at a knot, and its derivative by the raw one; 1 and 0 where the tails begin."""
    raw = pick(raw, bin, knot - 1)
    tail = (knot == 0) | (knot == N_BINS)
    return tl.where(tail, 1, softplus(raw) + MIN_SLOPE), tl.where(tail, 0, sigmoid(raw))


@triton.jit
def pick(values, bin, index):
    # A sum, where a maximum would overlook a NaN.
    return tl.sum(tl.where(bin == index, values, 0), axis=2, keep_dims=True)


@triton.jit
def rise_and_g(theta, s, slope_left, slope_right):
    """How far v is up the bin, from 0 to 1, and dv / du."""
    rest = 1 - theta
    between = theta * rest
    per_q = 1 / (s + (slope_left + slope_right - 2 * s) * between)
    rise = (s * theta * theta + slope_left * between) * per_q
    p = slope_right * theta * theta + 2 * s * between + slope_left * rest * rest
    return rise, p * (s * per_q) * (s * per_q)


@triton.jit
def solve(v, height, s, slope_left, slope_right):
    """The theta that is v above the bottom: the root of a quadratic that does not cancel at 0."""
    bend = v * (slope_left + slope_right - 2 * s)
    a = height * (s - slope_left) + bend
    b = height * slope_left - bend
    c = -s * v
    theta = 2 * c / (-b - tl.sqrt(tl.maximum(b * b - 4 * a * c, 0)))
    # Rounding may put it outside, where a slope may be negative. A NaN stays.
    theta = tl.maximum(theta, 0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(theta, 1, propagate_nan=tl.PropagateNan.ALL)


def couple(
    x: Tensor,
    h: Tensor,
    y: Tensor,
    inverse: bool,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_slope: float,
) -> Tensor:
    """Writes y, which may be x itself, and returns the log_det."""
    filled_bins = triton.next_power_of_2(bins)
    tile_size = min(TILE_SIZE // filled_bins, MOST_ELEMENTS)
    walk = Walk(x, first_parameter(h, x, bins), y, tile_size=tile_size)
    sums = walk.new_sums(x, accumulator(x, h))
    if walk.n_programs:
        with torch.cuda.device_of(x):
            spline_coupling_kernel[(walk.n_programs,)](
                x, h, y, sums, *walk.sizes, h.stride(1), *walk.strides,
                INVERSE=inverse, N_BINS=bins, BOUND=bound, MIN_WIDTH=min_width,
                MIN_HEIGHT=min_height, MIN_SLOPE=min_slope, BINS=filled_bins,
                FLOAT=triton_dtype(sums.dtype), **walk.constants, num_warps=1,
            )  # fmt: skip
    return ordered_sum(sums)


def couple_bwd(
    given: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    x: Tensor | None,
    dx: Tensor,
    inverse: bool,
    bins: int,
    bound: float,
    min_width: float,
    min_height: float,
    min_slope: float,
) -> Tensor:
    """Writes x, which may be given itself, and dx, which may be dy, and returns dh.

    Given is what came out, or what went in where x is None.
    """
    dh = new_like(h)
    filled_bins = triton.next_power_of_2(bins)
    first, dfirst = first_parameter(h, given, bins), first_parameter(dh, given, bins)
    tile_size = min(TILE_SIZE // filled_bins, MOST_ELEMENTS_BWD)
    walk = Walk(given, first, dy, dx if x is None else x, dx, dfirst, tile_size=tile_size)
    if walk.n_programs:
        with torch.cuda.device_of(given):
            spline_coupling_bwd_kernel[(walk.n_programs,)](
                given, h, dy, dlog_det, x, dx, dh,
                *walk.sizes, dlog_det.stride(0), h.stride(1), dh.stride(1), *walk.strides,
                INVERSE=inverse, N_BINS=bins, BOUND=bound, MIN_WIDTH=min_width,
                MIN_HEIGHT=min_height, MIN_SLOPE=min_slope, BINS=filled_bins,
                FLOAT=triton_dtype(accumulator(given, h)), **walk.constants, num_warps=1,
            )  # fmt: skip
    return dh


def first_parameter(h: Tensor, x: Tensor, bins: int) -> Tensor:
    """A view of h, shaped like x; the others of an element follow in steps of h's channels."""
    return h.unflatten(1, (x.shape[1], 3 * bins - 1))[:, :, 0]


ops = CouplingOps(
    "spline_coupling",
    "int bins, float bound, float min_width, float min_height, float min_slope",
    couple,
    couple_bwd,
)
