"""The exact channel map: a program holds all channels of some pixels, and walks the matrix.

`revlib.reference` defines it, in the same letters, and gives the factors. Sums are exact, so that
the order in which they are added says nothing, and neither does fusing.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.grid import SCALING_LIMIT
from revlib.kernels.actnorm import channel_batch_and_place_strides
from revlib.kernels.arithmetic import floor_divide
from revlib.kernels.exact_scaling import R_BITS, STATE_LIMIT, R, flag, walkable_state
from revlib.kernels.walk import new_like, offsets, tile, walkable

DIGIT_BITS = tl.constexpr(23)
# Of a float64 stream times R.
LARGEST_PRODUCT = tl.constexpr(2**62)
# Elements of a tile.
TILE_SIZE = 512


@triton.jit
def exact_channel_map_kernel(
    x_ptr, product_ptr, upper_ptr, s_ptr, shift_ptr, state_ptr, y_ptr, overflow_ptr,
    n_channels, n_places, n_space, n_tiles, x_strides, state_strides, y_strides,
    STEPS: tl.constexpr, LIMIT: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    channel, place, mask, _ = tile(n_channels, n_places, n_tiles, INDEX, CHANNELS, PLACES)
    exists = channel < n_channels
    state_offsets = offsets(channel, place, n_space, state_strides, FLAT)
    x = tl.load(x_ptr + offsets(channel, place, n_space, x_strides, FLAT), mask=mask, other=0)
    u = tl.load(state_ptr + state_offsets, mask=mask, other=0)
    s = tl.load(s_ptr + channel, mask=exists, other=1)
    shift = tl.load(shift_ptr + channel, mask=exists, other=0)

    rows, inside = whole(x, STEPS, LIMIT, WIDE)
    v = rows * R + (u & (R - 1)).to(rows.dtype) + centre(s).to(rows.dtype)
    scaled, rest = divided(v, s.to(rows.dtype), WIDE)
    u = u >> R_BITS
    inside = inside & (u.to(tl.float64) * s < STATE_LIMIT)
    u = u * s.to(tl.int64) + rest.to(tl.int64)

    z = scaled + rounded_product(upper_ptr, rows, channel, n_channels, WIDE)
    inside = inside & is_inside(z, LIMIT)
    y = rounded_product(product_ptr, z, channel, n_channels, WIDE) + shift.to(rows.dtype)
    inside = inside & is_inside(y, LIMIT)

    # Whoever writes a state may overwrite what another has yet to read.
    tl.debug_barrier()
    turned = offsets(n_channels - 1 - channel, place, n_space, state_strides, FLAT)
    tl.store(state_ptr + turned, u, mask=mask)
    y = (y.to(tl.float64) * (1 / STEPS)).to(x.dtype)
    tl.store(y_ptr + offsets(channel, place, n_space, y_strides, FLAT), y, mask=mask)
    flag(overflow_ptr, mask & ~inside, CHANNELS, PLACES)


@triton.jit
def exact_channel_map_inverse_kernel(
    y_ptr, lower_ptr, upper_ptr, s_ptr, sign_ptr, shift_ptr, order_ptr, state_ptr, x_ptr,
    overflow_ptr,
    n_channels, n_places, n_space, n_tiles, y_strides, state_strides, x_strides,
    STEPS: tl.constexpr, LIMIT: tl.constexpr, WIDE: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    channel, place, mask, _ = tile(n_channels, n_places, n_tiles, INDEX, CHANNELS, PLACES)
    exists = channel < n_channels
    row = tl.load(order_ptr + channel, mask=exists, other=0)
    y = tl.load(y_ptr + offsets(row, place, n_space, y_strides, FLAT), mask=mask, other=0)
    shift = tl.load(shift_ptr + row, mask=exists, other=0)

    rows, inside = whole(y, STEPS, LIMIT, WIDE)
    rows -= shift.to(rows.dtype)
    high_sums, low_sums = no_sums(rows)
    for i in range(n_channels):
        left = rows - rounded(high_sums, low_sums, WIDE)
        rows = tl.where(channel == i, left, rows)
        column = tl.load(lower_ptr + i * n_channels + channel, mask=exists, other=0)
        high_sums, low_sums = add(high_sums, low_sums, column, row_of(left, channel, i), WIDE)
    inside = inside & is_inside(rows, LIMIT)

    turned = offsets(n_channels - 1 - channel, place, n_space, state_strides, FLAT)
    u = tl.load(state_ptr + turned, mask=mask, other=0)
    s = tl.load(s_ptr + channel, mask=exists, other=1)
    # Unsigned, for want of registers: it takes fewer.
    popped = (u.to(tl.uint64) // s.to(tl.uint64)).to(tl.int64)
    inside = inside & (popped.to(tl.float64) * R < STATE_LIMIT)
    low = (u - popped * s.to(tl.int64)).to(rows.dtype) - centre(s).to(rows.dtype)

    rows *= tl.load(sign_ptr + channel, mask=exists, other=1).to(rows.dtype)
    high_sums, low_sums = no_sums(rows)
    for step in range(n_channels):
        i = n_channels - 1 - step
        v = low + clamped(rows - rounded(high_sums, low_sums, WIDE), s, WIDE) * s.to(rows.dtype)
        quotient = divided_by_r(v, WIDE)
        low = tl.where(channel == i, v - quotient * R, low)
        rows = tl.where(channel == i, quotient, rows)
        column = tl.load(upper_ptr + i * n_channels + channel, mask=exists, other=0)
        high_sums, low_sums = add(high_sums, low_sums, column, row_of(quotient, channel, i), WIDE)
    inside = inside & is_inside(rows, LIMIT)

    # Whoever writes a state may overwrite what another has yet to read.
    tl.debug_barrier()
    state_offsets = offsets(channel, place, n_space, state_strides, FLAT)
    tl.store(state_ptr + state_offsets, popped * R + low.to(tl.int64), mask=mask)
    x = (rows.to(tl.float64) * (1 / STEPS)).to(y.dtype)
    tl.store(x_ptr + offsets(channel, place, n_space, x_strides, FLAT), x, mask=mask)
    flag(overflow_ptr, mask & ~inside, CHANNELS, PLACES)


@triton.jit
def whole(x, STEPS: tl.constexpr, LIMIT: tl.constexpr, WIDE: tl.constexpr):
    """The stream in whole steps, and whether it is in range."""
    steps = x.to(tl.float64) * STEPS
    # Asked this way round, so that NaN is outside.
    inside = tl.abs(steps) < LIMIT
    return tl.where(inside, steps, 0).to(tl.int64) if WIDE else steps, inside


@triton.jit
def is_inside(rows, LIMIT: tl.constexpr):
    return tl.abs(rows.to(tl.float64)) < LIMIT


@triton.jit
def centre(s):
    return (s.to(tl.int64) >> 1) - R // 2


@triton.jit
def divided(v, s, WIDE: tl.constexpr):
    """The floored quotient, and the remainder."""
    if WIDE:
        quotient, rest = floor_divide(v, s)
    else:
        quotient = tl.floor(v / s)
        rest = v - quotient * s
    return quotient, rest


@triton.jit
def divided_by_r(v, WIDE: tl.constexpr):
    return v >> R_BITS if WIDE else tl.floor(v * (1 / R))


@triton.jit
def clamped(rows, s, WIDE: tl.constexpr):
    """Below what the quotient is in range: a larger product could wrap around."""
    if WIDE:
        limit = LARGEST_PRODUCT // s.to(tl.int64) + 2
        rows = tl.minimum(tl.maximum(rows, -limit), limit)
    return rows


@triton.jit
def row_of(rows, channel, i):
    return tl.sum(tl.where(channel == i, rows, 0), axis=0)[None, :]


@triton.jit
def rounded_product(matrix_ptr, rows, channel, n_channels, WIDE: tl.constexpr):
    """The matrix lies in memory column by column."""
    high_sums, low_sums = no_sums(rows)
    for j in range(n_channels):
        column = tl.load(matrix_ptr + j * n_channels + channel, mask=channel < n_channels, other=0)
        high_sums, low_sums = add(high_sums, low_sums, column, row_of(rows, channel, j), WIDE)
    return rounded(high_sums, low_sums, WIDE)


@triton.jit
def no_sums(rows):
    """What sums of high digits and of low ones start as: with the half that rounds."""
    return tl.zeros(rows.shape, tl.float64), tl.full(rows.shape, 0.5, tl.float64)


@triton.jit
def add(high_sums, low_sums, column, row, WIDE: tl.constexpr):
    if WIDE:
        high_sums += column * (row >> DIGIT_BITS).to(tl.float64)
        row = (row & (2**DIGIT_BITS - 1)).to(tl.float64)
    return high_sums, low_sums + column * row


@triton.jit
def rounded(high_sums, low_sums, WIDE: tl.constexpr):
    result = tl.floor(low_sums)
    if WIDE:
        # High sums are multiples of 1 / R, and need not be whole.
        result = result.to(tl.int64) + ((high_sums * R).to(tl.int64) << (DIGIT_BITS - R_BITS))
    return result


class PixelWalk:
    """How a kernel walks tensors: a tile has all channels of some *places* in batch and space."""

    def __init__(self, *tensors: Tensor, bits: int) -> None:
        n_batch, n_channels, *space = tensors[0].shape
        n_space = math.prod(space)
        n_places = n_batch * n_space
        channels = triton.next_power_of_2(n_channels)
        places = min(TILE_SIZE // channels, triton.next_power_of_2(max(n_places, 1)))
        self.strides = tuple(map(channel_batch_and_place_strides, tensors))
        self.n_programs = triton.cdiv(n_places, places)
        self.sizes = (n_channels, n_places, n_space, max(self.n_programs, 1))
        dtype = tensors[0].dtype
        self.constants: dict[str, Any] = {
            "STEPS": 2.0**bits,
            "LIMIT": SCALING_LIMIT[dtype],
            "WIDE": dtype == torch.float64,
            "FLAT": n_batch == 1 or all(b == n_space * place for _, b, place in self.strides),
            # A tile may end past the last place, and must not wrap around there.
            "INDEX": tl.int32 if n_places <= 2**31 - TILE_SIZE else tl.int64,
            "CHANNELS": channels,
            "PLACES": places,
            # Triton warns where its default is taken.
            "enable_fp_fusion": True,
        }


@torch.library.custom_op("revlib::exact_channel_map", mutates_args=("state",))
def exact_channel_map(
    x: Tensor, product: Tensor, upper: Tensor, s: Tensor, shift: Tensor, state: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Returns y and the overflow flag, and writes the state."""
    (x,) = walkable(x)
    y, overflow = new_like(x), x.new_zeros((), dtype=torch.bool)
    with walkable_state(state) as u:
        walk = PixelWalk(x, u, y, bits=bits)
        if walk.n_programs:
            with torch.cuda.device_of(x):
                exact_channel_map_kernel[(walk.n_programs,)](
                    x, by_column(product), by_column(upper), s, shift, u, y, overflow,
                    *walk.sizes, *walk.strides, **walk.constants,
                )  # fmt: skip
    return y, overflow


@torch.library.custom_op("revlib::exact_channel_map_inverse", mutates_args=("state",))
def exact_channel_map_inverse(
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    s: Tensor,
    sign: Tensor,
    shift: Tensor,
    order: Tensor,
    state: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Returns x and the overflow flag, and writes the state.

    The order says which row of the output holds each row that is undone.
    """
    (y,) = walkable(y)
    x, overflow = new_like(y), y.new_zeros((), dtype=torch.bool)
    with walkable_state(state) as u:
        walk = PixelWalk(y, u, x, bits=bits)
        if walk.n_programs:
            with torch.cuda.device_of(y):
                exact_channel_map_inverse_kernel[(walk.n_programs,)](
                    y, by_column(lower), by_column(upper), s, sign.contiguous(), shift, order, u,
                    x, overflow, *walk.sizes, *walk.strides, **walk.constants,
                )  # fmt: skip
    return x, overflow


@exact_channel_map.register_fake
@exact_channel_map_inverse.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (x,) = walkable(x)
    return new_like(x), x.new_empty((), dtype=torch.bool)


def by_column(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()
