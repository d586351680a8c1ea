"""Masked affine coupling: forward, inverse, and the backward of each from its output."""

from typing import NamedTuple

import torch
from torch import Tensor

from revlib.functional import _affine_coupling
from revlib.functional._checks import check_choice, check_flags
from revlib.functional._coupling import couple, couple_backward

OP = "masked_affine_coupling"
MASKS = ("checkerboard", "channel")


def masked_affine_coupling(
    x: Tensor,
    h: Tensor,
    *,
    mask: str = "checkerboard",
    flip: bool = False,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Scales and shifts the elements of a stream that a mask does not keep.

    .. math::
        y = b \odot x + (1 - b) \odot (x \cdot \exp(s) + t), \qquad
        \log\left|\det J\right| = \sum (1 - b) \odot s

    with b = 1 where the mask keeps an element. What is kept passes through bit for bit; what `h`
    holds there, be it infinite or NaN, has no effect and no gradient.

    ============== ================================================================
    `mask`         what it keeps
    ============== ================================================================
    "checkerboard" elements whose indices in space have an even sum; where there is
                   no space, [batch, channels], the channels of even index
    "channel"      the first channels: half of them, rounded up
    ============== ================================================================

    Args:
        x: The stream, of which the mask keeps a part.
        h: The conditioner's output; its dtype may differ from `x`'s, as under autocast.
        mask: What is kept.
        flip: Keep what would be transformed, and transform what would be kept.
        scale: How the log-scale is bounded, as in `affine_coupling`.
        clamp: The bound of the log-scale, as in `affine_coupling`.
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
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803

    Example:
        >>> x, h = torch.randn(16, 3, 8, 8), torch.randn(16, 6, 8, 8)
        >>> y, log_det = revlib.functional.masked_affine_coupling(x, h, mask="channel")
        >>> torch.equal(y[:, :2], x[:, :2])
        True
        >>> again, _ = revlib.functional.masked_affine_coupling_inverse(y, h, mask="channel")
        >>> torch.allclose(again, x, atol=1e-5)
        True
    """
    op = "masked_affine_coupling"
    options = checked(op, mask, flip, scale, clamp, interleaved, inplace, x=x, h=h)
    return couple(OP, x, h, False, inplace, options)


def masked_affine_coupling_inverse(
    y: Tensor,
    h: Tensor,
    *,
    mask: str = "checkerboard",
    flip: bool = False,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Undoes `masked_affine_coupling` with the same `h` and options.

    .. math::
        x = b \odot y + (1 - b) \odot (y - t) \cdot \exp(-s), \qquad
        \log\left|\det J\right| = -\sum (1 - b) \odot s

    Returns:
        `x`, with the shape and dtype of `y`, and the log_det of this direction.
    """
    op = "masked_affine_coupling_inverse"
    options = checked(op, mask, flip, scale, clamp, interleaved, inplace, y=y, h=h)
    return couple(OP, y, h, True, inplace, options)


@torch.no_grad()
def masked_affine_coupling_backward(
    y: Tensor,
    h: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    mask: str = "checkerboard",
    flip: bool = False,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `masked_affine_coupling` from its output, as `affine_coupling_backward`.

    Args:
        y: The output of `masked_affine_coupling`.
        h: The conditioner's output that it was called with.
        dy: The gradient of `y`.
        dlog_det: The gradient of the log_det, [batch].
        mask: As in the call.
        flip: As in the call.
        scale: As in the call.
        clamp: As in the call.
        interleaved: As in the call.
        inplace: Write `x` over `y` and `dx` over `dy`.

    Returns:
        `x`, and the gradients `dx` and `dh`; where the mask keeps an element, `dx` is `dy` and
        `dh` is 0. None of them is differentiable.

    Example:
        >>> x, h = torch.randn(4, 3), torch.randn(4, 6)
        >>> y, log_det = revlib.functional.masked_affine_coupling(x, h)
        >>> dy, dlog_det = torch.randn(4, 3), torch.randn(4)
        >>> rebuilt, dx, dh = revlib.functional.masked_affine_coupling_backward(y, h, dy, dlog_det)
        >>> torch.allclose(rebuilt, x, atol=1e-5), torch.equal(dx[:, ::2], dy[:, ::2])
        (True, True)
    """
    op = "masked_affine_coupling_backward"
    tensors = {"y": y, "h": h, "dy": dy, "dlog_det": dlog_det}
    options = checked(op, mask, flip, scale, clamp, interleaved, inplace, **tensors)
    return couple_backward(OP, y, h, dy, dlog_det, False, inplace, options)


@torch.no_grad()
def masked_affine_coupling_inverse_backward(
    x: Tensor,
    h: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    *,
    mask: str = "checkerboard",
    flip: bool = False,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `masked_affine_coupling_inverse` from its output.

    Returns:
        `y`, and the gradients `dy` and `dh`. None of them is differentiable.
    """
    op = "masked_affine_coupling_inverse_backward"
    tensors = {"x": x, "h": h, "dx": dx, "dlog_det": dlog_det}
    options = checked(op, mask, flip, scale, clamp, interleaved, inplace, **tensors)
    return couple_backward(OP, x, h, dx, dlog_det, True, inplace, options)


class Options(NamedTuple):
    mask: str
    flip: bool
    scale: str
    clamp: float
    interleaved: bool


def checked(
    op: str,
    mask: str,
    flip: bool,
    scale: str,
    clamp: float,
    interleaved: bool,
    inplace: bool,
    **tensors: Tensor,
) -> Options:
    affine = _affine_coupling.checked(op, scale, clamp, interleaved, inplace, **tensors)
    check_choice(op, "mask", mask, MASKS)
    check_flags(op, flip=flip)
    return Options(mask, flip, *affine)
