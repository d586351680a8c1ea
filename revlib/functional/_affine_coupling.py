"""Affine coupling: forward, inverse, and the backward of each from its output."""

from typing import NamedTuple

import torch
from torch import Tensor

from revlib.functional._checks import (
    check_batch_and_channels,
    check_choice,
    check_flags,
    check_inplace,
    check_positive,
    check_shape,
    check_tensors,
)
from revlib.functional._coupling import couple, couple_backward

OP = "affine_coupling"
SCALES = ("tanh", "exp", "sigmoid", "atan")


def affine_coupling(
    x: Tensor,
    h: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Scales and shifts the transformed half of a stream, as its conditioner says.

    .. math:: y = x \cdot \exp(s) + t, \qquad \log\left|\det J\right| = \sum s

    The conditioner's output `h` holds a raw log-scale :math:`r` and the shift :math:`t` for every
    element of `x`. `scale` names what makes the log-scale :math:`s` of :math:`r`:

    ========== ======================================== =====================================
    `scale`    :math:`s`                                as in
    ========== ======================================== =====================================
    "tanh"     :math:`c \tanh(r / c)`                   RealNVP, with the bound c = `clamp`
    "exp"      :math:`r`                                unbounded
    "sigmoid"  :math:`\log(\sigma(r + 2) + 10^{-3})`    Glow, with a floor under the scale
    "atan"     :math:`0.636\, c \arctan(r)`             FrEIA
    ========== ======================================== =====================================

    Args:
        x: The half that is transformed.
        h: The conditioner's output; its dtype may differ from `x`'s, as under autocast.
        scale: How the log-scale is bounded.
        clamp: The bound of the log-scale's absolute value, for "tanh" and (nearly) "atan".
        interleaved: Whether the raw log-scales are channels 0, 2, ... of `h` and the shifts
            1, 3, ...; otherwise they are its first and its second half.
        inplace: Write `y` over `x`. Only where no gradient is recorded.

    Returns:
        `y`, with the shape and dtype of `x`, and the log_det.

    Shape:
        `x` and `y` are [batch, channels, ...], `h` is [batch, 2 * channels, ...], the log_det is
        [batch], in float64 if an input is and in float32 otherwise.

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803;
        Glow (Kingma and Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> x, h = torch.randn(16, 3, 8, 8), torch.randn(16, 6, 8, 8)
        >>> y, log_det = revlib.functional.affine_coupling(x, h)
        >>> again, minus_log_det = revlib.functional.affine_coupling_inverse(y, h)
        >>> torch.allclose(again, x, atol=1e-5), torch.allclose(minus_log_det, -log_det)
        (True, True)
    """
    options = checked("affine_coupling", scale, clamp, interleaved, inplace, x=x, h=h)
    return couple(OP, x, h, False, inplace, options)


def affine_coupling_inverse(
    y: Tensor,
    h: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Undoes `affine_coupling` with the same `h` and options.

    .. math:: x = (y - t) \cdot \exp(-s), \qquad \log\left|\det J\right| = -\sum s

    Returns:
        `x`, with the shape and dtype of `y`, and the log_det of this direction.
    """
    options = checked("affine_coupling_inverse", scale, clamp, interleaved, inplace, y=y, h=h)
    return couple(OP, y, h, True, inplace, options)


@torch.no_grad()
def affine_coupling_backward(
    y: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `affine_coupling` from its output: rebuilds `x` and gives the gradients.

    Args:
        y: The output of `affine_coupling`.
        h: The conditioner's output that it was called with.
        dy: The gradient of `y`.
        dlog_det: The gradient of the log_det, [batch].
        scale: As in the call.
        clamp: As in the call.
        interleaved: As in the call.
        inplace: Write `x` over `y` and `dx` over `dy`.

    Returns:
        `x`, and the gradients `dx` and `dh`. None of them is differentiable.

    Example:
        >>> x, h = torch.randn(4, 3), torch.randn(4, 6)
        >>> y, log_det = revlib.functional.affine_coupling(x, h)
        >>> dy, dlog_det = torch.randn(4, 3), torch.randn(4)
        >>> rebuilt, dx, dh = revlib.functional.affine_coupling_backward(y, h, dy, dlog_det)
        >>> torch.allclose(rebuilt, x, atol=1e-5)
        True
    """
    op = "affine_coupling_backward"
    options = checked(op, scale, clamp, interleaved, inplace, y=y, h=h, dy=dy, dlog_det=dlog_det)
    return couple_backward(OP, y, h, dy, dlog_det, False, inplace, options)


@torch.no_grad()
def affine_coupling_inverse_backward(
    x: Tensor,
    h: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `affine_coupling_inverse` from its output, as `affine_coupling_backward`.

    Returns:
        `y`, and the gradients `dy` and `dh`. None of them is differentiable.
    """
    op = "affine_coupling_inverse_backward"
    options = checked(op, scale, clamp, interleaved, inplace, x=x, h=h, dx=dx, dlog_det=dlog_det)
    return couple_backward(OP, x, h, dx, dlog_det, True, inplace, options)


class Options(NamedTuple):
    scale: str
    clamp: float
    interleaved: bool


def checked(
    op: str, scale: str, clamp: float, interleaved: bool, inplace: bool, **tensors: Tensor
) -> Options:
    check_tensors(op, **tensors)
    check_choice(op, "scale", scale, SCALES)
    check_positive(op, "clamp", clamp)
    check_flags(op, interleaved=interleaved, inplace=inplace)
    (name, stream), (_, h), *gradients = tensors.items()
    check_batch_and_channels(op, name, stream)
    batch, channels, *space = stream.shape
    check_shape(op, "h", h, (batch, 2 * channels, *space), f"[batch, 2 * channels, ...] of {name}")
    for (gradient_name, gradient), shape in zip(gradients, (stream.shape, (batch,)), strict=False):
        check_shape(op, gradient_name, gradient, shape, "shaped like what it is the gradient of")
    if inplace:
        check_inplace(op, (stream, *(gradient for _, gradient in gradients[:1])), h)
    return Options(scale, float(clamp), interleaved)
