"""Additive coupling on a power-of-two grid, where adding and subtracting round nothing away.

The gradient is straight-through, so it depends on no value here, and is not autograd's.

Plain additive coupling is ``x + update``, one pass in PyTorch already, so it has no op here.
"""

import torch
from torch import Tensor

from revlib.grid import ADDING_LIMIT


def exact_additive_coupling(x: Tensor, update: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    y = torch.add(x, grid_steps(update, x, bits), alpha=2.0**-bits)
    return y, is_out_of_range(y, ADDING_LIMIT[y.dtype] / 2**bits)


def exact_additive_coupling_inverse(y: Tensor, update: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    x = torch.sub(y, grid_steps(update, y, bits), alpha=2.0**-bits)
    return x, is_out_of_range(x, ADDING_LIMIT[x.dtype] / 2**bits)


def grid_steps(update: Tensor, like: Tensor, bits: int) -> Tensor:
    """The nearest whole number of steps of 2**-bits; halfway between two, the even one."""
    return (update.to(like.dtype) * 2.0**bits).round_()


def is_out_of_range(x: Tensor, limit: float) -> Tensor:
    """Whether any value is NaN, or not below the limit in absolute value."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.bool)
    low, high = torch.aminmax(x)
    # Asked this way round, so that NaN is outside.
    return ~((low > -limit) & (high < limit))
