"""Additive coupling that its inverse undoes bit for bit.

Plain additive coupling has no op here: ``x + update`` is one pass in PyTorch already.
"""

from typing import Any

import torch
from torch import Tensor

from revlib import reference
from revlib.dispatch import gradient_is_recorded, kernels_apply_to
from revlib.functional._checks import check_inplace, check_integer, check_shape, check_tensors
from revlib.grid import LARGEST_ADDING_BITS


def exact_additive_coupling(
    x: Tensor, update: Tensor, *, bits: int = 12, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Adds an update that is first rounded to a grid, so that subtracting it undoes every bit.

    .. math:: y = x + 2^{-k} \operatorname{round}(2^k u)

    The grid is the multiples of :math:`2^{-k}`, with k = `bits`; halfway between two, the even
    multiple is taken. If `x` is on the grid, so is `y`, and as long as

    .. math:: |y| < 2^{24 - k} \text{ in float32}, \qquad |y| < 2^{53 - k} \text{ in float64}

    the sum is exact and `exact_additive_coupling_inverse` gives back `x` bit for bit (but for the
    sign of a zero). An `x` off the grid is no error: `y` is then off it too, and rounded.

    The gradient is that of :math:`y = x + u` (straight-through).

    Args:
        x: The half that is updated, float32 or float64, of any shape but a scalar's.
        update: The update :math:`u`, shaped like `x`, of any floating-point dtype, as under
            autocast. It is cast to the dtype of `x` before it is rounded.
        bits: How fine the grid is: 0 to 23 for float32, 0 to 52 for float64.
        inplace: Write `y` over `x`. Only where no gradient is recorded.

    Returns:
        `y`, with the shape and dtype of `x`, and the overflow flag: a scalar bool tensor on the
        device of `x`, True if any value of `y` is NaN or not in the range above, which is that of
        `x` as well. Nothing waits for the device until the flag is read.

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules.

    References:
        The additive coupling of NICE (Dinh et al., 2015), https://arxiv.org/abs/1410.8516, which
        Gomez et al. (2017) train by rebuilding, https://arxiv.org/abs/1707.04585

    Example:
        >>> x = torch.randint(-4096, 4096, (16, 8)) / 4096
        >>> update = torch.randn(16, 8)
        >>> y, overflow = revlib.functional.exact_additive_coupling(x, update)
        >>> again, _ = revlib.functional.exact_additive_coupling_inverse(y, update)
        >>> torch.equal(again, x), overflow.item()
        (True, False)
    """
    check_door("exact_additive_coupling", bits, inplace, x=x, update=update)
    return couple(x, update, False, inplace, bits)


def exact_additive_coupling_inverse(
    y: Tensor, update: Tensor, *, bits: int = 12, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Undoes `exact_additive_coupling` with the same `update` and `bits`.

    .. math:: x = y - 2^{-k} \operatorname{round}(2^k u)

    Returns:
        `x`, with the shape and dtype of `y`, and the overflow flag of `x`.
    """
    check_door("exact_additive_coupling_inverse", bits, inplace, y=y, update=update)
    return couple(y, update, True, inplace, bits)


class ExactAdditiveCouplingFunction(torch.autograd.Function):
    """Keeps nothing: the gradients depend on no value, and need no kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor, inverse: bool, bits: int
    ) -> tuple[Tensor, Tensor]:
        y, overflow = run(x, update, inverse, bits)
        ctx.mark_non_differentiable(overflow)
        ctx.inverse, ctx.update_dtype = inverse, update.dtype
        return y, overflow

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        dupdate = (-dy if ctx.inverse else dy).to(ctx.update_dtype)
        return dy, dupdate, None, None


def couple(
    x: Tensor, update: Tensor, inverse: bool, inplace: bool, bits: int
) -> tuple[Tensor, Tensor]:
    if gradient_is_recorded(x, update):
        return ExactAdditiveCouplingFunction.apply(x, update, inverse, bits)
    if inplace and kernels_apply_to(x, update):
        from revlib.kernels import exact_additive_coupling as kernels

        return x, kernels.exact_additive_coupling_(x, update, inverse, bits)
    y, overflow = run(x, update, inverse, bits)
    return x.copy_(y) if inplace else y, overflow


def run(x: Tensor, update: Tensor, inverse: bool, bits: int) -> tuple[Tensor, Tensor]:
    if kernels_apply_to(x, update):
        from revlib.kernels import exact_additive_coupling as kernels

        return kernels.exact_additive_coupling(x, update, inverse, bits)
    if inverse:
        return reference.exact_additive_coupling_inverse(x, update, bits)
    return reference.exact_additive_coupling(x, update, bits)


def check_door(op: str, bits: int, inplace: bool, **tensors: Tensor) -> None:
    check_tensors(op, **tensors)
    (name, stream), (_, update) = tensors.items()
    if stream.dtype not in LARGEST_ADDING_BITS:
        raise TypeError(f"{op}: {name} must be float32 or float64; got {stream.dtype}")
    if stream.ndim == 0:
        raise ValueError(f"{op}: {name} must have a dimension at least; got a scalar")
    check_shape(op, "update", update, stream.shape, f"shaped like {name}")
    check_integer(op, "bits", bits, 0, LARGEST_ADDING_BITS[stream.dtype])
    if inplace:
        check_inplace(op, (stream,), update)
