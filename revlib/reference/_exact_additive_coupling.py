"""Additive coupling on a power-of-two grid, where adding and subtracting round nothing away.

Plain additive coupling is ``x + update``, one pass in PyTorch already, so it has no op here.
"""

from typing import Any

import torch
from torch import Tensor


def exact_additive_coupling(x: Tensor, update: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rounded = round_to_grid(update.to(x.dtype), bits)
    y = x + rounded
    return y, overflow(y, rounded, bits)


def exact_additive_coupling_inverse(y: Tensor, update: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rounded = round_to_grid(update.to(y.dtype), bits)
    x = y - rounded
    return x, overflow(x, rounded, bits)


def round_to_grid(values: Tensor, bits: int) -> Tensor:
    """The nearest multiples of 2**-bits; halfway between two, the even one."""
    return RoundFunction.apply(values * 2.0**bits) * 2.0**-bits


def overflow(y: Tensor, rounded: Tensor, bits: int) -> Tensor:
    """Whether any value is outside what the mantissa can hold beside the grid's bits."""
    limit = 2 / torch.finfo(y.dtype).eps / 2**bits
    # Asked this way round, so that NaN is outside.
    inside = (y.abs() < limit) & (rounded.abs() < limit)
    return ~inside.all()


class RoundFunction(torch.autograd.Function):
    """Rounds half to even, with the gradient of the identity (straight-through)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, drounded: Tensor) -> Tensor:
        return drounded
