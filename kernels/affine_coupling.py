"""Affine coupling, ``y = x * exp(log_scale) + shift``, in one pass each way, log_det included.

What is called gets x and gives y, whether it runs forward or inverse. The gradient kernel needs
no x: ``x * exp(log_scale) == y - shift``, so every gradient is a function of y, and x itself falls
out of the same pass for the block below. Where x is at hand it is given instead, since in half
precision y has lost some of it.

The conditioner's output h holds the raw log-scale and the shift, as halves or interleaved.
Either way both are strided views of it, read in place, and so are their gradients in dh.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.kernels.affine import transform, transform_bwd
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
def affine_coupling_kernel(
    x_ptr, raw_ptr, shift_ptr, y_ptr, sums_ptr,
    n_samples, n_elements, n_cols, n_tiles, x_strides, h_strides, y_strides,
    INVERSE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, column = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    y_offsets = offsets(sample, element, n_cols, y_strides, FLAT)

    x = tl.load(x_ptr + x_offsets, mask=mask, other=0).to(FLOAT)
    raw = tl.load(raw_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
    shift = tl.load(shift_ptr + h_offsets, mask=mask, other=0).to(FLOAT)

    y, log_s = transform(x, raw, shift, INVERSE, SCALE, CLAMP)

    tl.store(y_ptr + y_offsets, y, mask=mask)
    store_sum(sums_ptr, log_s, sample, column, mask, n_samples, n_tiles)


@triton.jit
def affine_coupling_bwd_kernel(
    given_ptr, raw_ptr, shift_ptr, dy_ptr, dlog_det_ptr, x_ptr, dx_ptr, draw_ptr, dshift_ptr,
    n_samples, n_elements, n_cols, n_tiles, dlog_det_stride,
    given_strides, h_strides, dy_strides, x_strides, dx_strides, dh_strides,
    INVERSE: tl.constexpr, SCALE: tl.constexpr, CLAMP: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, _ = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    given_offsets = offsets(sample, element, n_cols, given_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    dy_offsets = offsets(sample, element, n_cols, dy_strides, FLAT)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    dx_offsets = offsets(sample, element, n_cols, dx_strides, FLAT)
    dh_offsets = offsets(sample, element, n_cols, dh_strides, FLAT)

    given = tl.load(given_ptr + given_offsets, mask=mask, other=0).to(FLOAT)
    raw = tl.load(raw_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
    shift = (
        0.0 if shift_ptr is None else tl.load(shift_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
    )
    dy = tl.load(dy_ptr + dy_offsets, mask=mask, other=0).to(FLOAT)
    dlog_det = tl.load(
        dlog_det_ptr + sample * dlog_det_stride, mask=sample < n_samples, other=0
    ).to(FLOAT)

    x, dx, draw, dshift = transform_bwd(
        given, raw, shift, dy, dlog_det, x_ptr is not None, INVERSE, SCALE, CLAMP
    )

    if x_ptr is not None:
        tl.store(x_ptr + x_offsets, x, mask=mask)
    tl.store(dx_ptr + dx_offsets, dx, mask=mask)
    tl.store(draw_ptr + dh_offsets, draw, mask=mask)
    tl.store(dshift_ptr + dh_offsets, dshift, mask=mask)


def couple(
    x: Tensor, h: Tensor, y: Tensor, inverse: bool, scale: str, clamp: float, interleaved: bool
) -> Tensor:
    """Writes y, which may be x itself, and returns the log_det."""
    raw, shift = raw_and_shift(h, interleaved)
    walk = Walk(x, raw, y)
    sums = walk.new_sums(x, accumulator(x, h))
    if walk.n_programs:
        with torch.cuda.device_of(x):
            affine_coupling_kernel[(walk.n_programs,)](
                x, raw, shift, y, sums, *walk.sizes, *walk.strides,
                INVERSE=inverse, SCALE=scale, CLAMP=clamp, FLOAT=triton_dtype(sums.dtype),
                **walk.constants,
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
    if walk.n_programs:
        with torch.cuda.device_of(given):
            affine_coupling_bwd_kernel[(walk.n_programs,)](
                given, raw, shift, dy, dlog_det, x, dx, draw, dshift,
                *walk.sizes, dlog_det.stride(0), *walk.strides,
                INVERSE=inverse, SCALE=scale, CLAMP=clamp,
                FLOAT=triton_dtype(accumulator(given, h)), **walk.constants,
            )  # fmt: skip
    return dh


def raw_and_shift(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    return h.chunk(2, 1)


ops = CouplingOps(
    "affine_coupling", "str scale, float clamp, bool interleaved", couple, couple_bwd
)
