"""Exact ActNorm, in one pass each way, with the overflow flag.

S is PyTorch's, a value per channel, and with it the log_det. Backward rebuilds what went in and
the state, and sums over the batch and space what the gradients of the parameters are made of: the
gradient of what came out, and its product with x. Where x was kept, it does the same without.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib import reference
from revlib.grid import SCALING_LIMIT
from revlib.kernels.actnorm import ChannelWalk
from revlib.kernels.exact_scaling import EXACT, R, flag, ratio, transform, walkable_state
from revlib.kernels.walk import (
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
def exact_actnorm_kernel(
    x_ptr, s_ptr, bias_ptr, state_ptr, y_ptr, overflow_ptr,
    n_channels, n_places, n_space, n_tiles, bias_stride, x_strides, state_strides, y_strides,
    INVERSE: tl.constexpr, STEPS: tl.constexpr, LIMIT: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    channel, place, mask, _ = tile(n_channels, n_places, n_tiles, INDEX, CHANNELS, PLACES)
    x_offsets = offsets(channel, place, n_space, x_strides, FLAT)
    state_offsets = offsets(channel, place, n_space, state_strides, FLAT)
    y_offsets = offsets(channel, place, n_space, y_strides, FLAT)

    exists = channel < n_channels
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0)
    state = tl.load(state_ptr + state_offsets, mask=mask, other=0)
    s = tl.load(s_ptr + channel, mask=exists, other=1)
    bias = tl.load(bias_ptr + channel * bias_stride, mask=exists, other=0).to(FLOAT)

    y, state, inside = transform(x, s, bias, state, INVERSE, STEPS, LIMIT)

    tl.store(y_ptr + y_offsets, y, mask=mask)
    tl.store(state_ptr + state_offsets, state, mask=mask)
    flag(overflow_ptr, mask & ~inside, CHANNELS, PLACES)


@triton.jit
def exact_actnorm_bwd_kernel(
    given_ptr, s_ptr, bias_ptr, state_ptr, dy_ptr, rebuilt_ptr, dx_ptr, products_ptr, dy_sums_ptr,
    n_channels, n_places, n_space, n_tiles, bias_stride,
    given_strides, state_strides, dy_strides, rebuilt_strides, dx_strides,
    INVERSE: tl.constexpr, STEPS: tl.constexpr, LIMIT: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    channel, place, mask, column = tile(n_channels, n_places, n_tiles, INDEX, CHANNELS, PLACES)
    given_offsets = offsets(channel, place, n_space, given_strides, FLAT)
    dy_offsets = offsets(channel, place, n_space, dy_strides, FLAT)
    dx_offsets = offsets(channel, place, n_space, dx_strides, FLAT)

    exists = channel < n_channels
    given = tl.load(given_ptr + given_offsets, mask=mask, other=0)
    dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0).to(FLOAT)
    s = tl.load(s_ptr + channel, mask=exists, other=1)

    x = given
    if state_ptr is not None:
        state_offsets = offsets(channel, place, n_space, state_strides, FLAT)
        rebuilt_offsets = offsets(channel, place, n_space, rebuilt_strides, FLAT)
        bias = tl.load(bias_ptr + channel * bias_stride, mask=exists, other=0).to(FLOAT)
        state = tl.load(state_ptr + state_offsets, mask=mask, other=0)
        rebuilt, state, _ = transform(given, s, bias, state, not INVERSE, STEPS, LIMIT)
        tl.store(rebuilt_ptr + rebuilt_offsets, rebuilt, mask=mask)
        tl.store(state_ptr + state_offsets, state, mask=mask)
        if not INVERSE:
            x = rebuilt

    dx = dy * ratio(s) if INVERSE else dy * (1 / ratio(s))

    tl.store(dx_ptr + dx_offsets, dx, mask=mask)
    store_sum(products_ptr, dy * x.to(FLOAT), channel, column, mask, n_channels, n_tiles)
    store_sum(dy_sums_ptr, dy, channel, column, mask, n_channels, n_tiles)


def normalize(
    x: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, inverse: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the log_det and the overflow flag, and writes the state."""
    dtype = accumulator(x, log_scale, bias)
    s = reference.divisor(log_scale.to(dtype))
    y, overflow = new_like(x), ~reference.scales_fit(log_scale)
    walk = ChannelWalk(x, state, y, tile_size=TILE_SIZE)
    if walk.n_programs:
        with torch.cuda.device_of(x):
            exact_actnorm_kernel[(walk.n_programs,)](
                x, s, bias, state, y, overflow,
                *walk.sizes, bias.stride(0), *walk.strides,
                INVERSE=inverse, STEPS=2.0**bits, LIMIT=SCALING_LIMIT[x.dtype],
                FLOAT=triton_dtype(dtype), **walk.constants | EXACT,
            )  # fmt: skip
    _, _, n_space, _ = walk.sizes
    log_det = n_space * (s / R.value).log().sum()
    return y, (log_det if inverse else -log_det).repeat(x.shape[0]), overflow


