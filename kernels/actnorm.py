"""Backward of ActNorm, ``y = x * exp(log_scale) + bias`` per channel, in one pass from its output.

The pass rebuilds x, gives its gradient, and sums the gradients of log_scale and bias over the
batch and space: ``x * exp(log_scale) == y - bias``, so that all of them are functions of y. The
scale itself is PyTorch's, as it was in the pass that gave y. Forward and inverse are one pass in
PyTorch already, and have no kernel.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.kernels.walk import (
    accumulator,
    channel_and_space_strides,
    new_like,
    offsets,
    ordered_sum,
    store_sum,
    tile,
    triton_dtype,
    walkable,
)

TILE_SIZE = 2048
# 128 bytes in a row, in float32, where channels are innermost.
INNERMOST_CHANNELS = 32


@triton.jit
def actnorm_bwd_kernel(
    given_ptr, scale_ptr, bias_ptr, dy_ptr, x_ptr, dx_ptr, dlog_scale_ptr, dy_sums_ptr,
    n_channels, n_places, n_space, n_tiles, bias_stride,
    given_strides, dy_strides, x_strides, dx_strides,
    INVERSE: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    channel, place, mask, column = tile(n_channels, n_places, n_tiles, INDEX, CHANNELS, PLACES)
    given_offsets = offsets(channel, place, n_space, given_strides, FLAT)
    dy_offsets = offsets(channel, place, n_space, dy_strides, FLAT)
    x_offsets = offsets(channel, place, n_space, x_strides, FLAT)
    dx_offsets = offsets(channel, place, n_space, dx_strides, FLAT)

    exists = channel < n_channels
    given = tl.load(given_ptr + given_offsets, mask=mask, other=0).to(FLOAT)
    dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0).to(FLOAT)
    scale = tl.load(scale_ptr + channel, mask=exists, other=1)
    bias = tl.load(bias_ptr + channel * bias_stride, mask=exists, other=0).to(FLOAT)

    FROM_OUTPUT: tl.constexpr = x_ptr is not None
    if INVERSE:
        y = given if FROM_OUTPUT else (given - bias) * (1 / scale)
        x = given * scale + bias
        dx = dy * (1 / scale)
        dlog_s = -dy * y
    else:
        scaled = given - bias if FROM_OUTPUT else given * scale
        x = scaled * (1 / scale)
        dx = dy * scale
        dlog_s = dy * scaled

    if x_ptr is not None:
        tl.store(x_ptr + x_offsets, x, mask=mask)
    tl.store(dx_ptr + dx_offsets, dx, mask=mask)
    store_sum(dlog_scale_ptr, dlog_s, channel, column, mask, n_channels, n_tiles)
    store_sum(dy_sums_ptr, dy, channel, column, mask, n_channels, n_tiles)


class ChannelWalk:
    """How the kernel walks tensors: as `walk.Walk` does, with channels in the place of samples.

    The elements of a channel are its *places*, in the batch and in space. A tile is [CHANNELS,
    PLACES]: a piece of one channel, or of as many as lie side by side in channels_last.
    """

    def __init__(self, *tensors: Tensor, tile_size: int = TILE_SIZE) -> None:
        n_batch, n_channels, *space = tensors[0].shape
        n_space = math.prod(space)
        n_places = n_batch * n_space
        strides = [channel_batch_and_place_strides(tensor) for tensor in tensors]
        channel_stride, _, place_stride = strides[0]
        channels = INNERMOST_CHANNELS if channel_stride < place_stride else 1
        channels = min(channels, triton.next_power_of_2(max(n_channels, 1)))
        places = min(tile_size // channels, triton.next_power_of_2(max(n_places, 1)))
        n_tiles = triton.cdiv(n_places, places)

        self.sizes = (n_channels, n_places, n_space, n_tiles)
        self.strides = tuple(strides)
        self.constants: dict[str, Any] = {
            "FLAT": n_batch == 1 or all(batch == n_space * place for _, batch, place in strides),
            # A tile may end past the last place, and must not wrap around there.
            "INDEX": tl.int32 if n_places <= 2**31 - tile_size else tl.int64,
            "CHANNELS": channels,
            "PLACES": places,
            # Triton warns where its default is taken.
            "enable_fp_fusion": True,
        }
        self.n_programs = triton.cdiv(n_channels, channels) * n_tiles

    def new_sums(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """One column per tile, for `store_sum` and `ordered_sum`."""
        n_channels, _, _, n_tiles = self.sizes
        return like.new_empty((n_channels, n_tiles), dtype=dtype)


def channel_batch_and_place_strides(tensor: Tensor) -> tuple[int, int, int]:
    """The last is that of space, or of the batch where space has one element."""
    stride = channel_and_space_strides(tensor)
    has_space = math.prod(tensor.shape[2:]) > 1
    place = stride["space"] if has_space else tensor.stride(0)
    return stride["channel"], tensor.stride(0), place


def normalize_bwd(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    x: Tensor | None,
    dx: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Writes x, which may be y itself, and dx, which may be dy.

    Where x is None, it is given what went in, in the place of y. Returns the gradients of
    log_scale and bias.
    """
    dtype = accumulator(y, log_scale, bias)
    scale = log_scale.to(dtype).exp()
    walk = ChannelWalk(y, dy, dx if x is None else x, dx)
    dlog_scale_sums, dy_sums = walk.new_sums(y, dtype), walk.new_sums(y, dtype)
    if walk.n_programs:
        with torch.cuda.device_of(y):
            actnorm_bwd_kernel[(walk.n_programs,)](
                y, scale, bias, dy, x, dx, dlog_scale_sums, dy_sums,
                *walk.sizes, bias.stride(0), *walk.strides,
                INVERSE=inverse, FLOAT=triton_dtype(dtype), **walk.constants,
            )  # fmt: skip
    dlog_scale, dbias = ordered_sum(dlog_scale_sums), ordered_sum(dy_sums)
    _, _, n_space, _ = walk.sizes
    from_log_det = n_space * dlog_det.sum(dtype=dtype)
    if inverse:
        dlog_scale, dbias = dlog_scale - from_log_det, dbias / -scale
    else:
        dlog_scale = dlog_scale + from_log_det
    return dlog_scale.to(log_scale.dtype), dbias.to(bias.dtype)


