"""Affine coupling that its inverse undoes bit for bit."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from revlib import reference
from revlib.dispatch import gradient_is_recorded, kernels_apply_to
from revlib.functional import _affine_coupling
from revlib.functional._exact_scaling import check_differentiated_once, check_exact_stream


def exact_affine_coupling(
    x: Tensor,
    h: Tensor,
    state: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Scales and shifts on a grid, and keeps what rounding drops, so that undoing it is exact.

    .. math:: y = x \cdot a + t, \qquad a = 2^{16} / S, \quad
        S = \operatorname{round}(2^{16} \exp(-s))

    The log-scale :math:`s` and the shift :math:`t` are those that `affine_coupling` takes from
    `h`. The grid is the multiples of :math:`2^{-k}`, with k = `bits`: `x` must be on it, `t` is
    rounded to it, and so is :math:`x \cdot a`, up or down as the state has it. In the state,
    `exact_affine_coupling_inverse` finds what it takes to give back `x` bit for bit (but for the
    sign of a zero), and leaves the state itself as it was. Over many layers the state grows by
    :math:`\log_2 S - 16` bits each, and shrinks where :math:`a > 1`; 2**15 is a good first value.

    All holds as long as every value is in range: the state below 2**61 (and never below 0), and

    .. math:: |x|, |y| < 2^{24 - k} \text{ in float32}, \qquad < 2^{46 - k} \text{ in float64},
        \qquad -15 \ln 2 \le s \le 16 \ln 2

    The gradient is that of :math:`y = x \cdot a + t` with :math:`da / ds = a` (straight-through).

    Args:
        x: The half that is transformed, float32 or float64.
        h: The conditioner's output, of any floating-point dtype, as under autocast.
        state: int64, shaped like `x`. It is overwritten, also where a gradient is recorded.
        scale: How the log-scale is bounded, as in `affine_coupling`.
        clamp: As in `affine_coupling`.
        interleaved: As in `affine_coupling`.
        bits: How fine the grid is: 0 to 23 for float32, 0 to 32 for float64.

    Returns:
        `y`, with the shape and dtype of `x`; the log_det, which is exactly that of `a`; and the
        overflow flag: a scalar bool tensor on the device of `x`, True if any value is out of
        range, or NaN or infinite in `x` or `h`. What was flagged may be lost, with the state.
        Nothing waits for the device until the flag is read.

    Shape:
        `x`, `y` and `state` are [batch, channels, ...], `h` is [batch, 2 * channels, ...], the
        log_det is [batch], in float64 if an input is and in float32 otherwise.

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules.

    References:
        iFlow (Zhang et al., 2021), https://arxiv.org/abs/2111.00965; Gradient-based
        Hyperparameter Optimization through Reversible Learning (Maclaurin et al., 2015),
        https://arxiv.org/abs/1502.03492

    Example:
        >>> x = torch.randint(-4096, 4096, (16, 3, 8, 8)) / 4096
        >>> h, state = torch.randn(16, 6, 8, 8), torch.full(x.shape, 2**15)
        >>> y, log_det, overflow = revlib.functional.exact_affine_coupling(x, h, state)
        >>> again, _, _ = revlib.functional.exact_affine_coupling_inverse(y, h, state)
        >>> torch.equal(again, x), bool((state == 2**15).all()), overflow.item()
        (True, True, False)
    """
    options = checked("exact_affine_coupling", scale, clamp, interleaved, bits, state, x=x, h=h)
    return couple(x, h, state, False, options)


