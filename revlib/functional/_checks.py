"""What every op checks at the door; an error names op, argument, rule and value."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from revlib.dispatch import KERNEL_DTYPES, gradient_is_recorded

# Of a number that a kernel computes with in float32.
LARGEST = torch.finfo(torch.float32).max


def check_tensors(op: str, **tensors: Tensor) -> None:
    """All strided floating-point tensors, on one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in KERNEL_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
            raise TypeError(f"{op}: {name} must be one of {names}; got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{op}: {name} must be a strided tensor; got {tensor.layout}")
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: all tensors must be on one device; got {devices}")


def check_batch_and_channels(op: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim < 2:
        raise ValueError(
            f"{op}: {name} must have a batch and a channel dimension, [batch, channels, ...]; "
            f"got {list(tensor.shape)}"
        )


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], rule: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must be {rule}, {list(shape)}; got {list(tensor.shape)}")


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}; got {value!r}")


def check_positive(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {value!r}")
    if not 0 < value <= LARGEST:
        raise ValueError(f"{op}: {name} must be finite and positive; got {value!r}")


def check_integer(op: str, name: str, value: Any, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's are some, too
        raise TypeError(f"{op}: {name} must be an integer; got {value!r}")
    if not lowest <= value <= highest:
        raise ValueError(f"{op}: {name} must be from {lowest} to {highest}; got {value}")


def check_flags(op: str, **flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False; got {value!r}")


def check_inplace(op: str, written: Sequence[Tensor], *read: Tensor) -> None:
    """Every element that is written has memory of its own, and no gradient is recorded."""
    for tensor in written:
        if not has_memory_of_its_own(tensor):
            raise ValueError(
                f"{op}: inplace=True needs tensors whose elements have memory of their own; "
                f"got the sizes {list(tensor.shape)} with the strides {tensor.stride()}"
            )
    places = [tensor.data_ptr() for tensor in (*written, *read) if tensor.numel()]
    if len(set(places)) < len(places):
        raise ValueError(f"{op}: inplace=True needs tensors apart from each other; got one twice")
    if gradient_is_recorded(*written, *read):
        raise ValueError(
            f"{op}: inplace=True overwrites what a gradient would need; "
            "call it under torch.no_grad() or on tensors that need no gradient"
        )


def has_memory_of_its_own(tensor: Tensor) -> bool:
    """Whether no two elements lie in one place: each stride steps over all shorter ones."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += (size - 1) * stride
    return True