def normalize_bwd(
    given: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    state: Tensor | None,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    bits: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Returns what is rebuilt and the gradients of what went in, log_scale and bias.

    Given is what came out, or x where state is None: then nothing is rebuilt. Writes the state.
    """
    dtype = accumulator(given, log_scale, bias)
    s = reference.divisor(log_scale.to(dtype))
    dx = new_like(given)
    rebuilt = None if state is None else new_like(given)
    # What is not there needs no place, but strides.
    like_state, like_rebuilt = (given, given) if state is None else (state, rebuilt)
    walk = ChannelWalk(given, like_state, dy, like_rebuilt, dx, tile_size=TILE_SIZE)
    product_sums, dy_sums = walk.new_sums(given, dtype), walk.new_sums(given, dtype)
    if walk.n_programs:
        with torch.cuda.device_of(given):
            exact_actnorm_bwd_kernel[(walk.n_programs,)](
                given, s, bias, state, dy, rebuilt, dx, product_sums, dy_sums,
                *walk.sizes, bias.stride(0), *walk.strides,
                INVERSE=inverse, STEPS=2.0**bits, LIMIT=SCALING_LIMIT[given.dtype],
                FLOAT=triton_dtype(dtype), **walk.constants | EXACT,
            )  # fmt: skip
    products, dbias = ordered_sum(product_sums), ordered_sum(dy_sums)
    _, _, n_space, _ = walk.sizes
    from_log_det = n_space * dlog_det.sum(dtype=dtype)
    if inverse:
        dlog_scale, dbias = -products - from_log_det, dbias * (s / -R.value)
    else:
        dlog_scale = products / (s / R.value) + from_log_det
    return rebuilt, dx, dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


@torch.library.custom_op("revlib::exact_actnorm", mutates_args=("state",))
def exact_actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, inverse: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the log_det and the overflow flag, and writes the state."""
    (x,) = walkable(x)
    with walkable_state(state) as u:
        return normalize(x, log_scale, bias, u, inverse, bits)


@exact_actnorm.register_fake
def _(x: Tensor, log_scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_det = x.new_empty(x.shape[0], dtype=accumulator(x, log_scale, bias))
    return new_like(x), log_det, x.new_empty((), dtype=torch.bool)


@torch.library.custom_op("revlib::exact_actnorm_bwd", mutates_args=("state",))
def exact_actnorm_bwd(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the rebuilt x and the gradients of x, log_scale and bias, and writes the state."""
    y, dy = walkable(y, dy)
    with walkable_state(state) as u:
        return normalize_bwd(y, log_scale, bias, u, dy, dlog_det, inverse, bits)


@exact_actnorm_bwd.register_fake
def _(
    y: Tensor, log_scale: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_like(y), new_like(y), *fake_parameter_gradients(log_scale, bias)


@torch.library.custom_op("revlib::exact_actnorm_gradients", mutates_args=())
def exact_actnorm_gradients(
    x: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of what went in, log_scale and bias, from x."""
    x, dy = walkable(x, dy)
    _, *gradients = normalize_bwd(x, log_scale, bias, None, dy, dlog_det, inverse, 0)
    return tuple(gradients)


@exact_actnorm_gradients.register_fake
def _(x: Tensor, log_scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(x), *fake_parameter_gradients(log_scale, bias)


def fake_parameter_gradients(log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)
