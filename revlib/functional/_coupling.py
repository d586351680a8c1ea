"""What every coupling does with checked input: choose kernel or reference, and differentiate.

A coupling of name ``op`` is four functions of `revlib.reference`, `op`, `op_inverse`,
`op_backward` and `op_inverse_backward`, and the kernels of ``revlib.kernels.<op>``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revlib import reference
from revlib.dispatch import gradient_is_recorded, kernels_apply_to


class CouplingFunction(torch.autograd.Function):
    """Keeps what the op was called with, and nothing that it computes on the way.

    What came out would do as well, but for rounding: in half precision y has lost some of x. A
    chain that rebuilds keeps neither, and goes back by `couple_backward`.
    """

    @staticmethod
    def forward(
        ctx: Any, op: str, x: Tensor, h: Tensor, inverse: bool, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        y, log_det = kernels(op).forward(x, h, inverse, *options)
        ctx.save_for_backward(x, h)
        ctx.op, ctx.inverse, ctx.options = op, inverse, options
        return y, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        x, h = ctx.saved_tensors
        dx, dh = kernels(ctx.op).gradients(x, h, dy, dlog_det, ctx.inverse, *ctx.options)
        return None, dx, dh, None, None


def couple(
    op: str, x: Tensor, h: Tensor, inverse: bool, inplace: bool, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    if not kernels_apply_to(x, h):
        y, log_det = getattr(reference, f"{op}_inverse" if inverse else op)(x, h, *options)
        return x.copy_(y) if inplace else y, log_det
    if gradient_is_recorded(x, h):
        return CouplingFunction.apply(op, x, h, inverse, options)
    if inplace:
        return x, kernels(op).forward_(x, h, inverse, *options)
    return kernels(op).forward(x, h, inverse, *options)


def couple_backward(
    op: str,
    y: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    inplace: bool,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = y, h, dy, dlog_det
    if not kernels_apply_to(*tensors):
        backward = getattr(reference, f"{op}_inverse_backward" if inverse else f"{op}_backward")
        x, dx, dh = backward(*tensors, *options)
        return (y.copy_(x), dy.copy_(dx), dh) if inplace else (x, dx, dh)
    if inplace:
        return y, dy, kernels(op).backward_(*tensors, inverse, *options)
    return kernels(op).backward(*tensors, inverse, *options)


def kernels(op: str) -> Any:
    """The coupling's ops. The first call imports Triton."""
    from revlib.kernels import affine_coupling, masked_affine_coupling, spline_coupling

    modules = {
        "affine_coupling": affine_coupling,
        "masked_affine_coupling": masked_affine_coupling,
        "spline_coupling": spline_coupling,
    }
    return modules[op].ops
