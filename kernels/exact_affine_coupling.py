"""Exact affine coupling, in one pass each way, with the log_det and the overflow flag.

What is called gets x and gives y, whether it runs forward or inverse; the state is written over.
Every gradient is a function of x, the forward direction's input. The gradient kernel gets it from
what came out, and with it the state; where x was kept, it does the same without.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.grid import SCALING_LIMIT
from revlib.kernels.affine import log_scale
from revlib.kernels.affine_coupling import raw_and_shift
from revlib.kernels.exact_scaling import (
    EXACT,
    divisor,
    flag,
    ratio,
    scale_is_inside,
    transform,
    walkable_state,
)
from revlib.kernels.walk import (
    Walk,
    accumulator,
    new_like,
    offsets,
    ordered_sum,
    store_sum,
    tile,
    triton_dtype,
    walkable,
)

# A thread of a larger tile has more 64-bit integers than registers.
TILE_SIZE = 512


@triton.jit
def exact_affine_coupling_kernel(
    x_ptr, raw_ptr, shift_ptr, state_ptr, y_ptr, sums_ptr, overflow_ptr,
    n_samples, n_elements, n_cols, n_tiles, x_strides, h_strides, state_strides, y_strides,
    INVERSE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr, FLOAT: tl.constexpr,
    STEPS: tl.constexpr, LIMIT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, column = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    state_offsets = offsets(sample, element, n_cols, state_strides, FLAT)
    y_offsets = offsets(sample, element, n_cols, y_strides, FLAT)

    x = tl.load(x_ptr + x_offsets, mask=mask, other=0)
    raw = tl.load(raw_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
    shift = tl.load(shift_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
    state = tl.load(state_ptr + state_offsets, mask=mask, other=0)

    log_s, _ = log_scale(raw, SCALE, CLAMP)
    s = divisor(log_s)
    log_ratio = tl.log(ratio(s))
    log_det = log_ratio if INVERSE else -log_ratio
    # Before the divisions, which NVIDIA's compiler makes calls: across them it took a stack.
    store_sum(sums_ptr, log_det, sample, column, mask, n_samples, n_tiles)
    inside = scale_is_inside(log_s) & (tl.abs(raw) < float("inf"))
    flag(overflow_ptr, mask & ~inside, SAMPLES, ELEMENTS)
    y, state, inside = transform(x, s, shift, state, INVERSE, STEPS, LIMIT)

    tl.store(y_ptr + y_offsets, y, mask=mask)
    tl.store(state_ptr + state_offsets, state, mask=mask)
    flag(overflow_ptr, mask & ~inside, SAMPLES, ELEMENTS)


@triton.jit
def exact_affine_coupling_bwd_kernel(
    given_ptr, raw_ptr, shift_ptr, state_ptr, dy_ptr, dlog_det_ptr,
    rebuilt_ptr, dx_ptr, draw_ptr, dshift_ptr,
    n_samples, n_elements, n_cols, n_tiles, dlog_det_stride,
    given_strides, h_strides, state_strides, dy_strides, rebuilt_strides, dx_strides, dh_strides,
    INVERSE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr, FLOAT: tl.constexpr,
    STEPS: tl.constexpr, LIMIT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, _ = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    given_offsets = offsets(sample, element, n_cols, given_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    dy_offsets = offsets(sample, element, n_cols, dy_strides, FLAT)
    dx_offsets = offsets(sample, element, n_cols, dx_strides, FLAT)
    dh_offsets = offsets(sample, element, n_cols, dh_strides, FLAT)

    given = tl.load(given_ptr + given_offsets, mask=mask, other=0)
    raw = tl.load(raw_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
    dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0).to(FLOAT)
    dlog_det = tl.load(
        dlog_det_ptr + sample * dlog_det_stride, mask=sample < n_samples, other=0
    ).to(FLOAT)

    log_s, slope = log_scale(raw, SCALE, CLAMP)
    s = divisor(log_s)
    x = given
    if state_ptr is not None:
        state_offsets = offsets(sample, element, n_cols, state_strides, FLAT)
        rebuilt_offsets = offsets(sample, element, n_cols, rebuilt_strides, FLAT)
        shift = tl.load(shift_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
        state = tl.load(state_ptr + state_offsets, mask=mask, other=0)
        rebuilt, state, _ = transform(given, s, shift, state, not INVERSE, STEPS, LIMIT)
        tl.store(rebuilt_ptr + rebuilt_offsets, rebuilt, mask=mask)
        tl.store(state_ptr + state_offsets, state, mask=mask)
        if not INVERSE:
            x = rebuilt

    x = x.to(FLOAT)
    if INVERSE:
        dx = dy * ratio(s)
        dlog_s = -(dy * x) - dlog_det
        dshift = -dx
    else:
        a = 1 / ratio(s)
        dx = dy * a
        dlog_s = dy * (x * a) + dlog_det
        dshift = dy

    tl.store(dx_ptr + dx_offsets, dx, mask=mask)
    tl.store(draw_ptr + dh_offsets, dlog_s * slope, mask=mask)
    tl.store(dshift_ptr + dh_offsets, dshift, mask=mask)


def couple(
    x: Tensor,
    h: Tensor,
    state: Tensor,
    inverse: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the log_det and the overflow flag, and writes the state."""
    raw, shift = raw_and_shift(h, interleaved)
    y, overflow = new_like(x), x.new_zeros((), dtype=torch.bool)
    walk = Walk(x, raw, state, y, tile_size=TILE_SIZE)
    sums = walk.new_sums(x, accumulator(x, h))
    if walk.n_programs:
        with torch.cuda.device_of(x):
            exact_affine_coupling_kernel[(walk.n_programs,)](
                x, raw, shift, state, y, sums, overflow, *walk.sizes, *walk.strides,
                INVERSE=inverse, SCALE=scale, CLAMP=clamp, FLOAT=triton_dtype(sums.dtype),
                STEPS=2.0**bits, LIMIT=SCALING_LIMIT[x.dtype], **walk.constants | EXACT,
            )  # fmt: skip
    return y, ordered_sum(sums), overflow


