"""What layers and flows check at the door."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from revlib.functional._checks import check_integer


def checked_shape(name: str, shape: object) -> tuple[int, ...]:
    """Returns the shape of a sample as a tuple."""
    sizes = sizes_of(shape)
    if not sizes:
        raise ValueError(
            f"{name}: shape must be that of a sample, such as (3, 32, 32); got {shape!r}"
        )
    return sizes


def sizes_of(shape: object) -> tuple[int, ...]:
    """Returns a sequence of whole numbers above 0, NumPy's too, as a tuple; () of all else."""
    if not isinstance(shape, Sequence) or bool in map(type, shape):
        return ()
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:
        return ()
    return sizes if min(sizes, default=0) > 0 else ()


def check_samples(name: str, x: Tensor) -> None:
    """A batch of samples, in floating point."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor; got {type(x).__name__}")
    check_floating(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name}: the stream must be [batch, ...]; got {list(x.shape)}")


def check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be floating point; got {x.dtype}")


def check_sample_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if list(x.shape[1:]) != list(shape):
        raise ValueError(
            f"{name}: samples must have the shape {list(shape)}; got {list(x.shape[1:])}"
        )


def check_channels(name: str, x: Tensor, channels: int) -> None:
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{name}: the stream must be [batch, {channels}, ...]; got {list(x.shape)}"
        )


def check_context(context: object, n: int | None = None) -> None:
    """None, or a tensor; with a row for each of `n` samples or one for all, if `n` is given."""
    if context is None:
        return
    if not isinstance(context, Tensor):
        raise TypeError(f"context must be a tensor or None; got {type(context).__name__}")
    rows = len(context) if context.ndim else "a scalar"
    if n is None and not context.ndim:
        raise ValueError("context must be [batch, ...]; got a scalar")
    # Not as `rows not in (1, n)`: sizes are symbols in a trace, which `in` compares as objects.
    if n is not None and rows != 1 and rows != n:
        raise ValueError(
            f"context must have one row for each of {n} samples, or one for all; got {rows}"
        )


def checked_indices(indices: object) -> Tensor:
    """Returns the indices of a permutation as a tensor."""
    try:
        tensor = torch.as_tensor(indices)
        whole = not (tensor.dtype == torch.bool or tensor.is_floating_point())
        if whole and tensor.numel() and sorted(tensor.tolist()) == [*range(tensor.numel())]:
            return tensor.long()
    except (TypeError, ValueError, RuntimeError):
        pass  # what is no sequence of numbers, torch refuses in many ways
    raise ValueError(
        f"Permutation: indices must hold every number from 0 to channels - 1 once; got {indices}"
    )


def check_channel_count(layer: str, channels: object) -> None:
    check_integer(layer, "channels", channels, 1, 2**31)
