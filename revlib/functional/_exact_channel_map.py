"""A matrix over the channels of every pixel that its inverse undoes bit for bit."""

import torch
from torch import Tensor

from revlib import reference
from revlib.dispatch import kernels_apply_to
from revlib.functional._checks import check_shape, check_tensors
from revlib.functional._exact_scaling import check_exact_stream

# A kernel holds all channels of a pixel at once; beyond these, its registers do not suffice.
LARGEST_KERNEL_CHANNELS = 64


@torch.no_grad()
def exact_channel_map(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Maps the channels of every pixel on a grid, and keeps what rounding drops.

    .. math:: y = W x + b, \qquad W = P L (U + \operatorname{diag}(\sigma d)), \quad
        d = 2^{16} / S, \quad
        S = \operatorname{round}(2^{16} \exp(-s))

    The triangular factors L and U add to each channel what others contribute, rounded to the
    grid, which `exact_channel_map_inverse` takes off again; scaling by d is that of
    `exact_actnorm`. What `exact_affine_coupling` says of the grid, the state and the ranges holds
    here too, of x, of y and of what is between L and U. The entries of L and U are rounded to
    multiples of 2**-16, and :math:`W x + b` is met up to a rounding of each factor. The states
    trade places, the first channel's with the last's: the first elements of d that
    `torch.linalg.lu` gives are small and the last large, so this keeps states in balance.

    Args:
        x: The stream, float32 or float64, on the grid.
        lower: L, of which only what is below the diagonal is read: the diagonal is 1.
        upper: U, of which only what is above the diagonal is read: the diagonal is 0.
        log_diagonal: The logarithm :math:`s` of each element of the diagonal.
        sign: The sign :math:`\sigma` of each, 1 or -1.
        permutation: P, as `torch.linalg.lu` gives it.
        bias: The bias :math:`b` of each channel, which is rounded to the grid, or None.
        state: int64, shaped like `x`. It is overwritten.
        bits: How fine the grid is: 0 to 23 for float32, 0 to 32 for float64.

    Returns:
        `y`, with the shape and dtype of `x`; the log_det, which is exactly that of `d`; and the
        overflow flag, a scalar bool tensor, also True for a NaN or infinite input, and where the
        absolute values in a row of L or U add up to 2048 or more. None of them is differentiable.

    Shape:
        `x`, `y` and `state` are [batch, channels, ...]; `lower`, `upper` and `permutation` are
        [channels, channels]; `log_diagonal`, `sign` and `bias` are [channels]; the log_det is
        [batch], in float64 if `x` or `log_diagonal` is and in float32 otherwise.

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules, but for the values of
            `sign` and `permutation`, which are not read before the op runs.

    References:
        Glow (Kingma and Dhariwal, 2018), section 3.2, https://arxiv.org/abs/1807.03039; lifting
        (Daubechies and Sweldens, 1998), https://arxiv.org/abs/math/9906044; iFlow (Zhang et al.,
        2021), https://arxiv.org/abs/2111.00965

    Example:
        >>> permutation, lower, upper = torch.linalg.lu(torch.randn(4, 4))
        >>> d, bias = upper.diagonal(), torch.randn(4)
        >>> matrix = lower, upper, d.abs().log(), d.sign(), permutation, bias
        >>> x = torch.randint(-4096, 4096, (16, 4, 8, 8)) / 4096
        >>> state = torch.full(x.shape, 2**15)
        >>> y, log_det, _ = revlib.functional.exact_channel_map(x, *matrix, state)
        >>> again, _, _ = revlib.functional.exact_channel_map_inverse(y, *matrix, state)
        >>> torch.equal(again, x), bool((state == 2**15).all())
        (True, True)
    """
    parameters = lower, upper, log_diagonal, sign, permutation, bias
    check("exact_channel_map", *parameters, state, bits, x=x)
    return run(x, parameters, state, False, bits)


@torch.no_grad()
def exact_channel_map_inverse(
    y: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    bits: int = 12,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Undoes `exact_channel_map` bit for bit, with the same parameters and state.

    .. math:: x = W^{-1} (y - b)

    Returns:
        `x`, with the shape and dtype of `y`, the log_det of this direction, and the overflow flag.
    """
    parameters = lower, upper, log_diagonal, sign, permutation, bias
    check("exact_channel_map_inverse", *parameters, state, bits, y=y)
    return run(y, parameters, state, True, bits)


def run(
    x: Tensor, parameters: tuple[Tensor | None, ...], state: Tensor, inverse: bool, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_as_kernel(x, *parameters):
        op = reference.exact_channel_map_inverse if inverse else reference.exact_channel_map
        return op(x, *parameters, state, bits)
    from revlib.kernels import exact_channel_map as kernels

    f = reference.channel_map_factors(*parameters, bits)
    _, _, log_diagonal, *_ = parameters
    log_det = reference.channel_map_log_det(x, f.s, log_diagonal)
    if inverse:
        y, overflow = kernels.exact_channel_map_inverse(
            x, f.lower, f.upper, f.s, f.sign, f.shift, f.order.argsort(), state, bits
        )
    else:
        y, overflow = kernels.exact_channel_map(x, f.product, f.upper, f.s, f.shift, state, bits)
    return y, -log_det if inverse else log_det, overflow | ~f.in_range


def runs_as_kernel(stream: Tensor, *parameters: Tensor | None) -> bool:
    given = (part for part in parameters if part is not None)
    return stream.shape[1] <= LARGEST_KERNEL_CHANNELS and kernels_apply_to(stream, *given)


def check(
    op: str,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    bias: Tensor | None,
    state: Tensor,
    bits: int,
    **streams: Tensor,
) -> None:
    matrices = {"lower": lower, "upper": upper, "permutation": permutation}
    vectors = {"log_diagonal": log_diagonal, "sign": sign}
    if bias is not None:
        vectors["bias"] = bias
    check_tensors(op, **streams, **matrices, **vectors)
    ((name, stream),) = streams.items()
    check_exact_stream(op, name, stream, state, bits)
    channels = stream.shape[1]
    if channels == 0:
        raise ValueError(f"{op}: {name} must have a channel; got {list(stream.shape)}")
    for matrix_name, matrix in matrices.items():
        check_shape(
            op, matrix_name, matrix, (channels, channels), f"[channels, channels] of {name}"
        )
    for vector_name, vector in vectors.items():
        check_shape(op, vector_name, vector, (channels,), f"[channels] of {name}")
