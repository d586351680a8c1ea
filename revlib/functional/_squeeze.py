"""Squeeze: space into channels and back.

Each is one copy of a permuted view, which reads an element once and writes it once, 8 bytes in
float32: a kernel could only move as much.
"""

from typing import Any

from torch import Tensor

from revlib import reference
from revlib.functional._checks import check_tensors


def squeeze(x: Tensor, factor: int = 2, *, places_first: bool = False) -> Tensor:
    """Moves squares of space into channels, as between the scales of a flow.

    Channel c of the input becomes channels ``c * factor**2 + i * factor + j`` of the output, one
    for each place (i, j) in the squares. The elements stay the same, so the log_det is 0.

    Args:
        x: The stream.
        factor: The side of the squares.
        places_first: Whether the places come before the channels, as in i-RevNet: channel c
            becomes channels ``(i * factor + j) * channels + c``.

    Returns:
        The elements of `x`, in its memory format and in memory of their own.

    Shape:
        [batch, channels, height, width] becomes
        [batch, channels * factor**2, height / factor, width / factor].

    Raises:
        TypeError, ValueError: If an argument breaks one of these rules.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803

    Example:
        >>> x = torch.arange(4.0).view(1, 1, 2, 2)
        >>> y = revlib.functional.squeeze(x)
        >>> y.flatten().tolist(), y.shape
        ([0.0, 1.0, 2.0, 3.0], torch.Size([1, 4, 1, 1]))
        >>> torch.equal(revlib.functional.unsqueeze(y), x)
        True
    """
    check_picture("squeeze", x, factor)
    height, width = x.shape[2:]
    if height % factor or width % factor:
        raise ValueError(
            f"squeeze: height and width of x must be divisible by factor, {factor}; "
            f"got {height} and {width}"
        )
    return reference.squeeze(x, factor, places_first)


def unsqueeze(x: Tensor, factor: int = 2, *, places_first: bool = False) -> Tensor:
    """Undoes `squeeze` with the same factor and order.

    Returns:
        The elements of `x`, [batch, channels / factor**2, height * factor, width * factor].
    """
    check_picture("unsqueeze", x, factor)
    channels = x.shape[1]
    if channels % factor**2:
        raise ValueError(
            f"unsqueeze: channels of x must be divisible by factor**2, {factor**2}; got {channels}"
        )
    return reference.unsqueeze(x, factor, places_first)


def check_picture(op: str, x: Tensor, factor: Any) -> None:
    check_tensors(op, x=x)
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be [batch, channels, height, width]; got {list(x.shape)}")
    if isinstance(factor, bool) or not isinstance(factor, int):
        raise TypeError(f"{op}: factor must be an integer; got {factor!r}")
    if factor < 2:
        raise ValueError(f"{op}: factor must be at least 2; got {factor}")
