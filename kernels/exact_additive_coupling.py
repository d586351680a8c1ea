"""Exact additive coupling, ``y = x + round(update * 2**bits) * 2**-bits``, in one pass.

Whether a value left the range in which this is exact costs no pass of its own: whoever meets
such a value writes the same True over the False that the flag starts as.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from revlib.grid import ADDING_LIMIT
from revlib.kernels.arithmetic import round_half_even
from revlib.kernels.walk import Walk, new_like, offsets, tile, triton_dtype, walkable


@triton.jit
def exact_additive_coupling_kernel(
    x_ptr, update_ptr, y_ptr, overflow_ptr,
    n_samples, n_elements, n_cols, n_tiles, x_strides, update_strides, y_strides,
    INVERSE: tl.constexpr, STEPS: tl.constexpr, LIMIT: tl.constexpr, FLOAT: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    sample, element, mask, _ = tile(n_samples, n_elements, n_tiles, INDEX, SAMPLES, ELEMENTS)
    x_offsets = offsets(sample, element, n_cols, x_strides, FLAT)
    update_offsets = offsets(sample, element, n_cols, update_strides, FLAT)
    y_offsets = offsets(sample, element, n_cols, y_strides, FLAT)

    x = tl.load(x_ptr + x_offsets, mask=mask, other=0)
    update = tl.load(update_ptr + update_offsets, mask=mask, other=0).to(FLOAT)

    # Powers of two both: the products are exact, fused with what follows or not.
    rounded = round_half_even(update * STEPS) * (1 / STEPS)
    if INVERSE:
        y = x - rounded
    else:
        y = x + rounded
    # Asked this way round, so that NaN is outside; what the mask leaves out is 0, and inside.
    inside = tl.abs(y) < LIMIT

    tl.store(y_ptr + y_offsets, y, mask=mask)
    everywhere = tl.broadcast_to(overflow_ptr, [SAMPLES, ELEMENTS])
    tl.store(everywhere, tl.full([SAMPLES, ELEMENTS], True, tl.int1), mask=~inside)


def couple(x: Tensor, update: Tensor, y: Tensor, inverse: bool, bits: int) -> Tensor:
    """Writes y, which may be x itself, and returns the overflow flag."""
    overflow = x.new_zeros((), dtype=torch.bool)
    x, update, y = (as_samples(tensor) for tensor in (x, update, y))
    walk = Walk(x, update, y)
    if walk.n_programs:
        with torch.cuda.device_of(x):
            exact_additive_coupling_kernel[(walk.n_programs,)](
                x, update, y, overflow, *walk.sizes, *walk.strides,
                INVERSE=inverse, STEPS=2.0**bits, LIMIT=ADDING_LIMIT[x.dtype] / 2**bits,
                FLOAT=triton_dtype(x.dtype), **walk.constants,
            )  # fmt: skip
    return overflow


def as_samples(tensor: Tensor) -> Tensor:
    """A vector as a batch of one."""
    return tensor[None] if tensor.ndim == 1 else tensor


@torch.library.custom_op("revlib::exact_additive_coupling", mutates_args=())
def exact_additive_coupling(
    x: Tensor, update: Tensor, inverse: bool, bits: int
) -> tuple[Tensor, Tensor]:
    """Returns y and the overflow flag."""
    x, update = walkable(x, update)
    y = new_like(x)
    return y, couple(x, update, y, inverse, bits)


@exact_additive_coupling.register_fake
def _(x: Tensor, update: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    (x,) = walkable(x)
    return new_like(x), x.new_empty((), dtype=torch.bool)


@torch.library.custom_op("revlib::exact_additive_coupling_", mutates_args=("x",))
def exact_additive_coupling_(x: Tensor, update: Tensor, inverse: bool, bits: int) -> Tensor:
    """Writes y over x and returns the overflow flag."""
    y, update = walkable(x, update)
    overflow = couple(y, update, y, inverse, bits)
    if y is not x:
        x.copy_(y)
    return overflow


@exact_additive_coupling_.register_fake
def _(x: Tensor, update: Tensor, *options: Any) -> Tensor:
    return x.new_empty((), dtype=torch.bool)
