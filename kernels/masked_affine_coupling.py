"""Masked affine coupling: the affine coupling, but only where the mask says, in one pass.

What the mask keeps is told from an element's place in its sample, so no mask is loaded. The
channel mask keeps whole runs of elements, whose part of h is not loaded either. The checkerboard
keeps every other one, and leaving those out would save no bytes; its kernel is compiled for each
width of space, since a division by a number told later takes fifteen instructions an element.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.kernels.affine import transform, transform_bwd
from revlib.kernels.affine_coupling import raw_and_shift
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


@triton.jit
def masked_affine_coupling_kernel(
    x_ptr, raw_ptr, shift_ptr, y_ptr, sums_ptr,
    n_samples, n_elements, n_cols, n_tiles, n_kept, x_strides, h_strides, y_strides,
    INVERSE: tl.constexpr, INPLACE: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr,
    DIVISORS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, column = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    moved = moves(element, n_cols, n_kept, MASK, FLIP, DIVISORS, CHANNELS_LAST)
    h_mask = mask & moved if MASK == "channel" else mask
    stream_mask = h_mask if INPLACE else mask
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    y_offsets = offsets(sample, element, n_cols, y_strides, FLAT)

    x = tl.load(x_ptr + x_offsets, mask=stream_mask, other=0).to(FLOAT)
    raw = tl.load(raw_ptr + h_offsets, mask=h_mask, other=0).to(FLOAT)
    shift = tl.load(shift_ptr + h_offsets, mask=h_mask, other=0).to(FLOAT)

    y, log_s = transform(x, raw, shift, INVERSE, SCALE, CLAMP)

    tl.store(y_ptr + y_offsets, tl.where(moved, y, x), mask=stream_mask)
    store_sum(sums_ptr, log_s, sample, column, mask & moved, n_samples, n_tiles)


@triton.jit
def masked_affine_coupling_bwd_kernel(
    given_ptr, raw_ptr, shift_ptr, dy_ptr, dlog_det_ptr, x_ptr, dx_ptr, draw_ptr, dshift_ptr,
    n_samples, n_elements, n_cols, n_tiles, n_kept, dlog_det_stride,
    given_strides, h_strides, dy_strides, x_strides, dx_strides, dh_strides,
    INVERSE: tl.constexpr, INPLACE: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr,
    DIVISORS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, CLAMP: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, _ = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    moved = moves(element, n_cols, n_kept, MASK, FLIP, DIVISORS, CHANNELS_LAST)
    h_mask = mask & moved if MASK == "channel" else mask
    stream_mask = h_mask if INPLACE else mask
    given_offsets = offsets(sample, element, n_cols, given_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    dy_offsets = offsets(sample, element, n_cols, dy_strides, FLAT)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    dx_offsets = offsets(sample, element, n_cols, dx_strides, FLAT)
    dh_offsets = offsets(sample, element, n_cols, dh_strides, FLAT)

    given = tl.load(given_ptr + given_offsets, mask=stream_mask, other=0).to(FLOAT)
    raw = tl.load(raw_ptr + h_offsets, mask=h_mask, other=0).to(FLOAT)
    shift = (
        0.0
        if shift_ptr is None
        else tl.load(shift_ptr + h_offsets, mask=h_mask, other=0).to(FLOAT)
    )
    dy = tl.load(dy_ptr + dy_offsets, mask=stream_mask, other=0).to(FLOAT)
    dlog_det = tl.load(
        dlog_det_ptr + sample * dlog_det_stride, mask=sample < n_samples, other=0
    ).to(FLOAT)

    x, dx, draw, dshift = transform_bwd(
        given, raw, shift, dy, dlog_det, x_ptr is not None, INVERSE, SCALE, CLAMP
    )

    if x_ptr is not None:
        tl.store(x_ptr + x_offsets, tl.where(moved, x, given), mask=stream_mask)
    tl.store(dx_ptr + dx_offsets, tl.where(moved, dx, dy), mask=stream_mask)
    tl.store(draw_ptr + dh_offsets, tl.where(moved, draw, 0), mask=mask)
    tl.store(dshift_ptr + dh_offsets, tl.where(moved, dshift, 0), mask=mask)


@triton.jit
def moves(
    element, n_cols, n_kept,
    MASK: tl.constexpr, FLIP: tl.constexpr, DIVISORS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Whether the mask lets an element be transformed; told by what `pattern` gives."""
    if MASK == "channel":
        place = element % n_cols if CHANNELS_LAST else element
        moved = place >= n_kept
    else:
        tl.static_assert(MASK == "checkerboard")
        place = element // n_cols if CHANNELS_LAST else element
        parity = tl.zeros_like(place)
        for i in tl.static_range(len(DIVISORS)):
            parity ^= place // DIVISORS[i]
        moved = (parity & 1) == 1
    return ~moved if FLIP else moved


