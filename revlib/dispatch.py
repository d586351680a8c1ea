"""When an op runs as a fused kernel: the one rule, and the switch that turns kernels off."""

import importlib.util
import os
from types import TracebackType

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Triton itself is imported by the first kernel that runs.
_triton_is_installed = importlib.util.find_spec("triton") is not None
# Triton's interpreter is chosen as it is imported, and takes tensors on any device.
_device_types = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
_kernels_are_on = True


def kernels_apply_to(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs as a kernel, and not in plain PyTorch.

    It does on a GPU, if Triton is installed, every dtype is one of `KERNEL_DTYPES` and
    `use_kernels(False)` is not in force. Under ``TRITON_INTERPRET=1`` it does on a CPU, slowly.
    """
    return (
        _kernels_are_on
        and _triton_is_installed
        and all(tensor.device.type in _device_types for tensor in tensors)
        and all(tensor.dtype in KERNEL_DTYPES for tensor in tensors)
    )


def gradient_is_recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class use_kernels:
    """Turns the fused kernels on or off, from now on or for a ``with`` block.

    Every op gives the same values either way, up to rounding: this is for finding out whether a
    kernel is to blame, and for measuring what the kernels bring.

    Args:
        enabled: Whether ops may run as kernels, where `kernels_apply_to` their tensors.

    Example:
        >>> x, h = torch.randn(2, 3), torch.randn(2, 6)
        >>> with revlib.use_kernels(False):
        ...     y, log_det = revlib.functional.affine_coupling(x, h)
    """

    def __init__(self, enabled: bool) -> None:
        global _kernels_are_on
        self._before = _kernels_are_on
        _kernels_are_on = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _kernels_are_on
        _kernels_are_on = self._before
