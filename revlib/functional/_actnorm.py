"""ActNorm: forward, inverse, the backward of each from its output, and the first parameters.

Forward and inverse are one `torch.addcmul` each, which reads an element once and writes it once,
8 bytes in float32: a kernel could only move as much. The first parameters take one
`torch.var_mean`, which reads an element once, 4 bytes. (Where half precision meets float32 both
move more: see `actnorm` and `actnorm_init`.) Backward is a kernel: it moves 16 bytes where plain
PyTorch moves 44, and for the gradients alone 12 where autograd moves 36.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from revlib import reference
from revlib.dispatch import gradient_is_recorded, kernels_apply_to
from revlib.functional._checks import (
    check_batch_and_channels,
    check_inplace,
    check_shape,
    check_tensors,
)


def actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Scales and shifts each channel, the same in every sample.

    .. math:: y = x \cdot \exp(s) + b, \qquad \log\left|\det J\right| = n \sum s

    where :math:`n` is the number of elements in a channel of a sample. `actnorm_init` gives
    the parameters to start from.

    Args:
        x: The stream.
        log_scale: The log-scale :math:`s` of each channel. In PyTorch, parameters wider than `x`
            widen the pass, too: 12 bytes an element for float32 with half precision, not 4.
        bias: The bias :math:`b` of each channel.
        inplace: Write `y` over `x`. Only where no gradient is recorded.

    Returns:
        `y`, with the shape and dtype of `x`, and the log_det.

    Shape:
        `x` and `y` are [batch, channels, ...], `log_scale` and `bias` are [channels], the log_det
        is [batch], in float64 if an input is and in float32 otherwise.

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules.

    References:
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> x = 3 * torch.randn(16, 4, 8, 8) + 5
        >>> log_scale, bias = revlib.functional.actnorm_init(x)
        >>> y, log_det = revlib.functional.actnorm(x, log_scale, bias)
        >>> again, minus_log_det = revlib.functional.actnorm_inverse(y, log_scale, bias)
        >>> torch.allclose(again, x, atol=1e-4), torch.allclose(minus_log_det, -log_det)
        (True, True)
    """
    check("actnorm", inplace, log_scale, bias, x=x)
    return normalize(x, log_scale, bias, False, inplace)