def pattern(x: Tensor, mask: str, channels_last: bool) -> tuple[int, tuple[int, ...]]:
    """The arguments n_kept and DIVISORS, by which `moves` tells the mask from an element's place.

    A channel mask keeps the first n_kept places. A checkerboard divides the place by constants:
    the quotients have a sum as odd as that of the indices in space. For index i is
    ``quotient[i] - size[i] * quotient[i - 1]``, so a quotient counts once, and once more, which
    is as good as not at all, if the next size is odd.
    """
    _, channels, *space = x.shape
    if mask == "channel":
        n_kept = channels - channels // 2
        return n_kept if channels_last else n_kept * math.prod(space), ()
    within = [math.prod(space[i:]) for i in range(1, len(space)) if space[i] % 2 == 0]
    # The quotient by all of space is the channel, which is no index in space.
    across = [math.prod(space)] if space and space[0] % 2 and not channels_last else []
    return 0, (1, *within, *across)


def couple(
    x: Tensor,
    h: Tensor,
    y: Tensor,
    inverse: bool,
    mask: str,
    flip: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> Tensor:
    """Writes y, which may be x itself, and returns the log_det."""
    raw, shift = raw_and_shift(h, interleaved)
    walk = Walk(x, raw, y)
    n_kept, divisors = pattern(x, mask, walk.channels_last)
    sums = walk.new_sums(x, accumulator(x, h))
    if walk.n_programs:
        with torch.cuda.device_of(x):
            masked_affine_coupling_kernel[(walk.n_programs,)](
                x, raw, shift, y, sums, *walk.sizes, n_kept, *walk.strides,
                INVERSE=inverse, INPLACE=y is x, MASK=mask, FLIP=flip, DIVISORS=divisors,
                CHANNELS_LAST=walk.channels_last, SCALE=scale, CLAMP=clamp,
                FLOAT=triton_dtype(sums.dtype), **walk.constants,
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
    mask: str,
    flip: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
) -> Tensor:
    """Writes x, which may be given itself, and dx, which may be dy, and returns dh.

    Given is what came out, or what went in where x is None.
    """
    raw, shift = raw_and_shift(h, interleaved)
    if x is None and not inverse:
        shift = None  # nothing depends on it
    dh = new_like(h)
    draw, dshift = raw_and_shift(dh, interleaved)
    walk = Walk(given, raw, dy, dx if x is None else x, dx, draw)
    n_kept, divisors = pattern(given, mask, walk.channels_last)
    if walk.n_programs:
        with torch.cuda.device_of(given):
            masked_affine_coupling_bwd_kernel[(walk.n_programs,)](
                given, raw, shift, dy, dlog_det, x, dx, draw, dshift,
                *walk.sizes, n_kept, dlog_det.stride(0), *walk.strides,
                INVERSE=inverse, INPLACE=x is given and dx is dy, MASK=mask, FLIP=flip,
                DIVISORS=divisors, CHANNELS_LAST=walk.channels_last, SCALE=scale, CLAMP=clamp,
                FLOAT=triton_dtype(accumulator(given, h)), **walk.constants,
            )  # fmt: skip
    return dh


ops = CouplingOps(
    "masked_affine_coupling",
    "str mask, bool flip, str scale, float clamp, bool interleaved",
    couple,
    couple_bwd,
)