@torch.library.custom_op("revlib::actnorm_bwd", mutates_args=())
def actnorm_bwd(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the rebuilt x and the gradients of x, log_scale and bias."""
    y, dy = walkable(y, dy)
    x, dx = new_like(y), new_like(y)
    return x, dx, *normalize_bwd(y, log_scale, bias, dy, dlog_det, x, dx, inverse)


@actnorm_bwd.register_fake
def _(
    y: Tensor, log_scale: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        new_like(y),
        new_like(y),
        log_scale.new_empty(log_scale.shape),
        bias.new_empty(bias.shape),
    )


@torch.library.custom_op("revlib::actnorm_bwd_", mutates_args=("y", "dy"))
def actnorm_bwd_(
    y: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Writes the rebuilt x over y and its gradient over dy, and returns the other gradients."""
    x, dx = walkable(y, dy)
    gradients = normalize_bwd(x, log_scale, bias, dx, dlog_det, x, dx, inverse)
    if x is not y:
        y.copy_(x)
    if dx is not dy:
        dy.copy_(dx)
    return gradients


@actnorm_bwd_.register_fake
def _(y: Tensor, log_scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (
        log_scale.new_empty(log_scale.shape),
        bias.new_empty(bias.shape),
    )


@torch.library.custom_op("revlib::actnorm_gradients", mutates_args=())
def actnorm_gradients(
    x: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, log_scale and bias from x."""
    x, dy = walkable(x, dy)
    dx = new_like(x)
    return dx, *normalize_bwd(x, log_scale, bias, dy, dlog_det, None, dx, inverse)


@actnorm_gradients.register_fake
def _(x: Tensor, log_scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        new_like(x),
        log_scale.new_empty(log_scale.shape),
        bias.new_empty(bias.shape),
    )