def actnorm_inverse(
    y: Tensor, log_scale: Tensor, bias: Tensor, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Undoes `actnorm` with the same parameters.

    .. math:: x = (y - b) \cdot \exp(-s), \qquad \log\left|\det J\right| = -n \sum s

    Returns:
        `x`, with the shape and dtype of `y`, and the log_det of this direction.
    """
    check("actnorm_inverse", inplace, log_scale, bias, y=y)
    return normalize(y, log_scale, bias, True, inplace)


@torch.no_grad()
def actnorm_backward(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Goes back through `actnorm` from its output: rebuilds `x` and gives the gradients.

    Args:
        y: The output of `actnorm`.
        log_scale: As in the call.
        bias: As in the call.
        dy: The gradient of `y`.
        dlog_det: The gradient of the log_det, [batch].
        inplace: Write `x` over `y` and `dx` over `dy`.

    Returns:
        `x`, and the gradients `dx`, `dlog_scale` and `dbias`, the last two summed in a fixed
        order. None of them is differentiable.

    Example:
        >>> x, log_scale, bias = torch.randn(4, 3), torch.randn(3), torch.randn(3)
        >>> y, log_det = revlib.functional.actnorm(x, log_scale, bias)
        >>> dy, dlog_det = torch.randn(4, 3), torch.randn(4)
        >>> rebuilt, dx, dlog_scale, dbias = revlib.functional.actnorm_backward(
        ...     y, log_scale, bias, dy, dlog_det
        ... )
        >>> torch.allclose(rebuilt, x, atol=1e-5), torch.allclose(dbias, dy.sum(0))
        (True, True)
    """
    check("actnorm_backward", inplace, log_scale, bias, y=y, dy=dy, dlog_det=dlog_det)
    return normalize_backward(y, log_scale, bias, dy, dlog_det, False, inplace)


@torch.no_grad()
def actnorm_inverse_backward(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Goes back through `actnorm_inverse` from its output, as `actnorm_backward`.

    Returns:
        `y`, and the gradients `dy`, `dlog_scale` and `dbias`. None of them is differentiable.
    """
    check("actnorm_inverse_backward", inplace, log_scale, bias, x=x, dx=dx, dlog_det=dlog_det)
    return normalize_backward(x, log_scale, bias, dx, dlog_det, True, inplace)


@torch.no_grad()
def actnorm_init(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the parameters with which `actnorm` takes a first batch to mean 0 and variance 1.

    The variance is that of the population, without Bessel's correction. Standard deviations
    below 1e-6 count as 1e-6, so that a constant channel keeps a finite scale.

    Args:
        x: The first batch, [batch, channels, ...]. Half precision is copied to float32 first, 10
            bytes an element and not 2: a mean rounded to half precision would miss.

    Returns:
        The log-scale and the bias, each [channels], in float64 if `x` is and in float32
        otherwise. Neither is differentiable.

    Raises:
        TypeError, ValueError: If `x` is no floating-point tensor, or has channels without
            elements.

    Example:
        >>> x = 3 * torch.randn(16, 4, 8, 8) + 5
        >>> y, _ = revlib.functional.actnorm(x, *revlib.functional.actnorm_init(x))
        >>> mean, std = y.mean((0, 2, 3)), y.std((0, 2, 3), correction=0)
        >>> torch.allclose(mean, torch.zeros(4), atol=1e-5), torch.allclose(std, torch.ones(4))
        (True, True)
    """
    check_tensors("actnorm_init", x=x)
    check_batch_and_channels("actnorm_init", "x", x)
    if x.numel() == 0:
        raise ValueError(f"actnorm_init: x must have elements; got {list(x.shape)}")
    return reference.actnorm_init(x)


class ActNormFunction(torch.autograd.Function):
    """Keeps what the op was called with, and nothing that it computes on the way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        op = reference.actnorm_inverse if inverse else reference.actnorm
        y, log_det = op(x, log_scale, bias)
        ctx.save_for_backward(x, log_scale, bias)
        ctx.inverse = inverse
        return y, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        from revlib.kernels import actnorm as kernels

        return *kernels.actnorm_gradients(*ctx.saved_tensors, dy, dlog_det, ctx.inverse), None


def normalize(
    x: Tensor, log_scale: Tensor, bias: Tensor, inverse: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    inputs = (x, log_scale, bias)
    if kernels_apply_to(*inputs) and gradient_is_recorded(*inputs):
        return ActNormFunction.apply(*inputs, inverse)
    op = reference.actnorm_inverse if inverse else reference.actnorm
    return op(*inputs, out=x if inplace else None)


def normalize_backward(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (y, log_scale, bias, dy, dlog_det)
    if not kernels_apply_to(*inputs):
        op = reference.actnorm_inverse_backward if inverse else reference.actnorm_backward
        x, dx, *gradients = op(*inputs)
        return (y.copy_(x), dy.copy_(dx), *gradients) if inplace else (x, dx, *gradients)

    from revlib.kernels import actnorm as kernels

    if inplace:
        return y, dy, *kernels.actnorm_bwd_(*inputs, inverse)
    return kernels.actnorm_bwd(*inputs, inverse)


def check(op: str, inplace: bool, log_scale: Tensor, bias: Tensor, **tensors: Tensor) -> None:
    check_tensors(op, **tensors, log_scale=log_scale, bias=bias)
    (name, stream), *gradients = tensors.items()
    check_batch_and_channels(op, name, stream)
    batch, channels = stream.shape[:2]
    for parameter_name, parameter in (("log_scale", log_scale), ("bias", bias)):
        check_shape(op, parameter_name, parameter, (channels,), f"[channels] of {name}")
    for (gradient_name, gradient), shape in zip(gradients, (stream.shape, (batch,)), strict=False):
        check_shape(op, gradient_name, gradient, shape, "shaped like what it is the gradient of")
    if inplace:
        written = (stream, *(gradient for _, gradient in gradients[:1]))
        check_inplace(op, written, log_scale, bias)