def exact_affine_coupling_inverse(
    y: Tensor,
    h: Tensor,
    state: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Undoes `exact_affine_coupling` bit for bit, with the same `h`, options and state.

    .. math:: x = (y - t) / a

    Returns:
        `x`, with the shape and dtype of `y`, the log_det of this direction, and the overflow flag.
    """
    op = "exact_affine_coupling_inverse"
    options = checked(op, scale, clamp, interleaved, bits, state, y=y, h=h)
    return couple(y, h, state, True, options)


@torch.no_grad()
def exact_affine_coupling_backward(
    y: Tensor,
    h: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `exact_affine_coupling` from its output, to the input and the gradients.

    All are bit for bit what the call got, state included, and what autograd gives.

    Args:
        y: The output of `exact_affine_coupling`.
        h: The conditioner's output that it was called with.
        state: What it left of the state; overwritten with what it was called with.
        dy: The gradient of `y`.
        dlog_det: The gradient of the log_det, [batch].
        scale: As in the call.
        clamp: As in the call.
        interleaved: As in the call.
        bits: As in the call.

    Returns:
        `x`, and the gradients `dx` and `dh`. None of them is differentiable.

    Example:
        >>> x, h, state = torch.ones(4, 3), torch.randn(4, 6), torch.full((4, 3), 2**15)
        >>> y, log_det, _ = revlib.functional.exact_affine_coupling(x, h, state)
        >>> dy, dlog_det = torch.randn(4, 3), torch.randn(4)
        >>> rebuilt, dx, dh = revlib.functional.exact_affine_coupling_backward(
        ...     y, h, state, dy, dlog_det
        ... )
        >>> torch.equal(rebuilt, x)
        True
    """
    op, tensors = "exact_affine_coupling_backward", {"dy": dy, "dlog_det": dlog_det}
    options = checked(op, scale, clamp, interleaved, bits, state, y=y, h=h, **tensors)
    return couple_backward(y, h, state, dy, dlog_det, False, options)


@torch.no_grad()
def exact_affine_coupling_inverse_backward(
    x: Tensor,
    h: Tensor,
    state: Tensor,
    dx: Tensor,
    dlog_det: Tensor,
    *,
    scale: str = "tanh",
    clamp: float = 2.0,
    interleaved: bool = False,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor]:
    """Goes back through `exact_affine_coupling_inverse`, as `exact_affine_coupling_backward`.

    Returns:
        `y`, and the gradients `dy` and `dh`. None of them is differentiable.
    """
    op, tensors = "exact_affine_coupling_inverse_backward", {"dx": dx, "dlog_det": dlog_det}
    options = checked(op, scale, clamp, interleaved, bits, state, x=x, h=h, **tensors)
    return couple_backward(x, h, state, dx, dlog_det, True, options)


class Options(NamedTuple):
    scale: str
    clamp: float
    interleaved: bool
    bits: int


def checked(
    op: str,
    scale: str,
    clamp: float,
    interleaved: bool,
    bits: int,
    state: Tensor,
    **tensors: Tensor,
) -> Options:
    options = _affine_coupling.checked(op, scale, clamp, interleaved, False, **tensors)
    name, stream = next(iter(tensors.items()))
    check_exact_stream(op, name, stream, state, bits)
    return Options(*options, bits)


class ExactAffineCouplingFunction(torch.autograd.Function):
    """Keeps x, whichever way it goes, and h: the gradients are functions of these.

    They are those that `exact_affine_coupling_backward` gives, bit for bit, since it computes
    them in the same way from the x that it has rebuilt. The state is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, h: Tensor, state: Tensor, inverse: bool, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        result, log_det, overflow = run(given, h, state, inverse, options)
        ctx.save_for_backward(result if inverse else given, h)
        ctx.inverse, ctx.options = inverse, options
        return result, log_det, overflow

    @staticmethod
    def backward(
        ctx: Any, dresult: Tensor, dlog_det: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        check_differentiated_once("exact_affine_coupling", ctx.inverse)
        x, h = ctx.saved_tensors
        dgiven, dh = gradients(x, h, dresult, dlog_det, ctx.inverse, ctx.options)
        return dgiven, dh, None, None, None


def couple(
    x: Tensor, h: Tensor, state: Tensor, inverse: bool, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    if gradient_is_recorded(x, h):
        return ExactAffineCouplingFunction.apply(x, h, state, inverse, options)
    return run(x, h, state, inverse, options)


def run(
    x: Tensor, h: Tensor, state: Tensor, inverse: bool, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    if kernels_apply_to(x, h):
        return kernels().exact_affine_coupling(x, h, state, inverse, *options)
    op = reference.exact_affine_coupling_inverse if inverse else reference.exact_affine_coupling
    return op(x, h, state, *options)


def couple_backward(
    y: Tensor,
    h: Tensor,
    state: Tensor,
    dy: Tensor,
    dlog_det: Tensor,
    inverse: bool,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = y, h, state, dy, dlog_det
    if kernels_apply_to(y, h, dy, dlog_det):
        return kernels().exact_affine_coupling_bwd(*tensors, inverse, *options)
    if inverse:
        op = reference.exact_affine_coupling_inverse_backward
    else:
        op = reference.exact_affine_coupling_backward
    return op(*tensors, *options)


def gradients(
    x: Tensor, h: Tensor, dy: Tensor, dlog_det: Tensor, inverse: bool, options: Options
) -> tuple[Tensor, Tensor]:
    scale, clamp, interleaved, _ = options
    tensors = x, h, dy, dlog_det
    if kernels_apply_to(*tensors):
        return kernels().exact_affine_coupling_gradients(
            *tensors, inverse, scale, clamp, interleaved
        )
    if inverse:
        op = reference.exact_affine_coupling_inverse_gradients
    else:
        op = reference.exact_affine_coupling_gradients
    return op(*tensors, scale, clamp, interleaved)


def kernels() -> Any:
    """The ops as kernels. The first call imports Triton."""
    from revlib.kernels import exact_affine_coupling

    return exact_affine_coupling
