"""Log density of a Normal, summed over each sample, in one pass; its gradients in another.

The conditioner's output h holds the mean and the log standard deviation, as halves or interleaved.
Either way both are strided views of it, read in place, and so are their gradients in dh. Without
h the Normal is the standard one, and x is all that is read.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.kernels.arithmetic import exp
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

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@triton.jit
def gaussian_log_prob_kernel(
    x_ptr, mean_ptr, log_std_ptr, sums_ptr,
    n_samples, n_elements, n_cols, n_tiles, x_strides, h_strides,
    FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, column = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)

    x = tl.load(x_ptr + x_offsets, mask=mask, other=0).to(FLOAT)
    if mean_ptr is None:
        log_density = -0.5 * x * x
    else:
        mean = tl.load(mean_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
        log_std = tl.load(log_std_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
        z = (x - mean) * exp(-log_std)
        log_density = -0.5 * z * z - log_std

    store_sum(sums_ptr, log_density, sample, column, mask, n_samples, n_tiles)


@triton.jit
def gaussian_log_prob_bwd_kernel(
    x_ptr, mean_ptr, log_std_ptr, dlog_prob_ptr, dx_ptr, dmean_ptr, dlog_std_ptr,
    n_samples, n_elements, n_cols, n_tiles, dlog_prob_stride,
    x_strides, h_strides, dx_strides, dh_strides,
    FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, _ = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    h_offsets = offsets(sample, element, n_cols, h_strides, FLAT)
    dx_offsets = offsets(sample, element, n_cols, dx_strides, FLAT)
    dh_offsets = offsets(sample, element, n_cols, dh_strides, FLAT)

    x = tl.load(x_ptr + x_offsets, mask=mask, other=0).to(FLOAT)
    dlog_prob_ptrs = dlog_prob_ptr + sample * dlog_prob_stride
    dlog_prob = tl.load(dlog_prob_ptrs, mask=sample < n_samples, other=0).to(FLOAT)
    if mean_ptr is None:
        dx = -dlog_prob * x
    else:
        mean = tl.load(mean_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
        log_std = tl.load(log_std_ptr + h_offsets, mask=mask, other=0).to(FLOAT)
        per_std = exp(-log_std)
        z = (x - mean) * per_std
        dx = -dlog_prob * z * per_std
        tl.store(dmean_ptr + dh_offsets, -dx, mask=mask)
        tl.store(dlog_std_ptr + dh_offsets, dlog_prob * (z * z - 1), mask=mask)

    tl.store(dx_ptr + dx_offsets, dx, mask=mask)


def mean_and_log_std(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    return h.chunk(2, 1)


@torch.library.custom_op("revlib::gaussian_log_prob", mutates_args=())
def gaussian_log_prob(x: Tensor, h: Tensor | None, interleaved: bool) -> Tensor:
    """Returns the log_prob of each sample."""
    (x,) = walkable(x)
    if h is None:
        mean = log_std = None
        walk, dtype = Walk(x, x), accumulator(x)
    else:
        (h,) = walkable(h)
        mean, log_std = mean_and_log_std(h, interleaved)
        walk, dtype = Walk(x, mean), accumulator(x, h)
    sums = walk.new_sums(x, dtype)
    if walk.n_programs:
        with torch.cuda.device_of(x):
            gaussian_log_prob_kernel[(walk.n_programs,)](
                x, mean, log_std, sums, *walk.sizes, *walk.strides,
                FLOAT=triton_dtype(dtype), **walk.constants,
            )  # fmt: skip
    return ordered_sum(sums) - HALF_LOG_TWO_PI * math.prod(x.shape[1:])


@gaussian_log_prob.register_fake
def _(x: Tensor, h: Tensor | None, interleaved: bool) -> Tensor:
    dtype = accumulator(x) if h is None else accumulator(x, h)
    return x.new_empty(x.shape[0], dtype=dtype)


@torch.library.custom_op("revlib::gaussian_log_prob_gradients", mutates_args=())
def gaussian_log_prob_gradients(
    x: Tensor, h: Tensor | None, dlog_prob: Tensor, interleaved: bool
) -> list[Tensor]:
    """Returns the gradient of x and, where there is h, that of h."""
    (x,) = walkable(x)
    dx = new_like(x)
    if h is None:
        gradients = [dx]
        mean = log_std = dmean = dlog_std = None
        walk, dtype = Walk(x, x, dx, dx), accumulator(x)
    else:
        (h,) = walkable(h)
        dh = new_like(h)
        gradients = [dx, dh]
        mean, log_std = mean_and_log_std(h, interleaved)
        dmean, dlog_std = mean_and_log_std(dh, interleaved)
        walk, dtype = Walk(x, mean, dx, dmean), accumulator(x, h)
    if walk.n_programs:
        with torch.cuda.device_of(x):
            gaussian_log_prob_bwd_kernel[(walk.n_programs,)](
                x, mean, log_std, dlog_prob, dx, dmean, dlog_std,
                *walk.sizes, dlog_prob.stride(0), *walk.strides,
                FLOAT=triton_dtype(dtype), **walk.constants,
            )  # fmt: skip
    return gradients


@gaussian_log_prob_gradients.register_fake
def _(x: Tensor, h: Tensor | None, dlog_prob: Tensor, interleaved: bool) -> list[Tensor]:
    return [new_like(tensor) for tensor in (x, h) if tensor is not None]
