"""What kernels are held against: float64, and how far plain PyTorch is from it.

A kernel may be twice as far from the float64 result as plain PyTorch is in the kernel's own
dtype, and one unit in the last place more.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Samples of 1, primes, and both sides of a tile of 1024 elements, in 2 to 5 dimensions. All
# have hundreds of elements and several samples: the largest of few errors says little of how far
# an op may be off.
SHAPES = (
    (1021, 1),
    (251, 3),
    (37, 31),
    (7, 1, 1023),
    (7, 2, 512),
    (5, 5, 5, 41),
    (5, 3, 33, 31),
    (5, 2, 3, 5, 7),
)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    """Channels innermost, whatever the number of dimensions."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def half(tensor: Tensor) -> Tensor:
    """The second half of a tensor with twice the channels."""
    return torch.cat((torch.zeros_like(tensor), tensor), 1).chunk(2, 1)[1]


def channels_last_half(tensor: Tensor) -> Tensor:
    return channels_last(torch.cat((torch.zeros_like(tensor), tensor), 1)).chunk(2, 1)[1]


def every_other(tensor: Tensor) -> Tensor:
    """Gaps between all elements, in the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def reversed_dims(tensor: Tensor) -> Tensor:
    """The last dimension outermost: no two dimensions lie one after the other."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def cropped_channels_last(tensor: Tensor) -> Tensor:
    """All but the last place of the last dimension, where that is one of space."""
    if tensor.ndim == 2:
        return tensor
    return channels_last(torch.cat((tensor, tensor[..., :1]), -1))[..., :-1]


LAYOUTS = (
    contiguous,
    channels_last,
    half,
    channels_last_half,
    every_other,
    reversed_dims,
    cropped_channels_last,
)


def assert_close_enough(
    names: Sequence[str], got: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    for name, fused, near, want in zip(names, got, eager, exact, strict=True):
        assert fused.dtype == near.dtype, f"{name}: {fused.dtype}, not {near.dtype}"
        assert fused.shape == want.shape, f"{name}: {fused.shape}, not {want.shape}"
        error = largest(fused.double() - want)
        allowed = 2 * largest(near.double() - want) + torch.finfo(near.dtype).eps * largest(want)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def outputs_and_gradients(
    op: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    output_gradients: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The outputs of an op, then the gradients of its inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = op(*inputs)
    gradients = torch.autograd.grad(outputs, inputs, output_gradients)
    return *(output.detach() for output in outputs), *gradients


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]
