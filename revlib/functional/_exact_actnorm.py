"""ActNorm that its inverse undoes bit for bit."""

from typing import Any

import torch
from torch import Tensor

from revlib import reference
from revlib.dispatch import gradient_is_recorded, kernels_apply_to
from revlib.functional._checks import check_shape, check_tensors
from revlib.functional._exact_scaling import check_differentiated_once, check_exact_stream


def exact_actnorm(
    x: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, *, bits: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Scales and shifts each channel on a grid, and keeps what rounding drops.

    .. math:: y = x \cdot a + b, \qquad a = 2^{16} / S, \quad
        S = \operatorname{round}(2^{16} \exp(-s))

    What `exact_affine_coupling` says of the grid, the state and the ranges holds here too.

    Args:
        x: The stream, float32 or float64, on the grid.
        log_scale: The log-scale :math:`s` of each channel.
        bias: The bias :math:`b` of each channel, which is rounded to the grid.
        state: int64, shaped like `x`. It is overwritten, also where a gradient is recorded.
        bits: How fine the grid is: 0 to 23 for float32, 0 to 32 for float64.

    Returns:
        `y`, with the shape and dtype of `x`; the log_det, which is exactly that of `a`; and the
        overflow flag, a scalar bool tensor, also True for a NaN or infinite input.

    Shape:
        `x`, `y` and `state` are [batch, channels, ...], `log_scale` and `bias` are [channels],
        the log_det is [batch], in float64 if an input is and in float32 otherwise.

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules.

    References:
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039; iFlow (Zhang et al.,
        2021), https://arxiv.org/abs/2111.00965

    Example:
        >>> x = torch.randint(-4096, 4096, (16, 4, 8, 8)) / 4096
        >>> log_scale, bias, state = torch.randn(4), torch.randn(4), torch.full(x.shape, 2**15)
        >>> y, log_det, _ = revlib.functional.exact_actnorm(x, log_scale, bias, state)
        >>> again, _, _ = revlib.functional.exact_actnorm_inverse(y, log_scale, bias, state)
        >>> torch.equal(again, x), bool((state == 2**15).all())
        (True, True)
    """
    check("exact_actnorm", log_scale, bias, state, bits, x=x)
    return normalize(x, log_scale, bias, state, False, bits)


def exact_actnorm_inverse(
    y: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, *, bits: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Undoes `exact_actnorm` bit for bit, with the same parameters and state.

    .. math:: x = (y - b) / a

    Returns:
        `x`, with the shape and dtype of `y`, the log_det of this direction, and the overflow flag.
    """
    check("exact_actnorm_inverse", log_scale, bias, state, bits, y=y)
    return normalize(y, log_scale, bias, state, True, bits)


@torch.no_grad()
def exact_actnorm_backward(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Goes back through `exact_actnorm` from its output, to the input and the gradients.

    All are bit for bit what the call got, state included, and what autograd gives.

    Args:
        y: The output of `exact_actnorm`.
        log_scale: As in the call.
        bias: As in the call.
        state: What the call left of the state; overwritten with what it was called with.
        dy: The gradient of `y`.
        dlog_det: The gradient of the log_det, [batch].
        bits: As in the call.

    Returns:
        `x`, and the gradients `dx`, `dlog_scale` and `dbias`. None of them is differentiable.

    Example:
        >>> x, log_scale, bias = torch.ones(4, 3), torch.randn(3), torch.randn(3)
        >>> state = torch.full(x.shape, 2**15)
        >>> y, log_det, _ = revlib.functional.exact_actnorm(x, log_scale, bias, state)
        >>> rebuilt, dx, dlog_scale, dbias = revlib.functional.exact_actnorm_backward(
        ...     y, log_scale, bias, state, torch.randn(4, 3), torch.randn(4)
        ... )
        >>> torch.equal(rebuilt, x)
        True
    """
    check("exact_actnorm_backward", log_scale, bias, state, bits, y=y, dy=dy, dlog_det=dlog_det)
    return normalize_backward(y, log_scale, bias, state, dy, dlog_det, False, bits)


@torch.no_grad()
def exact_actnorm_inverse_backward(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    state: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    *,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Goes back through `exact_actnorm_inverse` from its output, as `exact_actnorm_backward`.

    Returns:
        `y`, and the gradients `dy`, `dlog_scale` and `dbias`. None of them is differentiable.
    """
    op = "exact_actnorm_inverse_backward"
    check(op, log_scale, bias, state, bits, x=x, dx=dx, dlog_det=dlog_det)
    return normalize_backward(x, log_scale, bias, state, dx, dlog_det, True, bits)


class ExactActNormFunction(torch.autograd.Function):
    """Keeps x, whichever way it goes, and the parameters; see `ExactAffineCouplingFunction`."""

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        log_scale: Tensor,
        bias: Tensor,
        state: Tensor,
        inverse: bool,
        bits: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result, log_det, overflow = run(given, log_scale, bias, state, inverse, bits)
        ctx.save_for_backward(result if inverse else given, log_scale, bias)
        ctx.inverse = inverse
        return result, log_det, overflow

    @staticmethod
    def backward(
        ctx: Any, dresult: Tensor, dlog_det: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        check_differentiated_once("exact_actnorm", ctx.inverse)
        tensors = *ctx.saved_tensors, dresult, dlog_det
        return *gradients(*tensors, ctx.inverse), None, None, None


def normalize(
    x: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, inverse: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    if gradient_is_recorded(x, log_scale, bias):
        return ExactActNormFunction.apply(x, log_scale, bias, state, inverse, bits)
    return run(x, log_scale, bias, state, inverse, bits)


def run(
    x: Tensor, log_scale: Tensor, bias: Tensor, state: Tensor, inverse: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = x, log_scale, bias
    if kernels_apply_to(*inputs):
        return kernels().exact_actnorm(*inputs, state, inverse, bits)
    op = reference.exact_actnorm_inverse if inverse else reference.exact_actnorm
    return op(*inputs, state, bits)


def normalize_backward(
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = y, log_scale, bias, state, dy, dlog_det
    if kernels_apply_to(y, log_scale, bias, dy, dlog_det):
        return kernels().exact_actnorm_bwd(*tensors, inverse, bits)
    if inverse:
        return reference.exact_actnorm_inverse_backward(*tensors, bits)
    return reference.exact_actnorm_backward(*tensors, bits)


def gradients(
    x: Tensor, log_scale: Tensor, bias: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = x, log_scale, bias, dy, dlog_det
    if kernels_apply_to(*tensors):
        return kernels().exact_actnorm_gradients(*tensors, inverse)
    if inverse:
        return reference.exact_actnorm_inverse_gradients(*tensors)
    return reference.exact_actnorm_gradients(*tensors)


def kernels() -> Any:
    """The ops as kernels. The first call imports Triton."""
    from revlib.kernels import exact_actnorm

    return exact_actnorm


def check(
    op: str, log_scale: Tensor, bias: Tensor, state: Tensor, bits: int, **tensors: Tensor
) -> None:
    check_tensors(op, **tensors, log_scale=log_scale, bias=bias)
    (name, stream), *gradients = tensors.items()
    check_exact_stream(op, name, stream, state, bits)
    batch, channels = stream.shape[:2]
    for parameter_name, parameter in (("log_scale", log_scale), ("bias", bias)):
        check_shape(op, parameter_name, parameter, (channels,), f"[channels] of {name}")
    for (gradient_name, gradient), shape in zip(gradients, (stream.shape, (batch,)), strict=False):
        check_shape(op, gradient_name, gradient, shape, "shaped like what it is the gradient of")