def couple_bwd(
    given: Tensor,
    h: Tensor,
    state: Tensor | None,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
    bits: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Returns what is rebuilt and the gradients of what went in and of h, and writes the state.

    Given is what came out, or x where state is None: then nothing is rebuilt.
    """
    raw, shift = raw_and_shift(h, interleaved)
    dh = new_like(h)
    draw, dshift = raw_and_shift(dh, interleaved)
    dx = new_like(given)
    rebuilt = None if state is None else new_like(given)
    if state is None:
        shift = None  # no gradient depends on it
    # What is not there needs no place, but strides.
    like_state, like_rebuilt = (given, given) if state is None else (state, rebuilt)
    walk = Walk(given, raw, like_state, dy, like_rebuilt, dx, draw, tile_size=TILE_SIZE)
    if walk.n_programs:
        with torch.cuda.device_of(given):
            exact_affine_coupling_bwd_kernel[(walk.n_programs,)](
                given, raw, shift, state, dy, dlog_det, rebuilt, dx, draw, dshift,
                *walk.sizes, dlog_det.stride(0), *walk.strides,
                INVERSE=inverse, SCALE=scale, CLAMP=clamp,
                FLOAT=triton_dtype(accumulator(given, h)),
                STEPS=2.0**bits, LIMIT=SCALING_LIMIT[given.dtype], **walk.constants | EXACT,
            )  # fmt: skip
    return rebuilt, dx, dh


@torch.library.custom_op("revlib::exact_affine_coupling", mutates_args=("state",))
def exact_affine_coupling(
    x: Tensor,
    h: Tensor,
    state: Tensor,
    inverse: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the log_det and the overflow flag, and writes the state."""
    x, h = walkable(x, h)
    with walkable_state(state) as u:
        return couple(x, h, u, inverse, scale, clamp, interleaved, bits)


@exact_affine_coupling.register_fake
def _(x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_det = x.new_empty(x.shape[0], dtype=accumulator(x, h))
    return new_like(x), log_det, x.new_empty((), dtype=torch.bool)


@torch.library.custom_op("revlib::exact_affine_coupling_bwd", mutates_args=("state",))
def exact_affine_coupling_bwd(
    y: Tensor,
    h: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rebuilt x and the gradients of x and h, and writes the state."""
    y, h, dy = walkable(y, h, dy)
    with walkable_state(state) as u:
        return couple_bwd(y, h, u, dy, dlog_det, inverse, scale, clamp, interleaved, bits)


@exact_affine_coupling_bwd.register_fake
def _(y: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(y), new_like(y), new_like(h)


@torch.library.custom_op("revlib::exact_affine_coupling_gradients", mutates_args=())
def exact_affine_coupling_gradients(
    x: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of what went in and of h, from x."""
    x, h, dy = walkable(x, h, dy)
    _, dx, dh = couple_bwd(x, h, None, dy, dlog_det, inverse, scale, clamp, interleaved, 0)
    return dx, dh


@exact_affine_coupling_gradients.register_fake
def _(x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return new_like(x), new_like(h)
